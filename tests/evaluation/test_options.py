"""Options, and the seeds that make a benchmark the same for everyone."""

import itertools

import numpy as np
import pytest
from PIL import Image

from spar.common.errors import InputError
from spar.evaluation.options import BENCHMARK_NAMES, EvalOptions, batches, image_seed, pixels, scene_seed, seed_block
from spar.worlds.shapes.scene import SEED_RANGES


@pytest.mark.parametrize(
    "wrong",
    [{"limit": 0}, {"batch": 0}, {"images_per_prompt": 0}, {"seed": -1}, {"limit": 1.5}, {"combinations": "all"}],
)
def test_a_wrong_option_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        EvalOptions(**wrong)


def test_only_what_is_given_is_passed_on():
    assert EvalOptions().sampling() == {}
    assert EvalOptions(num_inference_steps=5, guidance_scale=1.0).sampling() == {
        "num_inference_steps": 5,
        "guidance_scale": 1.0,
    }


def test_blocks_of_seeds_never_meet_and_lie_in_the_benchmark_range():
    keys = list(itertools.product(BENCHMARK_NAMES, range(7), ("seen", "held_out")))
    numbers = [seed_block(*key) for key in keys]
    assert len(set(numbers)) == len(keys)
    start, stop = SEED_RANGES["benchmark"]
    assert all(start <= scene_seed(number, index) < stop for number in numbers for index in (0, 10**6 - 1))
    with pytest.raises(ValueError):
        scene_seed(0, 10**6)


def test_an_image_seed_depends_on_each_of_its_four_parts():
    seeds = {image_seed(*parts) for parts in itertools.product(range(3), repeat=4)}
    assert len(seeds) == 81
    assert image_seed(1, 2, 3, 4) == image_seed(1, 2, 3, 4) >= 0


def test_batches_hold_everything_once_and_report():
    seen = []
    chunks = list(batches(list(range(10)), 4, lambda done, total: seen.append((done, total))))
    assert [list(chunk) for chunk in chunks] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_an_image_of_another_size_is_refused():
    assert pixels(Image.new("L", (64, 64), 7)).tolist() == np.full((64, 64, 3), 7).tolist()
    with pytest.raises(InputError, match="64 x 64"):
        pixels(Image.new("RGB", (32, 32)))
