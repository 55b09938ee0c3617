"""The differences of a study's arms from its reference: paired by seed and prompt, with Holm's correction.

Prompts are resampled within seeds, and seeds with them: two trainings of one recipe differ by more than the prompts
say. A comparison of few seeds is therefore wide, as it should be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spar.common.errors import InputError
from spar.evaluation.compare import detectable_errors, units
from spar.evaluation.results import LEVEL, Result
from spar.evaluation.targets import show_title

DRAWS = 2000


@dataclass(frozen=True)
class StudyDifference:
    """An arm's score minus the reference's.

    Attributes:
        arm: the variant; `endpoint` the benchmark.
        reference: the reference's mean over seeds; `mean` the arm's.
        value: their difference, from `low` to `high` with 95 % confidence.
        by_seed: the difference of each seed.
        n: prompts of each seed.
        p: two-sided, of the resampled differences; after Holm's correction over the study's comparisons.
        detectable: the difference that so many seeds and prompts show in 80 % of the cases, at the corrected level.
    """

    arm: str
    endpoint: str
    reference: float
    mean: float
    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    n: int
    p: float
    detectable: float

    @property
    def verdict(self) -> str:
        """In words; "undecided" with what would have shown."""
        if self.p < 1 - LEVEL and not self.low <= 0 <= self.high:
            return "higher" if self.value > 0 else "lower"
        return f"undecided (at least {self.detectable:.2g} would show)"


def study_differences(
    reference: str, results: Mapping[str, Mapping[str, Sequence[Result]]], *, again: str = "again", seed: int = 0
) -> list[StudyDifference]:
    """Each arm's difference from the reference at each endpoint, main scores alone.

    The A/A arm is no comparison of the study: it is not corrected, and corrects no other.
    """
    found = [
        difference(arm, results[reference][endpoint], results[arm][endpoint], seed=seed)
        for arm in results if arm != reference for endpoint in results[arm]
    ]  # fmt: skip
    compared = [number for number, one in enumerate(found) if one.arm != again]
    least, count = 0.0, len(compared)
    stricter = detectable_errors((1 - LEVEL) / max(1, count)) / detectable_errors(1 - LEVEL)
    for rank, number in enumerate(sorted(compared, key=lambda number: found[number].p)):
        one = found[number]
        least = max(least, min(1.0, one.p * (count - rank)))
        found[number] = replace(one, p=least, detectable=one.detectable * stricter)
    return found


def difference(arm: str, reference: Sequence[Result], other: Sequence[Result], *, seed: int = 0) -> StudyDifference:
    """The difference of two arms' results, one of each seed, on the same prompts.

    Raises:
        InputError: another number of seeds, or other prompts.
    """
    if len(reference) != len(other) or not reference:
        raise InputError(f"{arm}: expected results of {len(reference)} seeds, got {len(other)}")
    title = show_title(reference[0])
    own, its = ([units(result) for result in results] for results in (reference, other))
    keys = [[(task, key) for task, rows in one.items() for key, _ in rows] for one in (*own, *its)]
    if any(one != keys[0] for one in keys):
        raise InputError(f"{arm}, {title}: expected results of the same prompts for every seed")
    # By task `[seeds, prompts]`.
    tables = [
        [np.array([[value for _, value in one[task]] for one in results]) for results in (own, its)] for task in own[0]
    ]
    changes = [second - first for first, second in tables]
    seeds = len(reference)
    by_seed = np.mean([change.mean(1) for change in changes], axis=0)                       # [seeds]
    rng, drawn = np.random.default_rng(seed), np.empty(DRAWS)
    for draw in range(DRAWS):
        chosen = rng.integers(0, seeds, seeds)
        drawn[draw] = np.mean([
            change[chosen[:, None], rng.integers(0, change.shape[1], (seeds, change.shape[1]))].mean()
            for change in changes
        ])  # fmt: skip
    low, high = (float(one) for one in np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    value = float(by_seed.mean())
    tail = min((drawn <= 0).mean(), (drawn >= 0).mean())
    first, second = (float(np.mean([table[side].mean() for table in tables])) for side in (0, 1))
    return StudyDifference(
        arm, title, first, second, value, low, high, tuple(by_seed.tolist()), sum(c.shape[1] for c in changes),
        p=float(min(1.0, max(2 * tail, 1 / DRAWS))), detectable=detectable_errors(1 - LEVEL) * float(drawn.std()),
    )  # fmt: skip
