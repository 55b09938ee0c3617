"""Pixel terms of reconstruction: L_MSE (SPAR section 1) and PSNR, both on pixels in [0, 1]."""

import torch
from torch import Tensor

from spar.common.checks import check_pair


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of images [B, C, H, W] in [0, 1]; a float32 scalar."""
    check_pair("prediction", prediction, "target", target)
    return (prediction.float() - target.float()).square().mean()


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, [B], for images [B, C, H, W] with peak 1.

    -10 log10 of the mean squared error over the whole image; equal images give infinity. Nothing is clamped: pass
    the final image.
    """
    check_pair("prediction", prediction, "target", target)
    error = (prediction.double() - target.double()).square().flatten(1).mean(dim=1)
    return (-10 * torch.log10(error)).float()
