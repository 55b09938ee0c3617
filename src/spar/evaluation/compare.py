"""Two models on the same prompts: the difference of their scores, paired by prompt.

A prompt that is hard for one model is hard for the other, so that the interval of the difference is that of the
differences of the prompts, and narrower than the two scores' own intervals suggest. Prompts are resampled within their
tasks; an image's seeds stay with its prompt. Chance is judged by flipping the signs of the prompts' differences, and
Holm's correction holds over the main scores of a comparison; those of single tasks are not corrected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import NormalDist
from typing import Any

import numpy as np

from spar.common.errors import InputError
from spar.evaluation.results import DRAWS, LEVEL, Result
from spar.evaluation.shapes_vqa import is_right
from spar.evaluation.targets import show_title

POWER = 0.8
MAIN = ("overall", "psnr", "ssim")  # a result's main scores
MEASURES = {"shapes-recon": ("psnr",), "recon": ("psnr", "ssim")}  # of their records; others have one outcome each
CLASSIFIED = ("zero-shot", "shapes-zero-shot")  # benchmarks whose answers are labels, word for word
_SAME = ("combinations", "seed", "images_per_prompt", "template", "originals")
_CHUNK = 2**22  # values that are drawn at once


@dataclass(frozen=True)
class Difference:
    """The second model's score minus the first's.

    Attributes:
        title: the benchmark, with its combinations and label.
        score: "overall", or the name of a task or kind.
        first: the first model's score; `second` the second's.
        value: their difference, from `low` to `high` with 95 % confidence.
        n: prompts.
        p: how often chance alone gives such a difference, two-sided; of main scores after Holm's correction.
        detectable: the difference that this many prompts show in 80 % of the cases.
        corrected: whether `p` and `detectable` are after the correction.
    """

    title: str
    score: str
    first: float
    second: float
    value: float
    low: float
    high: float
    n: int
    p: float
    detectable: float
    corrected: bool = False

    @property
    def verdict(self) -> str:
        """In words; "undecided" with what would have shown, where the interval holds 0 or chance may explain it."""
        if not self.low <= 0 <= self.high and self.p < 1 - LEVEL:
            return "higher" if self.value > 0 else "lower"
        return f"undecided (at least {self.detectable:.2g} would show)"


def units(result: Result, measure: str | None = None) -> dict[str, list[tuple[str, float]]]:
    """The prompts of each task with their outcomes, in order, from a result's details; by default its first measure.

    Raises:
        InputError: a benchmark whose score is no mean over prompts, or details that do not have every outcome.
    """
    if result.benchmark in ("shapes-paraphrase", "shapes-codes"):
        raise InputError(f"{result.benchmark}: its score is no mean over prompts, so that nothing can be paired")
    records = next(iter(result.details.values()), None)
    if not isinstance(records, list) or not records:
        raise InputError(f"{result.benchmark}: expected the outcome of every prompt in the details, found none")
    found: dict[str, list[tuple[str, float]]] = {}
    for number, one in enumerate(records):
        try:
            outcome = _outcome(result.benchmark, one) if measure is None else float(one[measure])
            known = ("prompt", "instruction", "question", "questions", "image", "expected")
            key = " | ".join(str(one[name]) for name in known if name in one) or str(number)
            task = str(one.get("task") or one.get("kind") or "overall")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{result.benchmark}: expected an outcome in record {number} of the details, got {str(one)[:80]}"
            ) from error
        found.setdefault(task, []).append((key, outcome))
    return found


def _outcome(benchmark: str, record: dict[str, Any]) -> float:
    """The outcome of one prompt: a share, or decibels; of a conversation that of the last turn."""
    for name in ("psnr", "loss", "frechet"):
        if name in record:
            return float(record[name])
    if "answers" in record:
        return float(is_right(record["answers"][-1], record["expected"][-1]))
    if benchmark in CLASSIFIED:
        return float(record["answer"] == record["expected"])
    if "answer" in record:
        return float(is_right(record["answer"], record["expected"]))
    return float(np.mean(record["right"]))


def compare(first: Result, second: Result, *, seed: int = 0) -> list[Difference]:
    """The differences of the main scores (of reconstructions PSNR, of conversations the last turn) and of each task's.

    Raises:
        InputError: results of other benchmarks, settings or prompts.
    """
    settings: dict[str, tuple[Any, Any]] = {"benchmark": (first.benchmark, second.benchmark)}
    settings |= {name: (first.settings.get(name), second.settings.get(name)) for name in _SAME}
    detectors = [one.settings.get("detector") for one in (first, second)]
    versions = [one.get("version") if isinstance(one, dict) else None for one in detectors]
    settings["detector version"] = (versions[0], versions[1])
    for name, (was, now) in settings.items():
        if was != now:
            raise InputError(f"expected two results of the same {name}, got {was!r} and {now!r}")
    found = []
    for measure in MEASURES.get(first.benchmark, (None,)):
        found += _compare(first, second, measure, seed)
    return found


def _compare(first: Result, second: Result, measure: str | None, seed: int) -> list[Difference]:
    own, other = units(first, measure), units(second, measure)
    keys = [[(task, key) for task, rows in one.items() for key, _ in rows] for one in (own, other)]
    if keys[0] != keys[1]:
        pair = next(pair for pair in zip_longest(*keys) if pair[0] != pair[1])
        shown = [repr(one[1][:60]) if one else "none" for one in pair]
        raise InputError(
            f"{first.benchmark}: expected two results of the same prompts, got {len(keys[0])} and {len(keys[1])}; the "
            f"first that differ: {shown[0]} and {shown[1]}"
        )
    pairs = {
        name: np.array([[was, now] for (_, was), (_, now) in zip(rows, other[name], strict=True)])
        for name, rows in own.items()
    }  # fmt: skip
    found = [_difference(show_title(first), measure or "overall", [*pairs.values()], seed)]
    if len(pairs) > 1:
        found += [_difference(show_title(first), name, [rows], seed) for name, rows in pairs.items()]
    return found


def _difference(title: str, score: str, groups: Sequence[np.ndarray], seed: int) -> Difference:
    """Of groups of pairs `[n, 2]`, the mean of the groups' means."""
    rng = np.random.default_rng(seed)
    first, second = np.mean([group.mean(0) for group in groups], axis=0)
    changes = [group[:, 1] - group[:, 0] for group in groups]
    count, value = sum(map(len, groups)), float(second - first)
    drawn, by_chance = np.zeros(DRAWS), np.zeros(DRAWS)
    for change in changes:
        for start in range(0, DRAWS, part := max(1, _CHUNK // len(change))):
            rows = slice(start, min(start + part, DRAWS))
            shape = rows.stop - rows.start, len(change)
            drawn[rows] += change[rng.integers(0, len(change), shape)].mean(1) / len(changes)
            by_chance[rows] += (change * rng.choice((-1.0, 1.0), shape)).mean(1) / len(changes)
    low, high = (float(one) for one in np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    detectable = detectable_errors(1 - LEVEL) * float(drawn.std())
    if all((change == change[0]).all() for change in changes):  # the bootstrap's interval would have no length
        chance = ((1 - LEVEL) / 2) ** (1 / count)                              # Clopper-Pearson
        edges = (value * chance, value) if value else (chance - 1, 1 - chance)
        (low, high), detectable = sorted(edges), 1 - chance
    beyond = int((np.abs(by_chance) >= abs(value) - 1e-12).sum())
    p = (1 + beyond) / (1 + DRAWS)
    if not beyond:  # so many draws say no more than that, which a correction of 50 scores would find likely
        tail = math.erfc(abs(value) / float(by_chance.std()) / math.sqrt(2)) if by_chance.any() else 0.0
        p = min(p, max(tail, 2 * 0.5**count))
    return Difference(title, score, float(first), float(second), value, low, high, count, p, detectable)


def detectable_errors(alpha: float) -> float:
    """Standard errors that a two-sided test at level `alpha` finds with POWER."""
    normal = NormalDist()
    return normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(POWER)


def holm_corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The differences with Holm's correction of the main scores, in their order; what is detectable is by its first
    and strictest step.
    """
    main = [number for number, one in enumerate(differences) if one.score in MAIN]
    found, least = list(differences), 0.0
    stricter = detectable_errors((1 - LEVEL) / max(1, len(main))) / detectable_errors(1 - LEVEL)
    for rank, number in enumerate(sorted(main, key=lambda number: differences[number].p)):
        one = differences[number]
        least = max(least, min(1.0, one.p * (len(main) - rank)))
        found[number] = replace(one, p=least, detectable=one.detectable * stricter, corrected=True)
    return found
