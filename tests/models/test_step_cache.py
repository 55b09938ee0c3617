"""Step caching: exact where it does not apply, the decision by planted changes, and images of a batch as alone."""

from dataclasses import replace

import pytest
import torch

from spar.models.denoiser import Denoiser
from spar.models.step_cache import StepCache

CHANNELS, GRID, LENGTH = 8, 4, 6
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def denoiser(config, randomize):
    return randomize(Denoiser(replace(config.denoiser, position_gain=0.0), CHANNELS, GRID))


def planted(cache, *steps):
    """Runs steps whose first block adds planted numbers `[B]`; the others add 10 times the call's number.

    Returns what came out less what the first block added, and by step the rows on which the others ran.
    """
    out, ran = [], []
    for number, added in enumerate(steps, start=1):
        x = torch.zeros(len(added), 3, 2)
        rows = []

        def others(x, index, number=number, rows=rows):
            rows += list(range(len(x))) if index is None else index.tolist()
            return x + 10.0 * number

        first = torch.tensor(added)[:, None, None].expand_as(x)
        out.append((cache.run(x, lambda x, first=first: x + first, others) - first)[:, 0, 0].tolist())
        ran.append(rows)
    return out, ran


def test_blocks_run_again_where_the_first_ones_part_has_changed_and_there_alone():
    cache = StepCache(0.25, images=2)
    out, ran = planted(cache, [1.0, 1.0], [1.2, 1.6], [1.2, 1.7], [1.4, 1.6])
    assert ran == [[0, 1], [1], [], [0]]  # against the step at which an image's blocks ran last: 1.4 of 1.0, not of 1.2
    assert out == [[10, 10], [10, 20], [10, 20], [40, 20]]
    assert (cache.ran, cache.asked) == (4, 8)


def test_both_branches_of_an_image_decide_together():
    _, ran = planted(StepCache(0.25, images=2), [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0])
    assert ran[1] == [1, 3]


def test_another_number_of_rows_begins_anew():
    """As where guidance ends within its interval."""
    _, ran = planted(StepCache(0.25, images=2), [1.0] * 4, [1.0] * 2, [1.0] * 2, [1.0] * 4)
    assert ran == [[0, 1, 2, 3], [0, 1], [], [0, 1, 2, 3]]


@torch.no_grad()
def test_a_denoiser_beside_a_cache_that_never_applies_is_itself(denoiser, config):
    latent, condition = draw(2, CHANNELS, GRID, GRID, seed=1), draw(2, LENGTH, config.denoiser.caption_channels, seed=2)
    cache = StepCache(1e-9, images=2)
    for time in (0.9, 0.5, 0.1):
        times = torch.full((2,), time)
        wanted = denoiser(latent, times, condition, MASK).velocity
        assert torch.equal(denoiser(latent, times, condition, MASK, None, cache).velocity, wanted)
    assert cache.ran == cache.asked == 6
    again = denoiser(latent, times, condition, MASK, None, cache).velocity  # nothing has changed
    torch.testing.assert_close(again, wanted)
    assert cache.ran == 6 and cache.asked == 8
    with pytest.raises(ValueError, match="one noise sample an image beside a cache, got 4 of 2"):
        denoiser(latent.repeat(2, 1, 1, 1), times.repeat(2), condition, MASK, None, cache)


@torch.no_grad()
def test_images_of_a_batch_are_those_of_one_alone(denoiser, config):
    """Where some run all blocks and others do not, with the blocks' keys precomputed and not."""
    condition = draw(2, LENGTH, config.denoiser.caption_channels, seed=2)
    start, moves = draw(2, CHANNELS, GRID, GRID, seed=1), draw(4, 2, CHANNELS, GRID, GRID, seed=3)
    moves = moves * torch.tensor([0.02, 0.6])[None, :, None, None, None]  # the second image moves farther
    together, alone = StepCache(0.1, 2), [StepCache(0.1, 1) for _ in range(2)]
    reads = denoiser.key_values(condition)
    for number, move in enumerate(moves):
        latent, times = start + move, torch.full((2,), 0.5)
        whole = denoiser(latent, times, reads if number % 2 else condition, MASK, None, together).velocity
        for row, cache in enumerate(alone):
            own = slice(row, row + 1)
            one = denoiser(latent[own], times[own], condition[own], MASK[own], None, cache).velocity
            torch.testing.assert_close(whole[own], one, rtol=1e-4, atol=1e-5)
    assert alone[0].ran < alone[1].ran and together.ran == sum(cache.ran for cache in alone)
