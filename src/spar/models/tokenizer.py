"""The unified tokenizer (SPAR section 3.1, figure 2): one encoder, two streams, one compact latent.

B batch, S image side, N visual tokens, D_s semantic width, D_p latent channels, h w the token grid.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar.models.attention import attention
from spar.models.autoencoder import PixelDecoder, build_autoencoder
from spar.models.config import SparConfig, StreamConfig
from spar.models.encoder import SemanticEncoder
from spar.models.tiling import decode_in_tiles


@dataclass(frozen=True)
class TokenizerOutput:
    """The tokenizer's features and latents of an image. A disabled stream gives None."""

    f_v: Tensor  # [B, N, D_s] projected semantic features
    z_s: Tensor | None  # [B, N, D_p] semantic stream
    z_p: Tensor | None  # [B, N, D_p] pixel stream
    z_f: Tensor  # [B, D_p, h, w] fused latent


class ResidualBlock(nn.Module):
    """x + Linear(GELU(Linear(LN(x)))) at one width."""

    def __init__(self, width: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear_2(F.gelu(self.linear_1(self.norm(x))))


def projection(width: int, channels: int) -> nn.Sequential:
    """LN, Linear, GELU, Linear: the projection MLP at the end of a stream, and the fusion."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels), nn.GELU(), nn.Linear(channels, channels))


class TransformerBlock(nn.Module):
    """A pre-norm Transformer encoder layer over all tokens, or those that a bias allows."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, mlp_ratio * width)
        self.linear_2 = nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[B, T, width]` to the same; `bias` is added to the scores, `[B or 1, 1, T, T]`."""
        batch, tokens, width = x.shape
        query, key, value = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = attention(query, key, value, bias)  # [B, heads, N, head]
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.linear_2(F.gelu(self.linear_1(self.norm_2(x))))


class Stream(nn.Module):
    """Residual blocks, then the projection MLP; the pixel stream has Transformer layers before them."""

    def __init__(self, width: int, channels: int, config: StreamConfig, *, transformer_layers: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerBlock(width, config.pixel_heads, config.mlp_ratio) for _ in range(transformer_layers)
        )
        self.blocks = nn.ModuleList(ResidualBlock(width, config.block_norm_eps) for _ in range(config.residual_blocks))
        self.projection = projection(width, channels)

    def forward(self, f_v: Tensor) -> Tensor:
        """`[B, N, D_s]` to `[B, N, D_p]`."""
        for layer in self.layers:
            f_v = layer(f_v)
        for block in self.blocks:
            f_v = block(f_v)
        return self.projection(f_v)


class UnifiedTokenizer(nn.Module):
    """Image to `f_v` and `z_f`, and `z_f` back to pixels. `latent_scale` is measured by training, then stored."""

    latent_scale: Tensor

    def __init__(self, config: SparConfig) -> None:
        super().__init__()
        width, channels = config.text.hidden_size, config.autoencoder.latent_channels
        self.config = config
        self.encoder = SemanticEncoder(config.vision, config.text)
        streams = config.streams
        self.semantic_stream = (
            Stream(width, channels, streams, transformer_layers=streams.semantic_layers)
            if streams.semantic_stream else None
        )  # fmt: skip
        self.pixel_stream = (
            Stream(width, channels, streams, transformer_layers=streams.pixel_layers) if streams.pixel_stream else None
        )
        self.fusion = projection(channels * (streams.semantic_stream + streams.pixel_stream), channels)
        self.decoder = PixelDecoder(build_autoencoder(config.autoencoder).decoder)
        self.register_buffer("latent_scale", torch.ones(()))

    def encode(self, pixels: Tensor) -> TokenizerOutput:
        """`[B, 3, S, S]` in [0, 1] to every latent."""
        return self.fuse(self.encoder(pixels), (pixels.shape[-2], pixels.shape[-1]))

    def fuse(self, f_v: Tensor, size: tuple[int, int] | None = None) -> TokenizerOutput:
        """The streams and the fusion on given features `f_v`: `[B, N, D_s]`; `size` in pixels, default square."""
        height, width = size or (self.config.image_size, self.config.image_size)
        grid = (height // self.config.token_stride, width // self.config.token_stride)
        z_s = self.semantic_stream(f_v) if self.semantic_stream is not None else None  # [B, N, D_p]
        z_p = self.pixel_stream(f_v) if self.pixel_stream is not None else None        # [B, N, D_p]
        z = self.fusion(torch.cat([z for z in (z_s, z_p) if z is not None], dim=-1))   # [B, N, D_p]
        z = z_s + z if self.config.streams.fusion == "residual" else z
        z_f = z.transpose(1, 2).unflatten(2, grid)                                     # [B, D_p, h, w]
        return TokenizerOutput(f_v=f_v, z_s=z_s, z_p=z_p, z_f=z_f)

    def decode(self, z_f: Tensor, tile: int | None = None) -> Tensor:
        """`[B, D_p, h, w]` to pixels `[B, 3, H, W]` of the token grid's size, not clamped.

        The decoder's stride may exceed the tokens' (32 against 28): then the image is resized by their ratio,
        bilinearly and without antialiasing, as in the family. A latent of more than `tile` cells per side is decoded in
        tiles (`spar.models.tiling`).
        """
        if tile is None or max(z_f.shape[-2:]) <= tile:
            pixels = self.decoder(z_f)
        else:
            pixels = decode_in_tiles(self.decoder, z_f, tile)
        size = tuple(side * self.config.token_stride for side in z_f.shape[-2:])
        if tuple(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels.float(), size=size, mode="bilinear", align_corners=False)
        return pixels

    def normalize(self, z_f: Tensor) -> Tensor:
        """Latent to unit variance, as the denoiser sees it."""
        return z_f * self.latent_scale

    def denormalize(self, latent: Tensor) -> Tensor:
        return latent / self.latent_scale
