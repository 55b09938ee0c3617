"""Scores with their intervals, results files, and the bootstrap of the intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spar.common.config import from_dict, read_json, to_dict
from spar.common.errors import InputError
from spar.common.files import atomic_file

DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Score:
    """A measured value, its 95 % interval, and its number of units (prompts, questions, images)."""

    name: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Result:
    """The result of one run of one benchmark.

    Names of scores: the task or kind, "overall", and others with a prefix: "part." (diagnostics), "blind." and "gray."
    (baselines). `settings` describes the measurement, `details` has the outcome of each prompt.
    """

    benchmark: str
    scores: tuple[Score, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def score(self, name: str) -> Score:
        """The score of a name; KeyError lists the known names."""
        for score in self.scores:
            if score.name == name:
                return score
        raise KeyError(f"no score {name!r} in {self.benchmark}; there are {[score.name for score in self.scores]}")


def write_result(path: str | Path, result: Result) -> None:
    """Write a result as JSON, under a temporary name, then rename it; its folder is created.

    Raises:
        InputError: the file cannot be written.
        ValueError: a score is not finite, which JSON cannot express.
    """
    text = json.dumps(to_dict(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with atomic_file(Path(path)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the results file {path}: {error.strerror or error}") from error


def shown_path(path: Path) -> str:
    """A path as a results file has it; bytes of old file names that are no text become question marks."""
    return path.as_posix().encode("utf-8", "replace").decode()


def read_result(path: str | Path) -> Result:
    """Read a file of `write_result`; a missing, damaged or foreign one raises `InputError`."""
    path = Path(path)
    return from_dict(Result, read_json(path), str(path))


def bootstrap(
    statistic: Callable[..., float], *counts: int, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """The percentile interval of a statistic under resampling with replacement.

    Args:
        statistic: takes one array of indices per group, returns the value on those units.
        counts: the number of units of each group; groups are resampled separately (stratified).
        seed: of the resampling.
        draws: number of resamples.

    Returns:
        The 2.5th and the 97.5th percentile of the drawn values.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(*(rng.integers(0, count, count) for count in counts)) for _ in range(draws)]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_score(
    name: str, *groups: Sequence[float] | np.ndarray, seed: int = 0, weights: Sequence[float] | None = None,
    scale: tuple[float, float] = (0.0, 1.0),
) -> Score:  # fmt: skip
    """The mean of the groups' means, each group an array of one value per unit; groups are resampled separately.

    `weights` of the groups, whose sum is 1, are equal by default; `scale` is the least and the highest value that there
    is, at which all units are alike.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or any(len(array) == 0 for array in arrays):
        raise ValueError(f"{name}: expected at least one value in every group")

    def statistic(*indices: np.ndarray) -> float:
        means = [array[index].mean() for array, index in zip(arrays, indices, strict=True)]
        return float(np.mean(means) if weights is None else np.dot(weights, means))

    return _resampled(name, statistic, *map(len, arrays), seed=seed, scale=scale)


def ratio_score(name: str, parts: Sequence[float], wholes: Sequence[float], *, seed: int = 0) -> Score:
    """Sum of parts over sum of wholes (0 of nothing), one pair per unit, resampled by unit."""
    above, below = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)

    def statistic(index: np.ndarray) -> float:
        whole = below[index].sum()
        return float(above[index].sum() / whole) if whole else 0.0

    alike = not above.any() or bool((above == below).all())
    return _resampled(name, statistic, len(above), seed=seed, alike=alike)


def _resampled(
    name: str, statistic: Callable[..., float], *counts: int, seed: int, alike: bool = True,
    scale: tuple[float, float] = (0.0, 1.0),
) -> Score:  # fmt: skip
    """A statistic of all units with its interval: the bootstrap's, or the exact one (Clopper-Pearson) if all units are
    right or all wrong, where the bootstrap's has length 0; `alike`: whether a value at an end of the scale says so.
    """
    value, count = statistic(*map(np.arange, counts)), sum(counts)
    chance = ((1 - LEVEL) / 2) ** (1 / count)
    (least, most), reach = scale, (1 - chance) * (scale[1] - scale[0])
    exact = {least: (least, least + reach), most: (most - reach, most)}.get(value)
    low, high = (alike and exact) or bootstrap(statistic, *counts, seed=seed)
    return Score(name, value, low, high, count)
