"""The Fréchet distance between Gaussians fitted to features (FID: Heusel et al., arXiv 1706.08500), of arrays or of
sums that any number of images adds to; and the Inception score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from scipy import stats

from spar.evaluation.results import LEVEL, Score


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features, [N, D] and [M, D]; C = X^T X / N."""
    return gaussian_distance(a.mean(0), np.cov(a.T, ddof=0), b.mean(0), np.cov(b.T, ddof=0))


def gaussian_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The last trace is that of the symmetric (R C_b R)^(1/2), R the root of C_a, so that all eigenvalues are real.
    """
    values, vectors = np.linalg.eigh(np.atleast_2d(cov_a))
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ np.atleast_2d(cov_b) @ root).clip(0)).sum()
    spread = np.trace(np.atleast_2d(cov_a)) + np.trace(np.atleast_2d(cov_b))
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + spread - 2 * overlap))


@dataclass(frozen=True)
class FeatureSums:
    """The number of images, the sum of their features [D] and of the features' outer products [D, D], in float64."""

    count: int
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> FeatureSums:
        """The sums of features [N, D]."""
        values = features.astype(np.float64)
        return cls(len(values), values.sum(0), values.T @ values)

    def __add__(self, other: FeatureSums) -> FeatureSums:
        return FeatureSums(self.count + other.count, self.first + other.first, self.second + other.second)

    def gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean and the unbiased covariance."""
        mean = self.first / self.count
        return mean, (self.second - self.count * np.outer(mean, mean)) / max(1, self.count - 1)


def distance_of_sums(a: FeatureSums, b: FeatureSums) -> float:
    """The distance of two sets of features by their sums, with unbiased covariances as published FIDs have them."""
    return gaussian_distance(*a.gaussian(), *b.gaussian())


@dataclass(frozen=True)
class ClassSums:
    """The number of images, the sum of their classes' probabilities [C], and of sum p log p."""

    count: int
    probabilities: np.ndarray
    information: float

    @classmethod
    def of(cls, logits: np.ndarray) -> ClassSums:
        """The sums of logits [N, C]."""
        values = logits.astype(np.float64)
        logs = values - values.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        chances = np.exp(logs)
        return cls(len(values), chances.sum(0), float((chances * logs).sum()))

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(
            self.count + other.count, self.probabilities + other.probabilities, self.information + other.information
        )


def inception_score(sums: ClassSums) -> float:
    """The Inception score of all images together: exp E KL(p(c given x), p(c)) (Salimans et al., arXiv 1606.03498)."""
    marginal = sums.probabilities / sums.count
    positive = marginal[marginal > 0]
    return float(np.exp(sums.information / sums.count - (positive * np.log(positive)).sum()))


def jackknife_score(name: str, statistic: Callable[..., float], groups: Sequence[tuple[Any, ...]], count: int) -> Score:
    """A statistic of sums over groups of images, with the interval of the jackknife that leaves out a group at a time.

    Args:
        statistic: of the sums, one argument for each entry of a group.
        groups: of each group its sums; at least two.
        count: images.
    """
    value = statistic(*_total(groups))
    left = np.array([statistic(*_total([*groups[:i], *groups[i + 1 :]])) for i in range(len(groups))])
    error = float(np.sqrt((len(groups) - 1) * left.var()))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(groups) - 1)) * error
    return Score(name, value, max(0.0, value - half), value + half, count)


def _total(groups: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [reduce(add, sums) for sums in zip(*groups, strict=True)]
