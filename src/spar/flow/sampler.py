"""Sampling: the flow's ODE from noise (t = 1) to a clean latent (t = 0), through diffusers' schedulers.

One function has two methods: `dpmsolver++` is SANA's scheduler (DPM-Solver++ of order 2, midpoint, lower order at
the end, last sigma zero, flow sigmas with `flow_shift`); `euler` is the plain Euler step.

Deliberate departures from a naive use of the same classes:
- The shift goes to `shift` in one class and to `flow_shift` in the other; a configuration of one, loaded into the
  other, silently samples with shift 1. Both are built here from one argument.
- `FlowMatchEulerDiscreteScheduler.set_timesteps(n)` shifts the times twice, because it starts from limits that are
  already shifted, and ends on a step of almost no length. Here it gets the unshifted sigmas n/n, (n-1)/n ... 1/n.
- `DPMSolverMultistepScheduler` truncates its times to whole thousandths. The network gets the exact sigma.
  Its first sigma is 0.999 before the shift, where the noise is used as x_t: the log-SNR is infinite at sigma 1.
"""

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spar.common.errors import Cancelled, InputError

METHODS = ("dpmsolver++", "euler")
MIN_SHIFT, MAX_SHIFT = 1e-3, 1e3  # beyond these, float32 cannot tell neighbouring sigmas from 0 or 1

Velocity = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, int, Tensor], object]


def sample(
    velocity: Velocity,
    noise: Tensor,
    *,
    num_inference_steps: int = 20,
    shift: float = 3.0,
    method: str = "dpmsolver++",
    callback: Callback | None = None,
) -> Tensor:
    """Integrates dx/dt = velocity(x, t) from `noise` [B, ...] at t = 1 to a float32 latent [B, ...] at t = 0.

    velocity: gets x [B, ...] and t [B] in float32, t falling from 1 towards 0; returns [B, ...] in any floating type.
        It is called once per step, without gradients.
    callback: called after each step with (steps done, total steps, estimate): this step's estimate of the clean latent,
        x - t * velocity(x, t), and after the last step the result itself. False, exactly, raises `Cancelled`.
    Raises InputError for a number of steps below 1, a shift outside [MIN_SHIFT, MAX_SHIFT], an unknown method.
    """
    scheduler = _build_scheduler(_checked_steps(num_inference_steps), _checked_shift(shift), method)
    steps = len(scheduler.timesteps)
    x = noise.to(torch.float32)
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            t = torch.full((x.shape[0],), float(scheduler.sigmas[i]), dtype=torch.float32, device=x.device)
            v = velocity(x, t)
            if v.shape != x.shape:
                raise ValueError(f"expected a velocity of shape {tuple(x.shape)}, got {tuple(v.shape)}")
            before, v = x, v.to(torch.float32)
            x = scheduler.step(v, timestep, x, return_dict=False)[0]
            estimate = x if i + 1 == steps else before - float(scheduler.sigmas[i]) * v
            if callback is not None and callback(i + 1, steps, estimate) is False:
                raise Cancelled(f"sampling was cancelled after {i + 1} of {steps} steps")
    return x


def euler_times(steps: int, shift: float) -> Tensor:
    """The times `[steps + 1]` of Euler's method, float32, from 1 to 0; those of twice as many steps hold them all.

    Raises InputError as `sample`.
    """
    return _build_scheduler(_checked_steps(steps), _checked_shift(shift), "euler").sigmas.to(torch.float32)


def _checked_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
        raise InputError(f"num_inference_steps is expected to be a whole number of at least 1, got {steps!r}")
    return int(steps)


def _checked_shift(shift: float) -> float:
    if not isinstance(shift, numbers.Real) or not MIN_SHIFT <= shift <= MAX_SHIFT:  # NaN is in no range
        raise InputError(f"shift is expected to be between {MIN_SHIFT:g} and {MAX_SHIFT:g}, got {shift!r}")
    return float(shift)


def _build_scheduler(steps: int, shift: float, method: str) -> Any:
    """Build a scheduler with its sigmas on the CPU, at the first step."""
    scheduler: Any  # diffusers' classes share no typed interface
    if method == "dpmsolver++":
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift,
            solver_order=2, solver_type="midpoint", lower_order_final=True, final_sigmas_type="zero",
        )
        scheduler.set_timesteps(steps, device="cpu")
    elif method == "euler":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[i / steps for i in range(steps, 0, -1)], device="cpu")
    else:
        raise InputError(f"method is expected to be one of {', '.join(METHODS)}, got {method!r}")
    scheduler.set_begin_index(0)  # by index: looking a time up fails if two truncate to the same thousandth
    return scheduler
