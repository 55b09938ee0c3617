import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spar.flow.path import interpolate, sample_time, shift_time, velocity_target

SHIFTS = st.floats(0.1, 20)
TIMES = st.floats(0, 1)


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=generator).unbind(0)


def test_the_path_runs_from_the_sample_to_the_noise():
    x, noise = pair()
    assert torch.equal(interpolate(x, noise, torch.zeros(5)), x)
    assert torch.equal(interpolate(x, noise, torch.ones(5)), noise)


def test_each_sample_has_its_own_time():
    x, noise = pair()
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    together = interpolate(x, noise, t)
    for i in range(5):
        assert torch.equal(together[i], (1 - t[i]) * x[i] + t[i] * noise[i])


def test_the_target_is_the_derivative_of_the_path():
    x, noise = pair()
    derivative = torch.autograd.functional.jvp(
        lambda t: interpolate(x, noise, t), torch.full((5,), 0.3, dtype=torch.float64), torch.ones(5).double()
    )[1]
    torch.testing.assert_close(derivative, velocity_target(x, noise), rtol=0, atol=1e-14)


@given(t=TIMES, seed=st.integers(0, 99))
def test_a_velocity_leads_back_to_both_ends(t, seed):
    x, noise = pair(seed)
    x_t, v = interpolate(x, noise, torch.full((5,), t, dtype=torch.float64)), velocity_target(x, noise)
    torch.testing.assert_close(x_t - t * v, x, rtol=0, atol=1e-13)
    torch.testing.assert_close(x_t + (1 - t) * v, noise, rtol=0, atol=1e-13)


@given(t=TIMES, shift=SHIFTS)
def test_the_inverse_shift_undoes_a_shift(t, shift):
    assert shift_time(shift_time(t, shift), 1 / shift) == pytest.approx(t, abs=1e-12)


@given(t=TIMES, first=SHIFTS, second=SHIFTS)
def test_shifts_compose_by_multiplication(t, first, second):
    assert shift_time(shift_time(t, first), second) == pytest.approx(shift_time(t, first * second), abs=1e-12)


@given(shift=SHIFTS)
def test_shifting_keeps_the_ends_and_moves_the_middle_to_s_over_one_plus_s(shift):
    assert shift_time(0.0, shift) == 0
    assert shift_time(1.0, shift) == pytest.approx(1, abs=1e-15)
    assert shift_time(0.5, shift) == pytest.approx(shift / (1 + shift))


@pytest.mark.parametrize("mean, std, shift", [(0.0, 1.0, 1.0), (0.0, 1.0, 3.0), (-0.5, 0.7, 2.0)])
def test_times_are_logit_normal_after_unshifting(mean, std, shift):
    generator = torch.Generator().manual_seed(0)
    t = sample_time(50_000, mean=mean, std=std, shift=shift, generator=generator, dtype=torch.float64)
    assert 0 < t.min() and t.max() < 1
    logits = torch.logit(shift_time(t, 1 / shift))
    assert logits.mean().item() == pytest.approx(mean, abs=0.02)
    assert logits.std().item() == pytest.approx(std, abs=0.02)


def test_zero_deviation_gives_the_shifted_sigmoid_of_the_mean():
    t = sample_time((2, 3), mean=0.0, std=0.0, shift=3.0)
    assert torch.equal(t, torch.full((2, 3), 0.75))


def test_a_seed_fixes_the_times_in_every_type():
    def draw(dtype):
        return sample_time(64, shift=3.0, generator=torch.Generator().manual_seed(7), dtype=dtype)

    assert torch.equal(draw(torch.float32), draw(torch.float32))
    assert torch.equal(draw(torch.float32).bfloat16(), draw(torch.bfloat16))


def test_contradictions_raise():
    x, noise = pair()
    with pytest.raises(ValueError, match=r"one time for each of 5 samples"):
        interpolate(x, noise, torch.rand(4))
    with pytest.raises(ValueError, match="one shape"):
        velocity_target(x, noise[:1])
    with pytest.raises(ValueError, match="shift above 0"):
        shift_time(0.5, 0.0)
    with pytest.raises(ValueError, match="shift above 0"):
        sample_time(3, shift=-1.0)
    with pytest.raises(ValueError, match="standard deviation"):
        sample_time(3, std=-1.0)
