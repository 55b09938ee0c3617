"""Frozen networks from outside: the external teacher of the alignment (any image encoder of transformers, the baseline
beside SPAR's own), and the networks of L_perc. No state of a run holds them.

B images, N = rows x columns patch tokens, D the encoder's width.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoImageProcessor, AutoModel

from spar.checkpoints.bundled import bundled_folder, is_bundled
from spar.checkpoints.dualtoken_format import load_dualtoken
from spar.common.errors import InputError, first_line
from spar.losses.perceptual import ConvNextLoss, LpipsLoss, PerceptualLoss
from spar.models.encoder import PIXEL_MEAN, PIXEL_STD
from spar.training.distributed import SINGLE_PROCESS, DistributedContext

if TYPE_CHECKING:
    from spar.training.config import Recipe, StageConfig

BUNDLED = "dualtoken"
SIGLIP_RANGE = (0.5, 0.5, 0.5)  # mean and deviation that bring [0, 1] to [-1, 1]
SIDE = 224  # of an encoder whose configuration names none
# Multiply-adds of the perceptual networks on 224 x 224 pixels, from torchvision's tables (VGG16 and ConvNeXt-S).
PERCEPTUAL_MACS = {"lpips": 15.47e9, "convnext": 8.68e9}
EXTRA_TOKENS = 2  # CLS and DeiT's distillation token; registers, which the configuration counts, come on top


class ExternalTeacher(nn.Module):
    """A frozen encoder's patch features on their grid; `load_external_teacher` makes one."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.side = _square(getattr(network.config, "image_size", None) or SIDE)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self._width: int | None = None
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """`[B, 3, H, W]` in [0, 1] to `[B, N, D]` in row-major order and (rows, columns).

        Images are resized to the encoder's side; CLS and register tokens are dropped. Raises InputError where the
        tokens form no square grid.
        """
        if pixels.shape[-2:] != (self.side, self.side):
            size = (self.side, self.side)
            pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=True)
        states = self.network(pixel_values=(pixels - self.mean) / self.std).last_hidden_state
        if states.dim() == 4:                                             # [B, D, h, w], a convolutional network
            rows, columns = states.shape[-2:]
            states = states.flatten(2).transpose(1, 2)                    # [B, N, D]
        else:
            rows = columns = self.side // _square(getattr(self.network.config, "patch_size", None))
        extra = states.shape[1] - rows * columns
        registers = getattr(self.network.config, "num_register_tokens", 0) or 0
        if rows != columns or not 0 <= extra <= EXTRA_TOKENS + registers:
            raise InputError(
                f"expected patch tokens on a square grid, got {states.shape[1]} tokens "
                f"where the encoder's configuration promises {rows} x {columns}"
            )
        return states[:, extra:], (rows, columns)

    def width(self) -> int:
        """D, asked of the network itself, once."""
        if self._width is None:
            self._width = self(torch.zeros(1, 3, self.side, self.side, device=self.mean.device))[0].shape[-1]
        return self._width

    def shard(self, parallel: DistributedContext) -> None:
        """Leave each process its rows of the weights alone, scalars aside; all call `forward` together from then on."""
        mesh = init_device_mesh(parallel.device.type, (parallel.world,))
        scalars = {p for p in self.parameters() if not p.dim()}
        lists = [part for part in self.modules() if isinstance(part, nn.ModuleList)]
        for part in (*(layer for one in reversed(lists) for layer in one), self):  # what is within a layer comes first
            fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)


class FrozenNetworks(Mapping[str, Any]):
    """The networks from outside that a recipe's objectives name; each is loaded once, at its first use.

    The teacher is sharded as the run's own frozen weights are; those of L_perc are small and whole on every process.
    """

    def __init__(self, recipe: "Recipe", parallel: DistributedContext = SINGLE_PROCESS) -> None:
        self.loaders = {name: load for one in recipe.stages for name, load in one.objective.networks(recipe).items()}
        self.recipe, self.parallel, self.loaded = recipe, parallel, dict[str, nn.Module]()

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self.loaded:
            with torch.device("cpu"):  # also where modules are being built on the meta device
                network = self.loaders[name]()
            if self.parallel.sharded and self.parallel.config.shard_frozen and isinstance(network, ExternalTeacher):
                network.shard(self.parallel)
            self.loaded[name] = network.to(self.parallel.device)
        return self.loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaders)

    def __len__(self) -> int:
        return len(self.loaders)

    def load(self, stages: "tuple[StageConfig, ...]") -> None:
        """Load all that some stages read, so that what is missing is known before anything is written; InputError."""
        for stage in stages:
            for name in stage.objective.networks(self.recipe):
                self[name]


class OutsidePerceptual(Protocol):
    """The weights of the perceptual networks from outside, which the configurations of all systems have."""

    @property
    def lpips(self) -> float: ...

    @property
    def convnext(self) -> float: ...

    @property
    def classifier(self) -> str: ...


def perceptual_networks(config: OutsidePerceptual) -> dict[str, Callable[[], PerceptualLoss]]:
    """The networks of L_perc that come from outside, by the fields that weigh them.

    Each raises InputError where an extra or a download is not there, with what to do or to choose in its place.
    """
    loaders: dict[str, Callable[[], PerceptualLoss]] = {
        "lpips": LpipsLoss.load, "convnext": lambda: ConvNextLoss.load(config.classifier),
    }  # fmt: skip
    return {name: partial(_or_explain, load) for name, load in loaders.items() if getattr(config, name)}


def _or_explain(load: Callable[[], PerceptualLoss]) -> PerceptualLoss:
    try:
        return load()
    except InputError as error:
        raise InputError(
            f"{error}; or choose the run's own features in its place: --perceptual.lpips 0 --perceptual.convnext 0 "
            "--perceptual.autoencoder 1 (of DualToken --perceptual.teacher 1)"
        ) from error


def load_external_teacher(source: str, field: str = "alignment.external") -> ExternalTeacher:
    """The image encoder in a folder or of a Hub id, from safetensors alone; code that comes with it never runs.

    "dualtoken" is the image tower of the bundled DualToken: SigLIP's, trained on the shapes world apart from SPAR.

    Args:
        field: what the message of an error begins with.

    Raises:
        InputError: what is no whole image encoder of transformers in safetensors, or gives no square grid.
    """
    if source == BUNDLED and is_bundled(source):
        tower = load_dualtoken(bundled_folder(source)).model.tokenizer.encoder.network
        return ExternalTeacher(tower, SIGLIP_RANGE, SIGLIP_RANGE)
    try:
        network, report = AutoModel.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
        wrong = {key for key in (*report["missing_keys"], *report["mismatched_keys"]) if "pooler" not in str(key)}
        if wrong:
            raise InputError(f"{len(wrong)} of its tensors are missing or of another shape")
        teacher = ExternalTeacher(getattr(network, "vision_model", network), *_normalization(source))
        teacher.width()
    except Exception as error:  # whatever class of the libraries refuses it, and however
        reason, hub = first_line(error), " or Hub id" if field == "alignment.external" else ""
        raise InputError(
            f"{field}: expected the folder{hub} of an image encoder of transformers in safetensors, "
            f"got {source!r} ({reason})"
        ) from error
    return teacher


def _normalization(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the encoder's image processor; ImageNet's where none comes with it."""
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except OSError:
        return PIXEL_MEAN, PIXEL_STD
    if not getattr(processor, "do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    return tuple(processor.image_mean), tuple(processor.image_std)


def _square(size: Any) -> int:
    """One side of a size that a configuration gives as a number or a pair."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int):
        raise InputError(f"expected square images and patches, got {size!r}")
    return sides[0]
