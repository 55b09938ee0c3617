"""The network of FID and of the Inception score: Inception v3 (Szegedy et al., arXiv 1512.00567) with 1,008 classes, as
it was ported from TensorFlow in 2015. Its file of weights is the user's; nothing is fetched.

It differs from torchvision's network: means leave the border out, the last block takes maxima, and images are resized
as TensorFlow 1 did. As in TiTok's evaluator, all is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spar.checkpoints.formats.torch_pickle import TorchPickleReader
from spar.checkpoints.safetensors_io import SafetensorsReader
from spar.common.errors import InputError

SIDE, WIDTH, CLASSES = 299, 2048, 1008
MAX_BYTES = 512 * 2**20  # of the file of weights, which has 95 MB
Kernel = int | tuple[int, int]


class _Link(NamedTuple):
    name: str
    channels: int
    kernel: Kernel
    stride: int = 1


Step = tuple[_Link, ...]  # convolutions that read the same, one as a rule
Chain = tuple[Step, ...]


def _step(name: str, channels: int, kernel: Kernel, stride: int = 1) -> Step:
    return (_Link(name, channels, kernel, stride),)


def _both(name: str, channels: int) -> Step:
    return _Link(f"{name}a", channels, (1, 3)), _Link(f"{name}b", channels, (3, 1))


class _Convolution(nn.Module):
    """A convolution, its normalisation and a rectifier."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, *, padded: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches side by side, of which the last one pools.

    Args:
        inputs: channels of the input.
        chains: the other branches.
        pooled: channels of the convolution after the pool; 0: none, and every side is halved.
        largest: pool maxima, not means.
    """

    def __init__(self, inputs: int, chains: Sequence[Chain], pooled: int = 0, *, largest: bool = False) -> None:
        super().__init__()
        self.chains, self.largest, self.outputs = chains, largest, pooled or inputs
        for chain in chains:
            channels = inputs
            for step in chain:
                for link in step:
                    self.add_module(link.name, _Convolution(channels, link.channels, link.kernel, link.stride))
                channels = sum(link.channels for link in step)
            self.outputs += channels
        self.branch_pool = _Convolution(inputs, pooled, 1) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        for chain in self.chains:
            out = x
            for step in chain:
                out = torch.cat([self.get_submodule(link.name)(out) for link in step], 1)
            branches.append(out)
        if self.branch_pool is None:
            return torch.cat([*branches, F.max_pool2d(x, 3, 2)], 1)
        pool = F.max_pool2d(x, 3, 1, 1) if self.largest else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*branches, self.branch_pool(pool)], 1)


# Branches of the five kinds of blocks, with the channels of those that differ in them.
def _chains_a() -> tuple[Chain, ...]:
    return (
        (_step("branch1x1", 64, 1),),
        (_step("branch5x5_1", 48, 1), _step("branch5x5_2", 64, 5)),
        (_step("branch3x3dbl_1", 64, 1), _step("branch3x3dbl_2", 96, 3), _step("branch3x3dbl_3", 96, 3)),
    )


def _chains_b() -> tuple[Chain, ...]:
    return (
        (_step("branch3x3", 384, 3, 2),),
        (_step("branch3x3dbl_1", 64, 1), _step("branch3x3dbl_2", 96, 3), _step("branch3x3dbl_3", 96, 3, 2)),
    )


def _chains_c(inner: int) -> tuple[Chain, ...]:
    rows, columns = (1, 7), (7, 1)
    return (
        (_step("branch1x1", 192, 1),),
        (_step("branch7x7_1", inner, 1), _step("branch7x7_2", inner, rows), _step("branch7x7_3", 192, columns)),
        (
            _step("branch7x7dbl_1", inner, 1), _step("branch7x7dbl_2", inner, columns),
            _step("branch7x7dbl_3", inner, rows), _step("branch7x7dbl_4", inner, columns),
            _step("branch7x7dbl_5", 192, rows),
        ),
    )  # fmt: skip


def _chains_d() -> tuple[Chain, ...]:
    return (
        (_step("branch3x3_1", 192, 1), _step("branch3x3_2", 320, 3, 2)),
        (
            _step("branch7x7x3_1", 192, 1), _step("branch7x7x3_2", 192, (1, 7)), _step("branch7x7x3_3", 192, (7, 1)),
            _step("branch7x7x3_4", 192, 3, 2),
        ),
    )  # fmt: skip


def _chains_e() -> tuple[Chain, ...]:
    return (
        (_step("branch1x1", 320, 1),),
        (_step("branch3x3_1", 384, 1), _both("branch3x3_2", 384)),
        (_step("branch3x3dbl_1", 448, 1), _step("branch3x3dbl_2", 384, 3), _both("branch3x3dbl_3", 384)),
    )


class Inception(nn.Module):
    """uint8 images [B, 3, H, W] to features [B, 2048] and logits without their bias [B, 1008], both float64."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, padded=False)
        channels, self.blocks = 192, list[str]()
        for name, chains, pooled, largest in (
            ("5b", _chains_a(), 32, False), ("5c", _chains_a(), 64, False), ("5d", _chains_a(), 64, False),
            ("6a", _chains_b(), 0, False), ("6b", _chains_c(128), 192, False), ("6c", _chains_c(160), 192, False),
            ("6d", _chains_c(160), 192, False), ("6e", _chains_c(192), 192, False), ("7a", _chains_d(), 0, False),
            ("7b", _chains_e(), 192, False), ("7c", _chains_e(), 192, True),
        ):  # fmt: skip
            block = _Block(channels, chains, pooled, largest=largest)
            self.add_module(f"Mixed_{name}", block)
            self.blocks.append(f"Mixed_{name}")
            channels = block.outputs
        self.fc = nn.Linear(WIDTH, CLASSES)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Inception:
        """Load the published file, `pt_inception-2015-12-05-6726825d.pth`, or its tensors as `.safetensors`.

        Raises:
            InputError: no such file, or one of another network.
        """
        if not path.is_file():
            raise InputError(f"expected a file of Inception's weights, but there is none at {str(path)!r}")
        reader = SafetensorsReader(path) if path.suffix == ".safetensors" else TorchPickleReader(path, MAX_BYTES)
        with torch.device("meta"):
            model = cls()
        wanted = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
        found = {key: value for key, value in reader.shapes.items() if "num_batches" not in key}
        for key in sorted(wanted.keys() | found.keys()):
            shapes = [tuple(one[key].shape) if key in one else None for one in (wanted, found)]
            if shapes[0] != shapes[1]:
                raise InputError(f"{path}: expected Inception's {key} of shape {shapes[0]}, got {shapes[1]}")
        state = {key: reader.read(key).double() for key in wanted}
        counts = {key: torch.zeros((), dtype=torch.int64) for key in model.state_dict() if key not in wanted}
        model.load_state_dict(state | counts, assign=True)
        return model.requires_grad_(False).eval().to(device)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (resize(images.double(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def resize(images: Tensor, side: int) -> Tensor:
    """Resize `[B, C, H, W]` to side x side as TensorFlow 1 did: bilinear, not antialiased, pixel i at i size / side."""
    for axis in (2, 3):
        size = images.shape[axis]
        # The ratio is rounded as TensorFlow has it: part of the published numbers.
        places = torch.arange(side, dtype=images.dtype, device=images.device) * float(np.float32(size / side))
        low = places.floor().long()
        high = (low + 1).clamp(max=size - 1)
        weight = (places - low).reshape([-1, 1] if axis == 2 else [-1])
        first, second = images.index_select(axis, low), images.index_select(axis, high)
        images = first + (second - first) * weight
    return images
