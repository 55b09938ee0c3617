"""Aspect buckets: sizes that a grid of tokens fits, and images in the nearest of them."""

import numpy as np
import pytest

from spar.common.errors import InputError
from spar.data.buckets import STRIDE, assign, make_buckets


@pytest.mark.parametrize("side", [224, 448])
def test_buckets_are_whole_tokens_of_about_equal_area_both_ways(side):
    buckets = make_buckets(side, 2.0)
    assert (side, side) in buckets and len(set(buckets)) == len(buckets) > 4
    for width, height in buckets:
        assert width % STRIDE == height % STRIDE == 0 and (height, width) in buckets
        assert abs(width * height / side**2 - 1) < 0.05 and max(width, height) <= 2 * min(width, height)


def test_an_aspect_of_one_is_the_square_alone():
    assert make_buckets(448) == ((448, 448),)


@pytest.mark.parametrize(("side", "aspect"), [(450, 1), (0, 1), (448, 0.5), (448, 9)])
def test_impossible_buckets_are_refused(side, aspect):
    with pytest.raises(InputError, match="expected"):
        make_buckets(side, aspect)


def test_each_image_goes_where_least_is_cut():
    buckets = make_buckets(448, 2.0)
    sizes = np.random.default_rng(0).integers(200, 2000, (5000, 2))
    chosen = assign(sizes, buckets, batch=8)
    kept = [buckets[i] for i in np.unique(chosen)]
    for (width, height), bucket in zip(sizes[:300], chosen, strict=False):
        cuts = [abs(np.log(width / height) - np.log(w / h)) for w, h in kept]
        assert kept[int(np.argmin(cuts))] == buckets[bucket]


def test_unknown_sizes_go_with_the_square_and_rare_buckets_to_a_neighbour():
    buckets = make_buckets(448, 2.0)
    square, wide = buckets.index((448, 448)), len(buckets) - 1
    sizes = np.array([[0, 0]] * 50 + [[900, 450]] * 50 + [[450, 900]])
    chosen = assign(sizes, buckets, batch=64)
    assert (chosen[:50] == square).all() and (chosen[50:100] == wide).all()
    assert chosen[100] == square  # one tall image is no bucket: batches of 64 would be that image over and over
    assert assign(sizes[-1:], buckets, batch=64).tolist() == [0]  # unless there is nothing else
