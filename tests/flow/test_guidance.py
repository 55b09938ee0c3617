import pytest
import torch

from spar.flow.guidance import apply_guidance

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
