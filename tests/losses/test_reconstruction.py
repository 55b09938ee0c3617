import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spar.losses.reconstruction import mse, psnr


@given(offset=st.floats(1e-3, 1))
def test_a_constant_offset_has_its_closed_form(offset):
    target = torch.zeros(2, 3, 4, 4)
    assert mse(target + offset, target).item() == pytest.approx(offset**2, rel=1e-5)
    torch.testing.assert_close(psnr(target + offset, target), torch.full((2,), -20 * math.log10(offset)))


def test_psnr_is_of_each_image_alone():
    target = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prediction = target + torch.tensor([0.1, 0.01, 0.0]).reshape(3, 1, 1, 1)
    result = psnr(prediction, target)
    torch.testing.assert_close(result[:2], torch.tensor([20.0, 40.0]), rtol=0, atol=1e-3)
    assert result[2] == math.inf


def test_psnr_of_black_against_white_is_zero():
    assert psnr(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)).item() == 0


def test_bfloat16_is_measured_in_float32():
    prediction = torch.full((1, 3, 64, 64), 0.0078125, dtype=torch.bfloat16)
    assert mse(prediction, torch.zeros_like(prediction)).item() == 0.0078125**2


def test_images_that_would_broadcast_raise():
    with pytest.raises(ValueError, match="one shape"):
        mse(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="target as a tensor, got None"):
        psnr(torch.zeros(2, 3, 4, 4), None)
