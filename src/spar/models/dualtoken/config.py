"""Sizes of every part of DualToken. The defaults are the small model of the shapes world."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from spar.common.errors import InputError
from spar.models.config import TextConfig, require_at_least, require_divisor, require_positive

# The encoder layers that the vocabularies read, as shares of the depth: the 4th, 6th and 26th of SigLIP-so400m's 27.
VOCABULARIES = ("pixel", "semantic")
SHORTCUT_TAP, PIXEL_TAP, SEMANTIC_TAP = 4 / 27, 6 / 27, 26 / 27


@dataclass(frozen=True)
class VisionTowerConfig:
    """SigLIP's image tower (transformers' `SiglipVisionModel`): a ViT with an attention-pool head.

    SigLIP 2 with a fixed image size is the same network. `shortcut_layer`, `pixel_layer` and `semantic_layer` count
    from 1; None takes the released shares of the depth.
    """

    hidden_size: int = 160
    layers: int = 8
    heads: int = 5
    intermediate_size: int = 480
    patch_size: int = 8
    image_size: int = 64
    norm_eps: float = 1e-6
    shortcut_layer: int | None = None
    pixel_layer: int | None = None
    semantic_layer: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "hidden_size", "heads", "intermediate_size", "patch_size", "image_size", "norm_eps")
        require_at_least(self, 4, "layers")
        require_divisor(self, "hidden_size", "heads")
        shortcut, pixel, semantic = self.taps
        if not 1 <= shortcut < pixel <= semantic < self.layers:
            raise InputError(
                "VisionTowerConfig: expected 1 <= shortcut_layer < pixel_layer <= semantic_layer < layers "
                f"{self.layers}, got {shortcut}, {pixel}, {semantic}"
            )

    @property
    def taps(self) -> tuple[int, int, int]:
        """The layers of the shortcut, the pixel and the semantic vocabulary."""
        shortcut = self.shortcut_layer or max(1, round(SHORTCUT_TAP * self.layers))
        pixel = self.pixel_layer or max(shortcut + 1, round(PIXEL_TAP * self.layers))
        return shortcut, pixel, self.semantic_layer or min(self.layers - 1, round(SEMANTIC_TAP * self.layers))

    @property
    def shallow_layers(self) -> tuple[int, int]:
        """The layers that the perceptual distance compares, whatever layers the vocabularies read."""
        first = max(1, round(SHORTCUT_TAP * self.layers))
        return first, max(first + 1, round(PIXEL_TAP * self.layers))

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextTowerConfig:
    """SigLIP's text tower (transformers' `SiglipTextModel`), which zero-shot classification alone reads.

    Texts are padded to `positions` tokens and the last position is the text's feature, as SigLIP was trained.
    """

    vocab_size: int = 192
    hidden_size: int = 96
    layers: int = 3
    heads: int = 3
    intermediate_size: int = 288
    positions: int = 16
    norm_eps: float = 1e-6
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "hidden_size", "layers", "heads", "intermediate_size", "positions", "norm_eps"
        )
        require_divisor(self, "hidden_size", "heads")


@dataclass(frozen=True)
class QuantizerConfig:
    """One residual vector quantiser (RVQ) of `depth` codes a position, each of `entries`, with an EMA codebook.

    `codebook` "shared" uses one table at every depth, as the public code does; "per_depth" has one for each. An entry
    that is used less than `restart_share` of the mean over entries is replaced by a vector of the batch.
    """

    depth: int = 4
    entries: int = 512
    width: int = 32
    codebook: Literal["shared", "per_depth"] = "per_depth"
    decay: float = 0.99
    eps: float = 1e-5
    restart_share: float = 0.05

    def __post_init__(self) -> None:
        require_positive(self, "depth", "entries", "width", "eps")
        require_at_least(self, 0, "restart_share")
        if not 0 <= self.decay < 1:
            raise InputError(f"QuantizerConfig.decay: expected from 0 to below 1, got {self.decay}")


@dataclass(frozen=True)
class PixelDecoderConfig:
    """The VQGAN decoder: `channels` of each resolution, finest first, `layers` + 1 residual blocks at each.

    Each further resolution doubles the side of the one before: with n of them the decoder enlarges its grid by
    2^(n - 1). Attention is at the lowest resolution. `grid` is the side of the decoder's input, to which the codes'
    grid is resized (27 to 24 for patches of 14 pixels), or None: as it is.
    """

    channels: tuple[int, ...] = (32, 64, 96, 96)
    layers: int = 1
    groups: int = 8
    grid: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "layers", "groups")
        if not self.channels or any(width < 1 or width % self.groups for width in self.channels):
            raise InputError(
                f"PixelDecoderConfig.channels: expected multiples of groups {self.groups}, got {self.channels}"
            )

    @property
    def scale(self) -> int:
        """The factor by which the decoder enlarges its grid."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class DepthHeadConfig:
    """The Transformer over the depths of one position that predicts a vocabulary's codes (a head each)."""

    layers: int = 3
    width: int = 96
    heads: int = 3
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        require_positive(self, "layers", "width", "heads", "mlp_ratio")
        require_divisor(self, "width", "heads")


@dataclass(frozen=True)
class DualTokenConfig:
    """The whole model. `shortcut` weighs the shallower features in the pixel vocabulary's input.

    With `one_codebook` the semantic vocabulary is the only one and images decode from its codes. `reads` are the
    vocabularies whose codes the LLM reads at a visual token, which share its channels equally; it predicts all codes.
    With `visual_positions` a visual token has a learned embedding of its place in the grid, which a small LLM would
    have to count out otherwise. With `semantic_given_pixel` the semantic head also reads the position's pixel codes:
    two heads that draw independently disagree wherever the LLM's state leaves open what is there.
    """

    vision: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    text_tower: TextTowerConfig = field(default_factory=TextTowerConfig)
    pixel: QuantizerConfig = field(default_factory=QuantizerConfig)
    semantic: QuantizerConfig = field(default_factory=QuantizerConfig)
    shortcut: float = 0.6
    decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    text: TextConfig = field(
        default_factory=lambda: TextConfig(hidden_size=192, layers=6, heads=6, kv_heads=6, intermediate_size=512)
    )
    pixel_head: DepthHeadConfig = field(default_factory=DepthHeadConfig)
    semantic_head: DepthHeadConfig = field(default_factory=DepthHeadConfig)
    one_codebook: bool = False
    reads: tuple[str, ...] = VOCABULARIES
    visual_positions: bool = True
    semantic_given_pixel: bool = True

    def __post_init__(self) -> None:
        require_at_least(self, 0, "shortcut")
        heads = self.pixel_head, self.semantic_head
        if self.one_codebook and (self.shortcut or self.pixel != self.semantic or heads[0] != heads[1]):
            raise InputError(
                "one_codebook: expected shortcut 0, pixel equal to semantic and pixel_head to semantic_head"
            )
        if self.one_codebook and self.semantic_given_pixel:
            raise InputError("semantic_given_pixel: expected False with one_codebook, which has no pixel codes")
        for name, width in ((name, codes.width) for name, codes in self.vocabularies.items()):
            if self.vision.hidden_size % width:
                raise InputError(
                    f"{name}.width: expected a divisor of vision.hidden_size {self.vision.hidden_size}, got {width}"
                )
        side = (self.decoder.grid or self.vision.grid) * self.decoder.scale
        if side != self.vision.image_size:
            raise InputError(
                f"decoder: expected an image of vision.image_size {self.vision.image_size} pixels, got {side}"
            )
        if not self.reads or tuple(name for name in self.vocabularies if name in self.reads) != self.reads:
            raise InputError(f"reads: expected some of {', '.join(self.vocabularies)}, in this order, got {self.reads}")
        if self.text.hidden_size % len(self.reads):
            raise InputError(
                f"text.hidden_size: expected a multiple of {len(self.reads)}, got {self.text.hidden_size}"
            )

    @property
    def vocabularies(self) -> Mapping[str, QuantizerConfig]:
        """The quantisers by the names of their vocabularies; with one codebook the semantic one alone."""
        return {name: getattr(self, name) for name in VOCABULARIES if name == "semantic" or not self.one_codebook}

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the model's parts."""
        return ("tokenizer", "language", "embedder", *(f"{name}_head" for name in self.vocabularies))

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def token_stride(self) -> int:
        return self.vision.patch_size

    @property
    def grid(self) -> int:
        """Visual tokens along one side."""
        return self.vision.grid
