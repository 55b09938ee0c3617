"""L_perc (SPAR section 1): distances between a frozen network's features of two images, with one interface.

At full size it is 1.1 * (1.0 * LPIPS + 0.1 * ConvNeXt-S logits); `FeatureLoss` has the form of LPIPS (Zhang et al.,
arXiv 1801.03924, uniform channel weights) over any given frozen network, and needs no download.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spar.common.checks import check_pair
from spar.common.errors import InputError, first_line

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PerceptualLoss(nn.Module):
    """The interface: forward(prediction, target) for images [B, 3, H, W] in [0, 1] to a float32 scalar of 0 or more.

    The gradient reaches only the prediction. The network must be frozen: a parameter that requires a gradient raises
    ValueError, and it stays in evaluation mode.
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        check_pair("prediction", prediction, "target", target)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                raise ValueError(f"expected a frozen network in a perceptual loss, got the trainable parameter {name}")
        return self.distance(prediction, target.detach())

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def train(self, mode: bool = True) -> "PerceptualLoss":
        return super().train(False)


def unit_normalize(features: Tensor, eps: float = 1e-5) -> Tensor:
    """Divide features [B, C, H, W] by their length over the channels; in float32, smooth at zero."""
    features = features.float()
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + eps**2)


class FeatureLoss(PerceptualLoss):
    """Mean over the layers of the mean squared distance between unit-normalised features; in [0, 4].

    network: images [B, 3, H, W] in [0, 1] to a list of feature maps [B, C_i, H_i, W_i], one for each layer; it does its
        own normalisation.
    """

    def __init__(self, network: Callable[[Tensor], Sequence[Tensor]]):
        super().__init__()
        self.network = network
        self.eval()

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._features(target)
        own = self._features(prediction)
        return torch.stack([(a - b).square().sum(dim=1).mean() for a, b in zip(own, wanted, strict=True)]).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        maps = self.network(images)
        if not maps:
            raise ValueError("expected feature maps from the network of a feature loss, got none")
        return [unit_normalize(layer) for layer in maps]


class LpipsLoss(PerceptualLoss):
    """LPIPS with its learned channel weights, from the optional package `lpips`; `load` builds it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.eval()

    @classmethod
    def load(cls, backbone: str = "vgg") -> "LpipsLoss":
        """Build LPIPS over `backbone` ("vgg", "alex", "squeeze"); its first use downloads the backbone's weights."""
        try:
            import lpips
        except ImportError as error:
            raise InputError(
                "LPIPS is expected from the optional packages lpips and torchvision, which cannot be imported "
                f"({error}): install a torchvision that matches torch, then `pip install lpips`"
            ) from error
        return cls(lpips.LPIPS(net=backbone, verbose=False).requires_grad_(False))

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.network(prediction.float() * 2 - 1, target.float() * 2 - 1).mean()


class ConvNextLoss(PerceptualLoss):
    """Mean squared distance of a ConvNeXt classifier's logits, at its training side in pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, side: int = 224):
        super().__init__()
        self.model = model
        self.side = side
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).reshape(1, 3, 1, 1), persistent=False)
        self.eval()

    @classmethod
    def load(cls, path: str | Path, side: int = 224) -> "ConvNextLoss":
        """Load a ConvNextForImageClassification from a folder or an id (facebook/convnext-small-224)."""
        from transformers import ConvNextForImageClassification

        try:
            model = ConvNextForImageClassification.from_pretrained(path, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise InputError(
                f"a ConvNeXt classifier in transformers' format is expected at {str(path)!r}, "
                f"which cannot be loaded: {first_line(error)}"
            ) from error
        return cls(model.requires_grad_(False), side)

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._logits(target)
        return (self._logits(prediction) - wanted).square().mean()

    def _logits(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.side, self.side):
            size = (self.side, self.side)
            images = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
        return self.model(pixel_values=(images - self.mean) / self.std).logits.float()
