"""DualToken's tokenizer: one SigLIP encoder, shallow features to pixel codes, deep features to semantic codes.

    x_pix = P_pix(h_6) + 0.6 P_cut(h_4)      codes r_pix, vectors q_pix = RVQ_pix(x_pix)      image = decoder(q_pix)
    x_sem = P_sem(h_26)                      codes r_sem, vectors q_sem = RVQ_sem(x_sem)
    f = U_sem(q_sem)                         takes the place of h_26: layer 27, the norm and the pooling head follow

B batch, S image side, N = h w positions, W the encoder's width, C the codes' width, D depths.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn

from spar.models.dualtoken.config import DualTokenConfig, PixelDecoderConfig
from spar.models.dualtoken.projection import AttnProjection
from spar.models.dualtoken.quantizer import Quantized, ResidualQuantizer
from spar.models.dualtoken.towers import TextTower, VisionTower


@dataclass(frozen=True)
class DualCodes:
    """The codes of images: `pixel` int64 `[B, h, w, D_pix]` and `semantic` int64 `[B, h, w, D_sem]`; with one codebook
    both are the same.
    """

    pixel: Tensor
    semantic: Tensor

    def __len__(self) -> int:
        return len(self.pixel)


@dataclass(frozen=True)
class DualFeatures:
    """What the vocabularies quantise, `[B, N, C]` each by its name, and the encoder's own features of the semantic
    layer, `deep` `[B, N, W]`.
    """

    inputs: Mapping[str, Tensor]
    deep: Tensor


@dataclass(frozen=True)
class DualTokenizerOutput:
    """Everything that training reads: the vocabularies by their names, the vectors that decode to pixels `[B, N, C]`,
    the semantic features after quantisation `features` `[B, N, W]` and their pooled feature `[B, W]`.
    """

    quantized: Mapping[str, Quantized]
    image_vectors: Tensor
    features: Tensor
    pooled: Tensor


class GridResnetBlock(nn.Module):
    """From the encoder's width to the decoder's: norm, SiLU, 1 x 1; norm, SiLU, 3 x 3; a 1 x 1 shortcut."""

    def __init__(self, in_width: int, out_width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_width, eps=1e-6)
        self.conv1 = nn.Conv2d(in_width, out_width, 1)
        self.norm2 = nn.GroupNorm(groups, out_width, eps=1e-6)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.shortcut = nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.shortcut(x) + y


class PixelCodesDecoder(nn.Module):
    """Quantised pixel vectors `[B, N, C]` to an image `[B, 3, S, S]`; `network` is VQGAN's decoder."""

    def __init__(self, width: int, code_width: int, config: PixelDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.expand = AttnProjection(code_width, width, width // code_width, causal=True)
        self.block = GridResnetBlock(width, config.channels[-1], config.groups)
        self.network = Decoder(
            in_channels=config.channels[-1],
            out_channels=3,
            up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * (len(config.channels) - 1)),
            block_out_channels=config.channels,
            layers_per_block=config.layers,
            norm_num_groups=config.groups,
        )

    def forward(self, vectors: Tensor, grid: int) -> Tensor:
        """`[B, N, C]` on a square grid to pixels, about [0, 1], not clamped."""
        x = self.expand(vectors).transpose(1, 2).unflatten(2, (grid, grid))    # [B, W, h, w]
        if self.config.grid not in (None, grid):
            size = (self.config.grid, self.config.grid)
            x = F.interpolate(x.float(), size=size, mode="bilinear", align_corners=False).to(x.dtype)
        return (self.network(self.block(x)) + 1) / 2


class DualTokenizer(nn.Module):
    """Images to two kinds of codes, pixel codes to images. `text_tower` is for zero-shot classification alone."""

    def __init__(self, config: DualTokenConfig) -> None:
        super().__init__()
        self.config = config
        width, semantic = config.vision.hidden_size, config.semantic.width
        self.encoder = VisionTower(config.vision)
        self.text_tower = TextTower(config.text_tower, width)
        if not config.one_codebook:
            pixel = config.pixel.width
            self.reduce_shortcut = AttnProjection(width, pixel, width // pixel)
            self.reduce_pixel = AttnProjection(width, pixel, width // pixel)
            self.pixel_quantizer = ResidualQuantizer(config.pixel)
        self.reduce_semantic = AttnProjection(width, semantic, width // semantic)
        self.semantic_quantizer = ResidualQuantizer(config.semantic)
        self.expand_semantic = AttnProjection(semantic, width, width // semantic, causal=True)
        self.decoder = PixelCodesDecoder(width, config.pixel.width, config.decoder)

    @property
    def quantizers(self) -> dict[str, ResidualQuantizer]:
        """By the names of the vocabularies."""
        return {name: getattr(self, f"{name}_quantizer") for name in self.config.vocabularies}

    @property
    def image_quantizer(self) -> ResidualQuantizer:
        """Of the codes that decode to an image."""
        return next(iter(self.quantizers.values()))

    def features(self, pixels: Tensor) -> DualFeatures:
        """`[B, 3, S, S]` in [0, 1] to what the vocabularies quantise."""
        taps = self.config.vision.taps
        h_cut, h_pix, h_sem = self.encoder.run(self.encoder.embed(pixels), range(1, taps[2] + 1), taps)
        inputs = {"semantic": self.reduce_semantic(h_sem)}                                      # [B, N, C]
        if not self.config.one_codebook:
            inputs["pixel"] = self.reduce_pixel(h_pix) + self.config.shortcut * self.reduce_shortcut(h_cut)
        return DualFeatures(inputs, h_sem)

    def encode(self, pixels: Tensor) -> DualCodes:
        """`[B, 3, S, S]` in [0, 1] to codes. In bfloat16 some codes differ from float32's, more at deeper depths."""
        inputs, grid = self.features(pixels).inputs, (self.config.grid,) * 2
        codes = {name: one.encode(inputs[name]).unflatten(1, grid) for name, one in self.quantizers.items()}
        return DualCodes(codes.get("pixel", codes["semantic"]), codes["semantic"])

    def decode(self, pixel_codes: Tensor) -> Tensor:
        """Pixel codes `[B, h, w, D]`, or of the first depths alone, to pixels `[B, 3, S, S]`, not clamped."""
        return self.decoder(self.image_quantizer.decode(pixel_codes).flatten(1, 2), self.config.grid)

    def semantic_features(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic vectors `[B, N, C]` to the encoder's features in their place `[B, N, W]`, and pooled `[B, W]`."""
        features = self.expand_semantic(vectors)
        return features, self.encoder.pool(features, self.config.vision.taps[2])

    def pooled(self, semantic_codes: Tensor) -> Tensor:
        """The pooled feature `[B, W]` of semantic codes `[B, h, w, D]`, for zero-shot classification."""
        return self.semantic_features(self.semantic_quantizer.decode(semantic_codes).flatten(1, 2))[1]

    def forward(self, pixels: Tensor, noise: Mapping[str, Tensor] | None = None) -> DualTokenizerOutput:
        """The vocabularies and the semantic features after quantisation; `noise` of each as in `ResidualQuantizer`."""
        inputs, noise = self.features(pixels).inputs, noise or {}
        quantized = {name: one(inputs[name], noise.get(name)) for name, one in self.quantizers.items()}
        semantic = quantized["semantic"].vectors
        deep, pooled = self.semantic_features(semantic)
        image = quantized["pixel"].vectors if "pixel" in quantized else semantic
        return DualTokenizerOutput(quantized, image, deep, pooled)
