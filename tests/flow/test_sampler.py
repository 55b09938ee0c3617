import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from spar.common.errors import Cancelled, InputError
from spar.flow.path import shift_time
from spar.flow.sampler import METHODS, FlowSampler

MEAN, STD = 0.7, 0.5


def noise(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def sample(velocity, noise, *, num_inference_steps=20, callback=None, **settings) -> torch.Tensor:
    """The latents of a batch that begins and ends together."""
    sampler = FlowSampler(**settings)
    sampler.join(noise, num_inference_steps)
    sampler.run(velocity, callback)
    return sampler.latents(range(len(noise)))


def gaussian_velocity(x, t):
    """E[eps - x_0 | x_t] for data N(MEAN, STD^2), in closed form."""
    t = t.reshape(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def error(method: str, steps: int, **kwargs) -> float:
    """Largest distance from the ODE's exact end: it keeps the z-score, so noise z arrives at MEAN + STD z."""
    latent = sample(gaussian_velocity, noise(), num_inference_steps=steps, method=method, **kwargs)
    return (latent - (MEAN + STD * noise())).abs().max().item()


def test_euler_equals_a_loop_by_hand_over_shifted_sigmas():
    steps, shift = 12, 3.0
    sigmas = [shift_time(i / steps, shift) for i in range(steps, -1, -1)]
    sigmas = torch.from_numpy(np.array(sigmas)).float()
    x = noise()
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (after - now) * gaussian_velocity(x, now.expand(3))
    latent = sample(gaussian_velocity, noise(), num_inference_steps=steps, shift=shift, method="euler")
    torch.testing.assert_close(latent, x, rtol=1e-6, atol=1e-6)


def test_euler_converges_at_first_order():
    assert error("euler", 80) == pytest.approx(error("euler", 40) / 2, rel=0.1)
    assert error("euler", 640) < 0.01


def test_dpmsolver_converges_and_beats_euler_at_equal_steps():
    assert error("dpmsolver++", 20) < error("euler", 20) / 4
    assert error("dpmsolver++", 40) < 0.02
    assert error("dpmsolver++", 320) < 0.004


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_straight_path_to_one_point_is_exact_in_any_number_of_steps(method, steps):
    def velocity(x, t):
        return (x - 0.3) / t.reshape(-1, 1, 1, 1)

    latent = sample(velocity, noise(), num_inference_steps=steps, method=method)
    torch.testing.assert_close(latent, torch.full_like(latent, 0.3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_the_network_is_asked_at_the_shifted_times(method, shift):
    asked = []

    def velocity(x, t):
        asked.append(t.clone())
        return torch.zeros_like(x)

    latent = sample(velocity, noise(), num_inference_steps=5, shift=shift, method=method)
    assert all(torch.equal(t, t[:1].expand(3)) for t in asked)
    first = 0.999 if method == "dpmsolver++" else 1.0  # diffusers keeps a thousandth away from an infinite log-SNR
    expected = [shift_time(first * i / 5, shift) for i in range(5, 0, -1)]
    np.testing.assert_allclose([t[0].item() for t in asked], expected, atol=1e-6)
    if method == "euler":
        assert torch.equal(latent, noise())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [1e-3, 1e3])
def test_the_limits_of_the_shift_stay_finite(method, shift):
    for steps in (1, 3, 200):
        assert (
            sample(gaussian_velocity, noise(1), num_inference_steps=steps, shift=shift, method=method).isfinite().all()
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_latent_does_not_depend_on_its_batch(method):
    together = sample(gaussian_velocity, noise(), method=method)
    alone = [sample(gaussian_velocity, noise()[i : i + 1], method=method) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_state_stays_float32_under_a_bfloat16_network(method):
    seen = []

    def velocity(x, t):
        seen.append((x.dtype, t.dtype))
        return gaussian_velocity(x, t).bfloat16()

    latent = sample(velocity, noise().bfloat16(), num_inference_steps=4, method=method)
    assert latent.dtype == torch.float32 and set(seen) == {(torch.float32, torch.float32)}
    assert not torch.equal(latent, latent.bfloat16().float())


def test_no_gradients_are_kept():
    weight = torch.ones((), requires_grad=True)
    latent = sample(lambda x, t: weight * gaussian_velocity(x, t), noise(), num_inference_steps=3)
    assert not latent.requires_grad


def test_the_callback_sees_every_step_and_the_last_latent():
    calls = []
    latent = sample(
        gaussian_velocity,
        noise(),
        num_inference_steps=4,
        callback=lambda step, steps, x: calls.append((step, steps, x)),
    )
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(calls[-1][2], latent) and not torch.equal(calls[0][2], latent)


@pytest.mark.parametrize("method", METHODS)
def test_the_callback_gets_the_clean_estimate_not_the_noisy_state(method):
    """On straight paths to one point every step's estimate is the point, however noisy the state still is."""
    seen = []
    sample(
        lambda x, t: (x - 0.3) / t.reshape(-1, 1, 1, 1), noise(), num_inference_steps=5, method=method,
        callback=lambda step, steps, estimate: seen.append(estimate),
    )
    assert len(seen) == 5
    for estimate in seen:
        torch.testing.assert_close(estimate, torch.full_like(estimate, 0.3), rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_callback_may_change_the_estimate_in_place(method):
    def spoil(done, steps, estimate):
        estimate.fill_(7)

    own = sample(gaussian_velocity, noise(), num_inference_steps=5, method=method)
    assert torch.equal(sample(gaussian_velocity, noise(), num_inference_steps=5, method=method, callback=spoil), own)


@pytest.mark.parametrize("method", METHODS)
def test_no_samples_are_none_afterwards(method):
    assert sample(gaussian_velocity, noise()[:0], num_inference_steps=3, method=method).shape == (0, 2, 4, 4)


def test_only_false_itself_cancels():
    asked = []

    def velocity(x, t):
        asked.append(t)
        return gaussian_velocity(x, t)

    with pytest.raises(Cancelled, match="after 2 of 9"):
        sample(velocity, noise(), num_inference_steps=9, callback=lambda step, *_: step < 2)
    assert len(asked) == 2
    sample(velocity, noise(), num_inference_steps=2, callback=lambda *_: 0)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "20", None, True])
def test_a_bad_number_of_steps_raises(steps):
    with pytest.raises(InputError, match="num_inference_steps is expected"):
        sample(gaussian_velocity, noise(), num_inference_steps=steps)


@pytest.mark.parametrize("shift", [0, -1.0, float("nan"), float("inf"), 1e4, None, "3"])
def test_a_bad_shift_raises(shift):
    with pytest.raises(InputError, match="shift is expected"):
        sample(gaussian_velocity, noise(), shift=shift)


def test_an_unknown_method_raises_and_names_the_known():
    with pytest.raises(InputError, match=r"dpmsolver\+\+, euler, got 'heun'"):
        sample(gaussian_velocity, noise(), method="heun")


def test_a_velocity_that_would_broadcast_raises():
    with pytest.raises(ValueError, match="expected a velocity of shape"):
        sample(lambda x, t: x[:, :1], noise())


@pytest.mark.slow
def test_importing_the_sampler_does_not_import_diffusers():
    code = "import sys, spar.flow.sampler; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- samples that join and leave between steps -----------------------------------------------------------------------


def reference(method: str, steps: int, shift: float) -> Any:
    """diffusers' own scheduler at its first step."""
    if method == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[i / steps for i in range(steps, 0, -1)])
    else:
        scheduler = DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift,
            solver_order=2, solver_type="midpoint", lower_order_final=True, final_sigmas_type="zero",
        )
        scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0, 1e-3, 1e3])
def test_a_step_is_that_of_diffusers_to_the_bit(method, steps, shift):
    scheduler, x = reference(method, steps, shift), noise()
    for i, timestep in enumerate(scheduler.timesteps):
        v = gaussian_velocity(x, scheduler.sigmas[i].expand(3))
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    assert torch.equal(sample(gaussian_velocity, noise(), num_inference_steps=steps, shift=shift, method=method), x)


def alone(method: str, row: int, steps: int) -> torch.Tensor:
    return sample(gaussian_velocity, noise()[row : row + 1], num_inference_steps=steps, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_who_joins_later_with_other_steps_and_who_leaves_change_nothing_for_the_rest(method):
    sampler, times, got = FlowSampler(method=method), [], {}

    def velocity(x, t):
        times.append(t.tolist())
        return gaussian_velocity(x, t)

    sampler.join(noise()[:1], 8)
    names = ["first"]
    for step in range(1, 12):
        estimates = sampler.step(velocity)
        assert estimates.shape[0] == len(names)
        for row in sampler.finished:
            got[names[row]] = step, sampler.latents([row])
            assert torch.equal(estimates[row], got[names[row]][1][0])
        kept = [row for row in range(len(sampler)) if row not in sampler.finished]
        sampler.keep(kept)
        names = [names[row] for row in kept]
        if step == 3:
            sampler.join(noise()[1:], [4, 8])
            names += ["short", "last"]
        if step == 5:
            sampler.join(noise()[:1], 9)
            names.append("cancelled")
        if step == 6:
            row = names.index("cancelled")
            sampler.keep([number for number in range(len(sampler)) if number != row])
            names.remove("cancelled")
    assert {name: step for name, (step, _) in got.items()} == {"first": 8, "short": 7, "last": 11}
    assert len(times) == 11 and len(sampler) == 0  # calls of the network; one after the other would be 20
    assert [len(row) for row in times] == [1, 1, 1, 3, 3, 4, 3, 2, 1, 1, 1]
    for row, (name, steps) in enumerate((("first", 8), ("short", 4), ("last", 8))):
        torch.testing.assert_close(got[name][1], alone(method, row, steps), rtol=0, atol=1e-6)


def test_what_fails_leaves_the_samples_as_they_were():
    sampler = FlowSampler()
    with pytest.raises(ValueError, match="expected samples"):
        sampler.step(gaussian_velocity)
    with pytest.raises(ValueError, match="expected samples"):
        sampler.latents([])
    sampler.join(noise(), 2)
    sampler.step(gaussian_velocity)
    before = sampler.latents(range(3))
    with pytest.raises(InputError, match="num_inference_steps is expected"):
        sampler.join(noise(), [2, 0, 2])
    with pytest.raises(ValueError, match="for each of 3 samples, got 2"):
        sampler.join(noise(), [2, 2])
    with pytest.raises(RuntimeError, match="lost"):
        sampler.step(lambda x, t: (_ for _ in ()).throw(RuntimeError("lost")))
    assert torch.equal(sampler.latents(range(3)), before) and (sampler.done, sampler.steps) == ([1] * 3, [2] * 3)
    sampler.step(gaussian_velocity)
    torch.testing.assert_close(sampler.latents([2]), sample(gaussian_velocity, noise()[2:], num_inference_steps=2))
    with pytest.raises(ValueError, match="got 3, 3 finished"):
        sampler.step(gaussian_velocity)
