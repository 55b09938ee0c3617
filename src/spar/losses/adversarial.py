"""The adversarial term of tokenizer stage III (SPAR section 1): hinge losses, a PatchGAN discriminator, LeCam.

PatchGAN: Isola et al., arXiv 1611.07004. Hinge: Lim and Ye, arXiv 1705.02894. LeCam regularisation: Tseng et al., arXiv
2104.03310, in the form of its public code, one-sided and for each logit:

    R = mean relu(D(x) - a_fake)^2 + mean relu(a_real - D(G(z)))^2      a: moving averages of the mean logits

Departure from PatchGAN: GroupNorm for BatchNorm, so that a logit depends on its own image only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spar.common.autocast import without_autocast
from spar.common.errors import InputError


def discriminator_hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the sum of mean relu(1 - real) and mean relu(1 + fake); a float32 scalar, 1 at all-zero logits."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def generator_hinge_loss(fake_logits: Tensor) -> Tensor:
    """L_GAN for the generator: minus the mean logit of its images; a float32 scalar."""
    return -fake_logits.float().mean()


class LeCam(nn.Module):
    """LeCam regularisation of a discriminator's logits, with its two anchors as buffers.

    In training mode each call first moves the anchors towards this batch's mean logits (the first call sets them), then
    returns the regularisation as a float32 scalar; in evaluation mode the anchors stay. `mean` averages one
    process's value over all processes.
    """

    real: Tensor
    fake: Tensor
    updates: Tensor

    def __init__(self, decay: float = 0.999):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def forward(
        self, real_logits: Tensor, fake_logits: Tensor, mean: Callable[[Tensor], Tensor] = lambda own: own
    ) -> Tensor:
        real_logits, fake_logits = real_logits.float(), fake_logits.float()
        if self.training:
            self._update(mean(real_logits.detach().mean()), mean(fake_logits.detach().mean()))
        return F.relu(real_logits - self.fake).square().mean() + F.relu(self.real - fake_logits).square().mean()

    @torch.no_grad()
    def _update(self, real: Tensor, fake: Tensor) -> None:
        step = torch.where(self.updates == 0, 1.0, 1 - self.decay)  # no .item(), which would synchronize the device
        self.real += step * (real - self.real)
        self.fake += step * (fake - self.fake)
        self.updates += 1


@dataclass(frozen=True)
class PatchDiscriminatorConfig:
    """channels: of the image. width: of the first layer, doubled by each further one up to 8x. layers: of stride 2.

    A side of S pixels gives a grid of S / 2^layers - 2 logits a side, each seeing a patch (70 pixels for 3 layers).
    """

    channels: int = 3
    width: int = 64
    layers: int = 3
    groups: int = 8

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise InputError(f"discriminator: expected at least 1 layer, got {self.layers}")
        if self.groups < 1 or self.width < 1 or self.width % self.groups:
            raise InputError(f"discriminator: expected a width that {self.groups} groups divide, got {self.width}")

    @property
    def smallest_side(self) -> int:
        """Pixels of the shortest side that gives a logit."""
        return 3 * 2**self.layers


class PatchDiscriminator(nn.Module):
    """A small PatchGAN: images [B, C, H, W] in [0, 1] to logits [B, 1, h, w]."""

    def __init__(self, config: PatchDiscriminatorConfig):
        super().__init__()
        self.config = config
        widths = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(config.channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, config.layers + 1):
            stride = 2 if i < config.layers else 1
            blocks += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                ContiguousGroupNorm(config.groups, widths[i]),
                nn.LeakyReLU(0.2),
            ]
        blocks.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        smallest = self.config.smallest_side
        if images.ndim != 4 or images.shape[1] != self.config.channels or min(images.shape[2:]) < smallest:
            raise ValueError(
                f"expected images [B, {self.config.channels}, H, W] with sides of at least {smallest} pixels, "
                f"got {tuple(images.shape)}"
            )
        return self.layers(images * 2 - 1)


class ContiguousGroupNorm(nn.GroupNorm):
    """GroupNorm in float32 on contiguous memory, independent of autocast and memory format.

    torch has crashed on the CPU in the backward pass of channels_last under bfloat16 autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            weight, bias = self.weight.float(), self.bias.float()
            y = F.group_norm(x.float().contiguous(), self.num_groups, weight, bias, self.eps)
        return y.to(x.dtype)
