import pytest
import torch

from spar.common.errors import InputError
from spar.flow.guidance import apply_guidance, check_interval, is_guided

CONDITIONAL, UNCONDITIONAL = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)


def test_scale_one_is_the_conditional_tensor_itself():
    assert apply_guidance(CONDITIONAL, UNCONDITIONAL, 1.0) is CONDITIONAL
    assert apply_guidance(CONDITIONAL, None, 1) is CONDITIONAL


def test_scale_zero_is_the_unconditional_branch():
    assert torch.equal(apply_guidance(CONDITIONAL, UNCONDITIONAL, 0.0), UNCONDITIONAL)


def test_guidance_extrapolates_along_the_difference():
    guided = apply_guidance(CONDITIONAL, UNCONDITIONAL, 4.5)
    torch.testing.assert_close(guided - CONDITIONAL, 3.5 * (CONDITIONAL - UNCONDITIONAL))
    torch.testing.assert_close(apply_guidance(CONDITIONAL, CONDITIONAL, 4.5), CONDITIONAL)


def test_a_missing_or_unlike_branch_raises():
    with pytest.raises(ValueError, match="unconditional branch"):
        apply_guidance(CONDITIONAL, None, 4.5)
    with pytest.raises(ValueError, match="one shape"):
        apply_guidance(CONDITIONAL, UNCONDITIONAL[:1], 4.5)


def test_an_interval_of_guidance_holds_both_ends():
    interval = check_interval([0.25, 0.5])
    assert interval == (0.25, 0.5) and check_interval(None) is None
    assert [is_guided(time, interval) for time in (0.2, 0.25, 0.4, 0.5, 0.6)] == [False, True, True, True, False]
    assert is_guided(0.0, None) and is_guided(1.0, None)
    for end in (0.1, 0.6, 0.9):  # which float32 rounds down or up
        time = float(torch.tensor(end))
        assert is_guided(time, (end, 1.0)) and is_guided(time, (0.0, end))


@pytest.mark.parametrize("wrong", [0.5, "01", (0.5,), (0.6, 0.5), (-0.1, 1), (0, 1.1), (0, float("nan")), (True, 1)])
def test_what_is_no_interval_is_refused(wrong):
    with pytest.raises(InputError, match="guidance_interval: expected two times, 0 <= first <= last <= 1, got"):
        check_interval(wrong)
