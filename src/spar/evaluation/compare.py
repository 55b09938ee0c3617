"""Two models on the same prompts: the difference of their scores, paired by prompt.

A prompt that is hard for one model is hard for the other, so that the interval of the difference is that of the
differences of the prompts, and narrower than the two scores' own intervals suggest. Prompts are resampled within their
tasks; an image's seeds stay with its prompt. Holm's correction holds over the main scores of a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spar.common.errors import InputError
from spar.evaluation.results import DRAWS, LEVEL, Result
from spar.evaluation.shapes_vqa import is_right
from spar.evaluation.targets import show_title

POWER_FACTOR = 2.8  # standard errors: what a two-sided test at 5 % finds in 80 % of the cases (1.96 + 0.84)


@dataclass(frozen=True)
class Difference:
    """The second model's score minus the first's.

    Attributes:
        title: the benchmark, with its combinations and label.
        score: "overall", or the name of a task or kind.
        first: the first model's score; `second` the second's.
        value: their difference, from `low` to `high` with 95 % confidence.
        n: prompts.
        p: of no difference, two-sided, by the bootstrap, at least 1 / DRAWS; of main scores after Holm's correction.
        detectable: the difference that this many prompts show in 80 % of the cases.
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

    @property
    def verdict(self) -> str:
        """In words; "undecided" with what could have been seen, where the interval holds 0 or chance may explain it."""
        if self.value and not self.low <= 0 <= self.high and self.p < 1 - LEVEL:
            return "higher" if self.value > 0 else "lower"
        return f"undecided (at least {self.detectable:.2g} would show)"


def units(result: Result) -> dict[str, list[tuple[str, float]]]:
    """The prompts of each task with their outcomes, in order, from the details of a result.

    Raises:
        InputError: a benchmark whose score is no mean over prompts, or a result without details.
    """
    records: list[dict[str, Any]] = next(iter(result.details.values()), [])
    found: dict[str, list[tuple[str, float]]] = {}
    for number, one in enumerate(records):
        outcome = _outcome(result.benchmark, one)
        if outcome is None:
            break
        text = one.get("prompt") or one.get("instruction") or one.get("question") or one.get("questions", number)
        found.setdefault(one.get("task") or one.get("kind") or "overall", []).append((str(text), outcome))
    if not found or sum(map(len, found.values())) != len(records):
        raise InputError(f"{result.benchmark}: expected the outcome of every prompt in the details, found none")
    return found


def _outcome(benchmark: str, record: dict[str, Any]) -> float | None:
    """The outcome of one prompt: a share, or decibels; None where it is no part of a mean."""
    if benchmark == "shapes-paraphrase":
        return None
    if "psnr" in record:
        return float(record["psnr"])
    if "answers" in record:
        return float(is_right(record["answers"][-1], record["expected"][-1]))
    if "answer" in record:
        return float(is_right(record["answer"], record["expected"]))
    return None if "right" not in record else float(np.mean(record["right"]))


def compare(first: Result, second: Result, *, seed: int = 0) -> list[Difference]:
    """The differences of the main score and of each task's.

    Raises:
        InputError: results of other benchmarks, settings or prompts.
    """
    for name in ("benchmark", "combinations", "seed", "images_per_prompt"):
        values = [getattr(one, name, None) or one.settings.get(name) for one in (first, second)]
        if values[0] != values[1]:
            raise InputError(f"expected two results of the same {name}, got {values[0]!r} and {values[1]!r}")
    own, other = units(first), units(second)
    if {name: [text for text, _ in rows] for name, rows in own.items()} != {
        name: [text for text, _ in rows] for name, rows in other.items()
    }:
        counts = [sum(map(len, one.values())) for one in (own, other)]
        raise InputError(
            f"{first.benchmark}: expected two results of the same prompts, got {counts[0]} and {counts[1]}"
        )
    pairs = {
        name: np.array([[was, now] for (_, was), (_, now) in zip(rows, other[name], strict=True)])
        for name, rows in own.items()
    }  # fmt: skip
    score = "psnr" if first.benchmark == "shapes-recon" else "overall"
    found = [_difference(show_title(first), score, [*pairs.values()], seed)]
    if len(pairs) > 1:
        found += [_difference(show_title(first), name, [rows], seed) for name, rows in pairs.items()]
    return found


def _difference(title: str, score: str, groups: Sequence[np.ndarray], seed: int) -> Difference:
    """Of groups of pairs `[n, 2]`, the mean of the groups' means."""
    rng = np.random.default_rng(seed)
    first, second = np.mean([group.mean(0) for group in groups], axis=0)
    changes = [group[:, 1] - group[:, 0] for group in groups]
    drawn = np.mean([
        change[rng.integers(0, len(change), (DRAWS, len(change)))].mean(1) for change in changes
    ], axis=0)  # fmt: skip
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    beyond = min(float((drawn <= 0).mean()), float((drawn >= 0).mean()))
    return Difference(
        title, score, float(first), float(second), float(second - first), float(low), float(high),
        sum(map(len, groups)), min(1.0, max(2 * beyond, 1 / DRAWS)), float(POWER_FACTOR * drawn.std()),
    )  # fmt: skip


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The differences with Holm's correction of the main scores' p, in their order."""
    main = [number for number, one in enumerate(differences) if one.score in ("overall", "psnr")]
    ordered, least = sorted(main, key=lambda number: differences[number].p), 0.0
    found = list(differences)
    for rank, number in enumerate(ordered):
        least = max(least, min(1.0, differences[number].p * (len(main) - rank)))
        found[number] = replace(differences[number], p=least)
    return found
