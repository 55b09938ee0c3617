"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) on velocities: v_u + scale (v_c - v_u)."""

import math
from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from spar.common.checks import check_pair
from spar.common.errors import InputError

Interval = tuple[float, float]
SLACK = 1e-6


def apply_guidance(conditional: Tensor, unconditional: Tensor | None, scale: float | Tensor) -> Tensor:
    """The guided velocity; both branches have one shape, which a tensor of scales can be broadcast to.

    Scale 1 returns the conditional tensor itself, and then the unconditional branch need not exist: a caller may skip
    its computation. Scale 0 is the unconditional branch.
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return conditional
    if unconditional is None:
        raise ValueError(f"expected an unconditional branch for guidance scale {scale}, got None")
    check_pair("the conditional branch", conditional, "the unconditional branch", unconditional)
    return unconditional + scale * (conditional - unconditional)


def check_interval(interval: Sequence[float] | None) -> Interval | None:
    """The first and the last time at which guidance applies (Kynkaanniemi et al., arXiv 2404.07724), or None: always.

    Times are of the flow, 1 is noise. Raises InputError unless 0 <= first <= last <= 1.
    """
    if interval is None:
        return None
    values = tuple(interval) if isinstance(interval, Sequence) and not isinstance(interval, str) else ()
    whole = len(values) == 2 and all(isinstance(v, Real) and not isinstance(v, bool) for v in values)
    if not whole or not all(map(math.isfinite, values)) or not 0 <= values[0] <= values[1] <= 1:
        raise InputError(f"guidance_interval: expected two times, 0 <= first <= last <= 1, got {interval!r}")
    return float(values[0]), float(values[1])


def is_guided(time: float, interval: Interval | None) -> bool:
    """Whether guidance applies at a time, which has float32's precision: both ends belong to the interval."""
    return interval is None or interval[0] - SLACK <= time <= interval[1] + SLACK
