"""When joining a running batch is worth it: the sum of all times to the end, counted out in both ways."""

import random

import pytest

from spar.serving import joining
from spar.serving.joining import BatchCosts, LinearCost


def line(fixed: float, each: float) -> LinearCost:
    return LinearCost({rows: fixed + each * rows for rows in (1, 3, 8)})


def ends(steps: list[int], start: float, fixed: float, each: float, before: list[int] | None = None) -> list[float]:
    """When rows end that begin at `start` beside rows that have `before` steps left."""
    found, now = dict[int, float](), start
    for step in range(max([*steps, *(before or [])])):
        now += fixed + each * sum(left > step for left in [*steps, *(before or [])])
        found[step + 1] = now
    return [found[count] for count in steps]


@pytest.mark.parametrize("seed", range(40))
def test_it_is_worth_it_where_the_sum_of_the_times_to_the_end_falls(seed, monkeypatch):
    monkeypatch.setattr(joining, "PREPARATION_SHARE", 1)
    drawn = random.Random(seed)
    left, steps = ([drawn.randint(1, 30) for _ in range(drawn.randint(1, 5))] for _ in range(2))
    fixed, each, prepared = drawn.choice((0, 1, 5)), drawn.choice((0, 1, 2)), drawn.choice((0, 3, 40))
    costs = BatchCosts(line(fixed, each), line(prepared, 0.5))
    preparation = prepared + 0.5 * len(steps)
    joined = ends(left, preparation, fixed, each, steps) + ends(steps, preparation, fixed, each, left)
    first = ends(left, 0, fixed, each)
    waited = first + ends(steps, max(first) + preparation, fixed, each)
    if abs(sum(joined) - sum(waited)) > 1e-6:
        assert costs.worth_joining(left, steps) is (sum(joined) < sum(waited))


def test_what_a_batch_costs_decides():
    free = line(0, 0)
    assert BatchCosts().worth_joining([5], [5])                           # nothing is known: it is tried
    assert BatchCosts(line(1, 0), free).worth_joining([5] * 7, [5])       # a row more costs nothing
    assert not BatchCosts(line(0, 1), free).worth_joining([5], [5])       # it costs as much as a batch of its own
    assert BatchCosts(line(0, 1), free).worth_joining([50], [4])          # the short one ends before the long one
    dear = BatchCosts(line(1, 0), line(2, 0))
    assert not dear.worth_joining([5] * 4, [5])                           # four wait for a prompt twice (it counts so)
    assert dear.worth_joining([5] * 4, [5] * 4)                           # for those of four together


def test_costs_lie_on_a_line_through_what_was_measured_lately():
    cost = LinearCost()
    assert cost.line() == (0, 0)
    cost.observe(4, 8.0)
    assert cost.line() == (8, 0)                                          # as if another row cost nothing
    cost.observe(1, 5.0)
    assert cost.line() == pytest.approx((4, 1))
    for _ in range(50):
        cost.observe(1, 2.0)
    assert cost.line() == pytest.approx((0, 2))
    cost.observe(1, 100.0)                                                # another process had the core
    assert cost.measured[1] == pytest.approx(2 + 0.1 * 98)
    assert LinearCost({1: 5.0, 2: 4.0}).line() == pytest.approx((4, 0))         # more rows are never cheaper,
    assert LinearCost({1: 20.0, 4: 0.2, 8: 0.2}).line() == pytest.approx((0.2, 0))  # so that a cold start is none,
    assert LinearCost({1: 1.0, 2: 4.0}).line() == pytest.approx((0, 2.5 / 1.5))  # nor is no row
