"""Sampling: the flow's ODE from noise (t = 1) to a clean latent (t = 0).

`FlowSampler` integrates dx/dt = velocity(x, t), for samples that may be at different steps of different schedules.
There are two methods: `dpmsolver++` is SANA's scheduler (DPM-Solver++, arXiv 2211.01095, of order 2, midpoint, first
order at both ends, flow sigmas with a shift); `euler` is the plain Euler step. Times are those of diffusers'
schedulers, and a step is theirs to the bit (tests/flow/test_sampler.py); only their objects, which hold one step for a
whole batch, are not used for it.

Deliberate departures from a naive use of the same classes:
- The shift goes to `shift` in one class and to `flow_shift` in the other; a configuration of one, loaded into the
  other, silently samples with shift 1. Both are built here from one argument.
- `FlowMatchEulerDiscreteScheduler.set_timesteps(n)` shifts the times twice, because it starts from limits that are
  already shifted, and ends on a step of almost no length. Here it gets the unshifted sigmas n/n, (n-1)/n ... 1/n.
- `DPMSolverMultistepScheduler` truncates its times to whole thousandths. The network gets the exact sigma.
  Its first sigma is 0.999 before the shift, where the noise is used as x_t: the log-SNR is infinite at sigma 1.
"""

import numbers
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from spar.common.errors import Cancelled, InputError

METHODS = ("dpmsolver++", "euler")
MIN_SHIFT, MAX_SHIFT = 1e-3, 1e3  # beyond these, float32 cannot tell neighbouring sigmas from 0 or 1

Velocity = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, int, Tensor], object]
Step = tuple[float, ...]  # of a schedule: the time, then the coefficients of its method, all in float32's numbers


class FlowSampler:
    """Samples on their way from noise to clean latents, each at its own step of its own number of steps.

    Samples join and leave between two steps; what becomes of one does not depend on the others. Rows are in the order
    of joining.

    Raises InputError for a shift outside [MIN_SHIFT, MAX_SHIFT] or an unknown method.

    Attributes:
        done: steps done, of each row.
        steps: steps in all, of each row.
    """

    def __init__(self, *, shift: float = 3.0, method: str = "dpmsolver++") -> None:
        if method not in METHODS:
            raise InputError(f"method is expected to be one of {', '.join(METHODS)}, got {method!r}")
        self._shift, self._method = _checked_shift(shift), method
        self.done: list[int] = []
        self.steps: list[int] = []
        self._state: tuple[Tensor, Tensor] | None = None  # latents, and the estimates of the clean ones one step ago

    def __len__(self) -> int:
        return len(self.done)

    @property
    def times(self) -> list[float]:
        """The time of the next step of each row that has one, from 1 towards 0."""
        return [row[0] for row in self._schedule()]

    @property
    def finished(self) -> list[int]:
        """The rows whose latents are clean."""
        return [row for row, (done, steps) in enumerate(zip(self.done, self.steps, strict=True)) if done == steps]

    def join(self, noise: Tensor, steps: int | Sequence[int]) -> None:
        """Append samples: their noise `[B, ...]`, and the steps that they are to take, one number or one for each.

        Raises InputError for a number of steps below 1; then nothing has joined.
        """
        each = steps if isinstance(steps, Sequence) and not isinstance(steps, str) else [steps] * len(noise)
        counts = [_checked_steps(count) for count in each]
        if len(counts) != len(noise):
            raise ValueError(f"expected a number of steps for each of {len(noise)} samples, got {len(counts)}")
        x = noise.to(torch.float32)
        joined = x, torch.zeros_like(x)
        if self._state is not None:
            joined = torch.cat([self._state[0], joined[0]]), torch.cat([self._state[1], joined[1]])
        self._state = joined
        self.done += [0] * len(counts)
        self.steps += counts

    def step(self, velocity: Velocity) -> Tensor:
        """Advance every sample by one step; returns the estimates `[B, ...]` of the clean latents.

        An estimate is this step's, x - t * velocity(x, t), and after a sample's last step its clean latent.

        velocity: gets x `[B, ...]` and the time of each row, t `[B]`, in float32; returns `[B, ...]` in any floating
            type. It is called once, without gradients.
        """
        if self._state is None or self.finished:
            raise ValueError(f"expected samples that have steps left, got {len(self)}, {len(self.finished)} finished")
        x, before = self._state
        table = torch.tensor([*zip(*self._schedule(), strict=True)], dtype=torch.float32)
        table = table.to(x.device, non_blocking=x.is_cuda)                                # no wait for the step before
        time, *factors = table.view(len(table), -1, *[1] * (x.ndim - 1))                  # [B, 1, ..., 1] each
        with torch.no_grad():
            v = velocity(x, table[0])
            if v.shape != x.shape:
                raise ValueError(f"expected a velocity of shape {tuple(x.shape)}, got {tuple(v.shape)}")
            v = v.to(torch.float32)
            clean = x - time * v
            x = _euler(x, v, *factors) if self._method == "euler" else _solve(x, clean, before, *factors)
        self._state = x, clean
        self.done = [done + 1 for done in self.done]
        estimate, last = clean.clone(), self.finished  # the caller's own: the next step reads `clean`
        if last:
            estimate[last] = x[last]
        return estimate

    def latents(self, rows: Sequence[int]) -> Tensor:
        """The latents of rows, float32 `[rows, ...]`: clean ones of finished rows."""
        if self._state is None:
            raise ValueError("expected samples, got none")
        return self._state[0][list(rows)]

    def keep(self, rows: Sequence[int]) -> None:
        """Let all rows but these leave, finished or not."""
        if self._state is not None:
            kept = self._state[0][list(rows)], self._state[1][list(rows)]
            self._state = kept if rows else None
            self.done, self.steps = [self.done[row] for row in rows], [self.steps[row] for row in rows]

    def run(self, velocity: Velocity, callback: Callback | None = None) -> None:
        """Step until all have arrived, which joined at once with one number of steps.

        velocity: as in `step`.
        callback: called after each step with (steps done, total steps, what `step` returned). False, exactly, raises
            `Cancelled`.
        """
        while len(self.finished) < len(self):
            estimate = self.step(velocity)
            done, steps = self.done[0], self.steps[0]
            if callback is not None and callback(done, steps, estimate) is False:
                raise Cancelled(f"sampling was cancelled after {done} of {steps} steps")

    def _schedule(self) -> list[Step]:
        """The next step of each row that has one."""
        return [
            _schedule(steps, self._shift, self._method)[done]
            for done, steps in zip(self.done, self.steps, strict=True) if done < steps
        ]  # fmt: skip


def euler_times(steps: int, shift: float) -> Tensor:
    """The times `[steps + 1]` of Euler's method, float32, from 1 to 0; those of twice as many steps hold them all.

    Raises InputError for a number of steps below 1, and as `FlowSampler` for a shift.
    """
    return _times(_checked_steps(steps), _checked_shift(shift), "euler")


def _checked_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
        raise InputError(f"num_inference_steps is expected to be a whole number of at least 1, got {steps!r}")
    return int(steps)


def _checked_shift(shift: float) -> float:
    if not isinstance(shift, numbers.Real) or not MIN_SHIFT <= shift <= MAX_SHIFT:  # NaN is in no range
        raise InputError(f"shift is expected to be between {MIN_SHIFT:g} and {MAX_SHIFT:g}, got {shift!r}")
    return float(shift)


def _euler(x: Tensor, v: Tensor, length: Tensor) -> Tensor:
    return x + length * v


def _solve(
    x: Tensor, clean: Tensor, before: Tensor, ratio: Tensor, decay: Tensor, half: Tensor, rate: Tensor
) -> Tensor:
    """One step of DPM-Solver++ in the order of diffusers' operations; `half` and `rate` are 0 in one of first order."""
    return ratio * x - decay * clean - half * (rate * (clean - before))


@lru_cache(maxsize=256)
def _schedule(steps: int, shift: float, method: str) -> tuple[Step, ...]:
    """The time and the coefficients of each step."""
    times = _times(steps, shift, method)
    if method == "euler":
        return tuple((float(now), float(then - now)) for now, then in pairwise(times))
    return tuple((float(times[i]), *_coefficients(times, i)) for i in range(steps))


def _coefficients(times: Tensor, i: int) -> tuple[float, ...]:
    """`ratio`, `decay`, `half` and `rate` of step i, by diffusers' own operations on single numbers of float32."""

    def log_snr(t: Tensor) -> Tensor:
        return torch.log(1 - t) - torch.log(t)

    now, then = times[i], times[i + 1]
    h = log_snr(then) - log_snr(now)
    ratio, decay = then / now, (1 - then) * (torch.exp(-h) - 1.0)
    if i in (0, len(times) - 2):  # of first order: nothing lies before, or the last time is 0, where h is infinite
        return float(ratio), float(decay), 0.0, 0.0
    r = (log_snr(now) - log_snr(times[i - 1])) / h
    return float(ratio), float(decay), float(0.5 * decay), float(1.0 / r)


def _times(steps: int, shift: float, method: str) -> Tensor:
    """The times `[steps + 1]` of a method, float32 on the CPU, from 1 or a little less to 0."""
    scheduler: Any  # diffusers' classes share no typed interface
    if method == "dpmsolver++":
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero")
        scheduler.set_timesteps(steps, device="cpu")
    else:
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[i / steps for i in range(steps, 0, -1)], device="cpu")
    times: Tensor = scheduler.sigmas.to(torch.float32)
    return times
