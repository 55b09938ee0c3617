"""Random generators of torch on the CPU for all seeds of 63 bits."""

import numpy as np
import torch

_STATE_AT = 3  # of torch's generator: its seed, two counters, then the words of MT19937, 64 bits for each
_SHORT = 2**32


def cpu_generator(seed: int) -> torch.Generator:
    """A generator of torch on the CPU, of a seed from 0 to MAX_SEED.

    `manual_seed` reads the lower 32 bits of a seed alone, so that 7 and 2**32 + 7 would draw the same. A seed of 32
    bits draws what `manual_seed` gives; a longer one gets the state that numpy's MT19937 has for it.
    """
    generator = torch.Generator().manual_seed(seed % _SHORT)
    if seed < _SHORT:
        return generator
    words = torch.from_numpy(np.random.MT19937(seed).state["state"]["key"].astype(np.int64))
    state = generator.get_state()
    state.view(torch.int64)[_STATE_AT : _STATE_AT + len(words)] = words
    return generator.set_state(state)
