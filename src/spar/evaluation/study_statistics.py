"""The differences of a study's arms from its reference: paired by seed and prompt, with Holm's correction.

Two things vary: trainings, of which there are as many as seeds, and prompts, which all seeds share. An interval is the
wider of two: Student's over the seeds' own differences, and the bootstrap's over the prompts. With three seeds the
first is wide (4.3 standard errors), as three trainings say little about the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from spar.common.errors import InputError
from spar.evaluation.compare import POWER, detectable_errors, units
from spar.evaluation.results import LEVEL, Result
from spar.evaluation.targets import show_title

DRAWS = 2000
LOWER_IS_BETTER = ("shapes-loss", "shapes-frechet")
# What is compared of an endpoint's records, the first under the endpoint's own name; others have one outcome each.
STUDIED: dict[str, tuple[str, ...]] = {
    "shapes-loss": ("loss", "margin"), "shapes-recon": ("psnr", "survived", "psnr_low", "psnr_high"),
}  # fmt: skip


@dataclass(frozen=True)
class StudyDifference:
    """An arm's score minus the reference's.

    Attributes:
        arm: the variant; `endpoint` the benchmark.
        reference: the reference's mean over seeds; `mean` the arm's.
        value: their difference, from `low` to `high` with 95 % confidence.
        by_seed: the difference of each seed.
        n: prompts of each seed.
        p: two-sided, the larger of both tests'; of main measures after Holm's correction over the study's comparisons.
            1 with one seed.
        detectable: the difference that so many seeds and prompts show in 80 % of the cases, at the level of the
            correction's first and strictest step; infinite with one seed.
        main: whether it is the endpoint's main measure; the others are not corrected.
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
    main: bool = True

    @property
    def verdict(self) -> str:
        """In words; "undecided" with what would have shown."""
        if len(self.by_seed) == 1:
            return "undecided (one seed)"
        if self.p < 1 - LEVEL and not self.low <= 0 <= self.high:
            better = (self.value < 0) == (self.endpoint in LOWER_IS_BETTER)
            return f"{'higher' if self.value > 0 else 'lower'}: {'better' if better else 'worse'}"
        return f"undecided (at least {self.detectable:.2g} would show)"


def study_differences(
    reference: str, results: Mapping[str, Mapping[str, Sequence[Result]]], *, again: str = "again", seed: int = 0
) -> list[StudyDifference]:
    """Each arm's difference from the reference at each endpoint, in its outcomes or in what STUDIED names.

    Holm's correction is over the main measures, the first of each endpoint. The A/A arm is no comparison of the study:
    it is not corrected, and corrects no other.
    """
    asked = [
        (arm, endpoint, measure, arm != again and rank == 0)
        for arm in results if arm != reference for endpoint in results[arm]
        for rank, measure in enumerate(studied(results[reference][endpoint][0]))
    ]  # fmt: skip
    count = sum(corrected for *_, corrected in asked)
    found = [
        difference(
            arm, results[reference][endpoint], results[arm][endpoint], measure, seed=seed,
            comparisons=count if corrected else 1,
        )
        for arm, endpoint, measure, corrected in asked
    ]  # fmt: skip
    compared, least = [number for number, one in enumerate(asked) if one[-1]], 0.0
    for rank, number in enumerate(sorted(compared, key=lambda number: found[number].p)):
        least = max(least, min(1.0, found[number].p * (count - rank)))
        found[number] = replace(found[number], p=least)
    return found


def studied(result: Result) -> tuple[str | None, ...]:
    """The measures of a result that its records have; None for the one outcome."""
    records: Sequence[Mapping[str, object]] = next(iter(result.details.values()), [])
    record = next(iter(records), {})
    return tuple(name for name in STUDIED.get(result.benchmark, ()) if name in record) or (None,)


def difference(
    arm: str, reference: Sequence[Result], other: Sequence[Result], measure: str | None = None, *, seed: int = 0,
    comparisons: int = 1,
) -> StudyDifference:  # fmt: skip
    """The difference of two arms' results, one of each seed, on the same prompts.

    Args:
        measure: a field of the records; by default the benchmark's outcome.
        comparisons: so many share the chance of being wrong, in what is detectable.

    Raises:
        InputError: another number of seeds, or other prompts.
    """
    if len(reference) != len(other) or not reference:
        raise InputError(f"{arm}: expected results of {len(reference)} seeds, got {len(other)}")
    title = show_title(reference[0])
    main = measure is None or measure == STUDIED.get(reference[0].benchmark, (measure,))[0]
    if not main:
        title = f"{title}, {measure}"
    alpha = (1 - LEVEL) / comparisons
    own, its = ([units(result, measure) for result in results] for results in (reference, other))
    keys = [[(task, key) for task, rows in one.items() for key, _ in rows] for one in (*own, *its)]
    if any(one != keys[0] for one in keys):
        raise InputError(f"{arm}, {title}: expected results of the same prompts for every seed")
    # By task `[seeds, prompts]`.
    tables = [
        [np.array([[value for _, value in one[task]] for one in results]) for results in (own, its)] for task in own[0]
    ]
    changes = [second - first for first, second in tables]
    by_seed = np.mean([change.mean(1) for change in changes], axis=0)                       # [seeds]
    count, seeds, value = sum(change.shape[1] for change in changes), len(reference), float(by_seed.mean())
    half, p, detectable = _over_prompts(changes, value, seed, alpha)
    if seeds > 1:
        others = _over_seeds(by_seed, value, alpha)
        half, p, detectable = (max(pair) for pair in zip((half, p, detectable), others, strict=True))
    else:
        p, detectable = 1.0, float("inf")
    first, second = (float(np.mean([table[side].mean() for table in tables])) for side in (0, 1))
    return StudyDifference(
        arm, title, first, second, value, value - half, value + half, tuple(by_seed.tolist()), count, p, detectable,
        main,
    )


def _over_seeds(by_seed: np.ndarray, value: float, alpha: float) -> tuple[float, float, float]:
    """Half the interval, p and what is detectable at level `alpha`, by Student's distribution over the seeds."""
    error, freedom = float(by_seed.std(ddof=1)) / len(by_seed) ** 0.5, len(by_seed) - 1
    edge = float(stats.t.ppf((1 + LEVEL) / 2, freedom))
    p = float(2 * stats.t.sf(abs(value) / error, freedom)) if error else float(value == 0)
    return edge * error, p, float(stats.t.ppf(1 - alpha / 2, freedom) + stats.t.ppf(POWER, freedom)) * error


def _over_prompts(
    changes: Sequence[np.ndarray], value: float, seed: int, alpha: float
) -> tuple[float, float, float]:  # fmt: skip
    """The same by resampling prompts, which all seeds share, within their tasks."""
    means = [change.mean(0) for change in changes]                                          # by task `[prompts]`
    whole = np.concatenate(means)
    if (whole == whole[0]).all():  # resampling would see no chance at all: a sign test, and Clopper-Pearson's width
        chance = 1 - ((1 - LEVEL) / 2) ** (1 / len(whole))
        return chance, min(1.0, 2 * 0.5 ** len(whole)) if value else 1.0, chance
    rng = np.random.default_rng(seed)
    drawn = np.mean([m[rng.integers(0, len(m), (DRAWS, len(m)))].mean(1) for m in means], axis=0)
    error = float(drawn.std())
    p = float(2 * stats.norm.sf(abs(value) / error)) if error else float(value == 0)
    return float(stats.norm.ppf((1 + LEVEL) / 2)) * error, p, detectable_errors(alpha) * error
