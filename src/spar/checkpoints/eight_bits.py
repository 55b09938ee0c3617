"""Weights in 8 bits: which tensors of a network may be stored so, and what they are then.

A matrix takes a float8 (e4m3: a sign, 4 bits of exponent, 3 of mantissa) without scales; vectors, the LLM's embeddings,
places and codebooks stay as they are. Loading widens them: they save space on disk and in a repository, not time or
memory.
"""

import torch
from torch import Tensor

EIGHT_BITS = torch.float8_e4m3fn
_KEPT = ("embed_tokens.weight", "positions", "position_embedding.weight")


def takes_eight_bits(name: str, value: Tensor) -> bool:
    """Whether the tensor of this name may be stored in 8 bits."""
    in_codebook = any(part.endswith("quantizer") for part in name.split("."))
    return value.is_floating_point() and value.dim() > 1 and not in_codebook and not name.endswith(_KEPT)


def rounded(name: str, value: Tensor, bits: int) -> Tensor:
    """`value` as a folder of weights with `bits` (16: bfloat16) gives it back; whole numbers as they are."""
    if not value.is_floating_point():
        return value
    if bits == 8 and takes_eight_bits(name, value):
        return value.to(EIGHT_BITS).to(value.dtype)
    return value.to(torch.bfloat16).to(value.dtype)
