"""Sizes of every part of SPAR. The defaults are the small model of the shapes world (recipe `shapes`)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from spar.common.errors import InputError
from spar.common.limits import MAX_IMAGE_TILES, check_int_range

BLOCKS = ("ResBlock", "EfficientViTBlock")
MAX_POSITIONS = 2**26  # tokens of a sequence, far beyond any LLM's
RouterKind = Literal["dtr", "last", "average", "concat", "global"]


def require_at_least(config: object, least: int, *names: str) -> None:
    """Refuse numbers below a least one, and those that are not finite."""
    for name in names:
        if not least <= getattr(config, name) < math.inf:
            raise InputError(f"{type(config).__name__}.{name}: expected at least {least}, got {getattr(config, name)}")


def require_positive(config: object, *names: str) -> None:
    """Refuse numbers that are not above 0 and finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"{type(config).__name__}.{name}: expected above 0, got {getattr(config, name)}")


def require_divisor(config: object, whole: str, part: str) -> None:
    """Refuse two fields where the second does not divide the first."""
    a, b = getattr(config, whole), getattr(config, part)
    if a % b:
        raise InputError(f"{type(config).__name__}: expected {whole} as a multiple of {part}, got {a} and {b}")


def library_fields(config: object, names: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a configuration under a library's names for them, which are the values of `names`."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


@dataclass(frozen=True)
class VisionConfig:
    """InternViT (transformers' `InternVLVisionConfig`)."""

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 512
    patch_size: int = 4
    image_size: int = 64
    layer_scale: float = 1.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_positive(
            self, "hidden_size", "layers", "heads", "intermediate_size", "patch_size", "image_size", "norm_eps"
        )
        require_divisor(self, "hidden_size", "heads")


@dataclass(frozen=True)
class TextConfig:
    """Qwen2 (transformers' `Qwen2Config`); `hidden_size` is D_s, the width of the visual tokens too.

    `rope_factor` above 1 is dynamic NTK scaling: that many times `max_positions` tokens fit, and up to `max_positions`
    nothing changes. Without `tied_head` the next-token logits have a separate matrix.
    """

    vocab_size: int = 192
    hidden_size: int = 160
    layers: int = 8
    heads: int = 5
    kv_heads: int = 5
    intermediate_size: int = 384
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    max_positions: int = 512
    rms_norm_eps: float = 1e-6
    tied_head: bool = True
    image_token_id: int = 5
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "hidden_size", "layers", "heads", "kv_heads")
        require_positive(self, "intermediate_size", "max_positions", "rope_theta", "rms_norm_eps")
        require_at_least(self, 1, "rope_factor")
        require_divisor(self, "hidden_size", "heads")
        require_divisor(self, "heads", "kv_heads")
        if self.hidden_size // self.heads % 2:
            raise InputError(
                "TextConfig: rotary positions need heads of an even width, "
                f"got hidden_size {self.hidden_size} over {self.heads} heads"
            )
        if self.max_positions * self.rope_factor > MAX_POSITIONS:
            raise InputError(
                f"TextConfig: expected max_positions times rope_factor of at most {MAX_POSITIONS}, "
                f"got {self.max_positions} and {self.rope_factor:g}"
            )
        for name in ("image_token_id", "eos_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise InputError(f"TextConfig.{name}: expected 0 to {self.vocab_size - 1}, got {getattr(self, name)}")

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.max_positions * self.rope_factor)


@dataclass(frozen=True)
class AutoencoderConfig:
    """DC-AE (diffusers' `AutoencoderDC`). Its stride is 2 to the number of stages less one."""

    latent_channels: int = 16
    head_dim: int = 32
    channels: tuple[int, ...] = (32, 64, 128, 128)
    encoder_layers: tuple[int, ...] = (0, 1, 2, 1)
    decoder_layers: tuple[int, ...] = (0, 2, 2, 1)
    encoder_blocks: tuple[str, ...] = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    decoder_blocks: tuple[str, ...] = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    encoder_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), ())
    decoder_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), ())
    downsample: Literal["Conv", "pixel_unshuffle"] = "pixel_unshuffle"
    upsample: Literal["interpolate", "pixel_shuffle"] = "interpolate"

    def __post_init__(self) -> None:
        require_positive(self, "latent_channels", "head_dim")
        if not self.channels or min(self.channels) < 1:
            raise InputError(f"AutoencoderConfig.channels: expected numbers above 0, got {self.channels}")
        lists = [f"{half}_{part}" for half in ("encoder", "decoder") for part in ("layers", "blocks", "multiscales")]
        for name in lists:
            values, stages = getattr(self, name), len(self.channels)
            where = f"AutoencoderConfig.{name}"
            if len(values) != stages:
                raise InputError(f"{where}: expected one entry for each of {stages} channels, got {len(values)}")
            if name.endswith("layers") and (min(values) < 0 or 0 in values[1:]):
                raise InputError(f"{where}: expected numbers from 0, of which only the first may be 0, got {values}")
            if name.endswith("multiscales") and any(scale < 1 for scales in values for scale in scales):
                raise InputError(f"{where}: expected numbers above 0, got {values}")
            if name.endswith("blocks") and (unknown := sorted(set(values) - set(BLOCKS))):
                raise InputError(f"{where}: expected {' or '.join(BLOCKS)}, got {', '.join(unknown)}")
        for before, after in pairwise(self.channels):
            if 4 * before % after:
                raise InputError(
                    "AutoencoderConfig.channels: the shortcuts need four times each entry as a multiple of the next, "
                    f"got {before} before {after}"
                )
        if self.channels[-1] % self.latent_channels:
            raise InputError(
                "AutoencoderConfig: the shortcuts need the last of channels as a multiple of latent_channels, "
                f"got {self.channels[-1]} and {self.latent_channels}"
            )

    @property
    def stride(self) -> int:
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class StreamConfig:
    """The dual stream: light semantic stream, Transformer pixel stream (paper, section 3.1).

    `fusion` "residual" adds the MLP of the paper's fusion to `z_s`: with an MLP that starts at zero, a tokenizer of one
    stream keeps its function. `semantic_layers` puts Transformer layers into the semantic stream too: an ablation.
    """

    residual_blocks: int = 3
    pixel_layers: int = 4
    semantic_layers: int = 0
    pixel_heads: int = 5
    mlp_ratio: int = 4
    block_norm_eps: float = 1e-5
    fusion: Literal["mlp", "residual"] = "mlp"
    semantic_stream: bool = True
    pixel_stream: bool = True

    def __post_init__(self) -> None:
        require_at_least(self, 0, "residual_blocks", "pixel_layers", "semantic_layers")
        require_positive(self, "pixel_heads", "mlp_ratio", "block_norm_eps")
        if not (self.semantic_stream or self.pixel_stream):
            raise InputError("StreamConfig: at least one of semantic_stream and pixel_stream must be on")
        if self.fusion == "residual" and not self.semantic_stream:
            raise InputError("StreamConfig.fusion: residual adds to the semantic stream, which is switched off")


@dataclass(frozen=True)
class RouterConfig:
    """The LLM layers that a condition token reads, and their mixture.

    `scale` is the size to which each state is scaled before the mixture: "unit"; "last", the size of the token's own
    last state; or "none", the raw states of the paper's equation. `norm` is the LayerNorm after the mixture. With
    "last", no norm and an identity for `W_p`, a token that reads only the last layer gets the LLM's last state
    unchanged.
    """

    kind: RouterKind = "dtr"
    count: int = 4
    temperature: float = 1.0
    scale: Literal["unit", "last", "none"] = "unit"
    norm: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "count", "temperature")
        if self.kind != "dtr" and self.temperature != 1.0:
            raise InputError(f"RouterConfig.temperature: only kind dtr has one, got kind {self.kind}")


@dataclass(frozen=True)
class ConnectorConfig:
    """Learnable queries, bidirectional layers (copied from the LLM's last), projection to the DiT's caption width.

    `reference_positions` adds a 2-D sine embedding to the reference-image tokens after the connector: SANA's own
    attention has no positions, and an edit depends on the place of each reference token. `reference_scale` is the size
    of `f_v` at the connector's input: "unit" like the routed states, "raw" as from the encoder. `reference` is what the
    connector reads at the reference's tokens: `f_v` in place of the routed states, as the paper has it, or "added" to
    them. The instruction comes before the image, so the LLM's states there tell what is to change. `image_start` puts
    the image's opening token before the queries (as in UniLIP's prompts).
    """

    queries: int = 16
    layers: int = 2
    reference_positions: bool = True
    reference_scale: Literal["unit", "raw"] = "unit"
    reference: Literal["replaced", "added"] = "replaced"
    image_start: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "queries")
        require_at_least(self, 0, "layers")


@dataclass(frozen=True)
class DenoiserConfig:
    """SANA (diffusers' `SanaTransformer2DModel`). `align_depth` is the 1-based block whose features align.

    `self_attention` "linear" is SANA's own, "softmax" the usual one with the same weights, which took no longer on a
    grid of eight. Linear attention passes on only sums over all tokens, from which a cell can hardly tell which of a
    prompt's objects the other cells draw.

    `interpolation_scale` is SANA's own option: its sine positions, which the published 512 px models do not use. Most
    of their channels hardly vary over a small grid; `position_gain` adds that many times `sincos_pos_embed_2d`, whose
    channels all vary (0: none), so that a DiT learns the places of objects in prompts.
    `reference_latent` adds the reference's own `z_f` to the noisy latent's tokens, cell by cell, so that an edit
    copies unchanged regions: with `f_v` alone the DiT would have to learn the whole pixel stream again.
    `reference_states` adds the condition's states at the reference's tokens in the same way: what the instruction means
    for a cell then reaches that cell by itself, and need not be found by cross-attention among all tokens.
    """

    layers: int = 6
    heads: int = 7
    head_dim: int = 32
    cross_heads: int = 7
    cross_head_dim: int = 32
    caption_channels: int = 160
    self_attention: Literal["linear", "softmax"] = "linear"
    mlp_ratio: float = 2.29
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    position_gain: float = 2.4
    reference_latent: bool = True
    reference_states: bool = False
    align_depth: int = 2

    def __post_init__(self) -> None:
        require_positive(self, "layers", "heads", "head_dim", "cross_heads", "cross_head_dim", "caption_channels")
        require_positive(self, "mlp_ratio", "norm_eps")
        if self.interpolation_scale is not None:
            require_positive(self, "interpolation_scale")
        require_at_least(self, 0, "position_gain")
        for name, value in (("caption_channels", self.caption_channels), ("heads * head_dim", self.width)):
            if value % 4:
                raise InputError(f"DenoiserConfig.{name}: sine positions need a multiple of 4, got {value}")
        if not 1 <= self.align_depth <= self.layers:
            raise InputError(f"DenoiserConfig.align_depth: expected 1 to {self.layers}, got {self.align_depth}")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def reference_channels(self, latent: int) -> int:
        """Channels that a cell gets of the reference, of `latent` channels itself; 0: none."""
        return latent * self.reference_latent + self.caption_channels * self.reference_states


@dataclass(frozen=True)
class UnderstandingConfig:
    """How an image becomes squares for the encoder that answers; images to edit keep their proportions.

    `geometry` is that of one square: "crop", its middle, or "stretch", the whole of it, as InternVL has it.
    `max_tiles` is the default of InternVL's dynamic tiling: above 1 an image is read as up to so many tiles of its own
    proportions, and the whole beside them.
    """

    geometry: Literal["crop", "stretch"] = "crop"
    max_tiles: int = 1

    def __post_init__(self) -> None:
        check_int_range("understanding.max_tiles", self.max_tiles, 1, MAX_IMAGE_TILES)


@dataclass(frozen=True)
class SparConfig:
    """The whole model. Geometry: `image_size` pixels, visual tokens of stride `2 * patch_size`."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    streams: StreamConfig = field(default_factory=StreamConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    understanding: UnderstandingConfig = field(default_factory=UnderstandingConfig)

    def __post_init__(self) -> None:
        side, stride = self.image_size, self.token_stride
        if side % stride:
            raise InputError(f"vision.image_size: expected a multiple of {stride} (two patches), got {side}")
        width, heads = self.text.hidden_size, self.streams.pixel_heads
        if self.streams.pixel_stream and width % heads:
            raise InputError(f"streams.pixel_heads: expected a divisor of text.hidden_size {width}, got {heads}")
        if self.router.count > self.text.layers:
            raise InputError(f"router.count: expected at most {self.text.layers} LLM layers, got {self.router.count}")
        if self.connector.layers > self.text.layers:
            raise InputError(f"connector.layers: expected at most {self.text.layers}, got {self.connector.layers}")

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def token_stride(self) -> int:
        return 2 * self.vision.patch_size

    @property
    def grid(self) -> int:
        """Visual tokens along one side."""
        return self.vision.image_size // self.token_stride
