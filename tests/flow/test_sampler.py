import subprocess
import sys

import numpy as np
import pytest
import torch

from spar.common.errors import Cancelled, InputError
from spar.flow.path import shift_time
from spar.flow.sampler import METHODS, sample

MEAN, STD = 0.7, 0.5


def noise(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(0))


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
