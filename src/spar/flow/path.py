"""Rectified flow's straight path, its times and its targets (SPAR section 2, point 5).

    x_t = (1 - t) x + t eps          t = 0 is the clean sample x, t = 1 the noise eps
    v   = d x_t / d t = eps - x      the target of L_fm

so that x = x_t - t v and eps = x_t + (1 - t) v. The shift of SANA and SD3 is t -> s t / (1 + (s - 1) t): it fixes 0 and
1 and spends more time near the noise for s > 1. Training and sampling each have their own, always explicit shift.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from spar.common.checks import check_pair

Time = TypeVar("Time", float, Tensor)


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """Reshape times [B] to [B, 1, ..., 1] for x [B, ...]; a time of zero dimensions is unchanged, and so are times of
    as many dimensions as x, such as one for each cell: [B, 1, h, w].
    """
    if t.ndim == 0 or (t.ndim == x.ndim > 1 and all(a in (1, b) for a, b in zip(t.shape, x.shape, strict=True))):
        return t
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(f"expected one time for each of {x.shape[0]} samples, got times of shape {tuple(t.shape)}")
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t noise, for x and noise [B, ...] and times t in [0, 1]: [B], or as `per_sample` has them.

    Types promote as in torch: a bfloat16 x with float32 times gives float32.
    """
    check_pair("x", x, "noise", noise)
    t = per_sample(t, x)
    return (1 - t) * x + t * noise


def velocity_target(x: Tensor, noise: Tensor) -> Tensor:
    """Compute v = noise - x, the same at every time of the path."""
    check_pair("x", x, "noise", noise)
    return noise - x


def shift_time(t: Time, shift: float) -> Time:
    """Shift times in [0, 1] to s t / (1 + (s - 1) t), towards the noise for s > 1; a shift by 1 / s undoes it."""
    if not shift > 0:
        raise ValueError(f"expected a shift above 0, got {shift}")
    return shift * t / (1 + (shift - 1) * t)


def sample_time(
    shape: int | Sequence[int],
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sample training times: sigmoid(mean + std * n) with n normal, then shifted; of the given shape, in (0, 1).

    They are sampled in float32 on the generator's device, so one seed gives the same times on every device and type.
    """
    if not std >= 0:
        raise ValueError(f"expected a standard deviation of 0 or more, got {std}")
    source = generator.device if generator is not None else device
    normal = torch.randn(shape, generator=generator, device=source, dtype=torch.float32)
    return shift_time(torch.sigmoid(mean + std * normal), shift).to(device=device, dtype=dtype)
