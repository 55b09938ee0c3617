"""Every seed of 63 bits has noise of its own, and the short ones what torch has always drawn for them."""

import pytest
import torch

from spar.common.generators import cpu_generator
from spar.common.limits import MAX_SEED

SEEDS = [7, 2**32 - 1, 2**32, 2**32 + 7, 2**33 + 7, 2**62 + 7, MAX_SEED - 1, MAX_SEED]


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(1000, generator=cpu_generator(seed))


def test_other_seeds_draw_other_noise():
    rows = torch.stack([drawn(seed) for seed in SEEDS])
    assert (torch.corrcoef(rows) - torch.eye(len(SEEDS))).abs().max() < 0.2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_draws_the_same_again_and_normal_noise(seed):
    noise = drawn(seed)
    assert torch.equal(noise, drawn(seed))
    assert abs(float(noise.mean())) < 0.15 and abs(float(noise.std()) - 1) < 0.1
    uniform = torch.rand(1000, generator=cpu_generator(seed))
    assert 0 <= float(uniform.min()) < 0.05 and 0.95 < float(uniform.max()) < 1


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_a_seed_of_32_bits_draws_what_torch_draws_for_it(seed):
    assert torch.equal(drawn(seed), torch.randn(1000, generator=torch.Generator().manual_seed(seed)))
