"""The order: bijections, exact shares, the same for everybody."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spar.data.shuffle import BLOCK, PERIOD, WINDOW, InterleaveSchedule, hash_key, permute, shuffled


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_hits_every_number_once(size, key):
    assert sorted(permute(np.arange(size), size, key)) == [*range(size)]


@pytest.mark.parametrize("size", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, BLOCK * WINDOW * 2 + 77])
def test_an_epoch_shows_every_sample_once(size):
    assert sorted(shuffled(np.arange(size), size, 5)) == [*range(size)]


def test_a_position_needs_no_others():
    whole = shuffled(np.arange(10_000), 10_000, 3)
    some = np.array([9_999, 0, 5_000, 4_095, 4_096])
    assert (shuffled(some, 10_000, 3) == whole[some]).all()


def test_epochs_and_seeds_differ_and_look_random():
    size = 5 * BLOCK * WINDOW
    first, second = (shuffled(np.arange(size), size, hash_key(seed)) for seed in (0, 1))
    assert (first == second).mean() < 0.01
    for order in (first, second):
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.2
        assert len(np.unique(order[: BLOCK * WINDOW] // BLOCK)) <= 2 * WINDOW + 1  # reading stays local
        steps = np.abs(np.diff(order))
        assert (steps == 1).mean() < 0.01


def test_positions_of_the_largest_sets_stay_inside():
    size = 27_000_001
    found = shuffled(np.arange(size - 1000, size), size, 9)
    assert len(np.unique(found)) == 1000 and found.min() >= 0 and found.max() < size


def test_shares_are_exact_over_a_period_and_near_everywhere():
    schedule = InterleaveSchedule([0.6, 0.2, 0.2])
    slots = np.arange(3 * PERIOD)
    category, occurrence = schedule.at(slots)
    for number, share in enumerate((0.6, 0.2, 0.2)):
        assert abs((category == number).sum() / len(slots) - share) < 1e-4
        assert (occurrence[category == number] == np.arange((category == number).sum())).all()
        for start in (0, 777, PERIOD - 50):
            assert abs((category[start : start + 1000] == number).mean() - share) < 0.01


def test_the_rarest_category_still_comes():
    category, _ = InterleaveSchedule([1.0, 1e-12]).at(np.arange(PERIOD))
    assert (category == 1).sum() == 1


@pytest.mark.parametrize("shares", [[], [0.0, 1.0], [-1.0], [float("nan")]])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match="positive shares"):
        InterleaveSchedule(shares)


def test_the_order_never_changes():
    """A checkpoint of last year resumes on the same samples: these numbers are part of the format."""
    assert shuffled(np.arange(8), 1000, hash_key(0, 1, 2)).tolist() == GOLDEN
    assert InterleaveSchedule([3, 1]).at(np.arange(8))[0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


GOLDEN = [830, 384, 3, 659, 946, 863, 185, 884]
