"""The diffusion transformer: SANA (arXiv 2410.10629), with our own block loop that returns features of one block.

diffusers' `SanaTransformer2DModel` has the weights under its own names. B images, R noise samples per image (they
share one condition), h w the latent grid, N = h w, T the times of a sample (1, or N: one for each token), D the DiT's
width, M condition tokens, C caption channels, D_r those of `DenoiserConfig.reference_channels`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel, SanaTransformerBlock
from torch import Tensor, nn

from spar.common.autocast import under_autocast, without_autocast
from spar.models.attention import MASKED, KeyValue, attention, compute_dtype, sincos_pos_embed_2d
from spar.models.config import DenoiserConfig, library_fields
from spar.models.step_cache import StepCache

TIME_STEPS = 1000.0  # SANA embeds time in [0, 1000]
POSITION_BASE = 10.0  # wavelengths of 2 pi to 20 pi tokens: every channel varies over a grid of eight

# diffusers' names for our fields, by which its class is built and published configurations are read.
SANA_FIELDS = {
    "layers": "num_layers", "heads": "num_attention_heads", "head_dim": "attention_head_dim",
    "cross_heads": "num_cross_attention_heads", "cross_head_dim": "cross_attention_head_dim",
    "caption_channels": "caption_channels", "mlp_ratio": "mlp_ratio", "norm_eps": "norm_eps",
}  # fmt: skip


@dataclass(frozen=True)
class DenoiserOutput:
    """`velocity` `[B R, D_p, h, w]`; `features` of block `align_depth` `[B R, N, D]`."""

    velocity: Tensor
    features: Tensor


def softmax_attention(block: SanaTransformerBlock, x: Tensor) -> Tensor:
    """Softmax attention with the weights of SANA's own: `[B, N, D]` to `[B, N, D]`."""
    own = block.attn1
    q, k, v = (layer(x).unflatten(-1, (own.heads, -1)).transpose(1, 2) for layer in (own.to_q, own.to_k, own.to_v))
    return own.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2))


def linear_attention(block: SanaTransformerBlock, x: Tensor) -> Tensor:
    """SANA's ReLU linear attention: `[B, N, D]` to `[B, N, D]`; in bfloat16 under its autocast, else in float32.

    The sums over tokens are divided only at the end: float16 lacks their range.
    """
    attention = block.attn1
    batch, tokens, _ = x.shape
    fast = under_autocast(x) and compute_dtype(x) == torch.bfloat16
    q, k, v = (
        layer(x).view(batch, tokens, attention.heads, -1).transpose(1, 2).to(torch.bfloat16 if fast else torch.float32)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )                                                                      # [B, heads, N, d]
    q, k = F.relu(q), F.relu(k)
    with without_autocast(x):
        out = q @ (k.transpose(-2, -1) @ v)                                # q_n . sum_m k_m v_m^T
        total = q @ k.sum(2)[..., None]                                    # q_n . sum_m k_m
        out = (out / (total + 1e-15)).transpose(1, 2).flatten(2)
    return attention.to_out[0](out.to(x.dtype))


def _heads(block: SanaTransformerBlock, x: Tensor) -> Tensor:
    return x.unflatten(-1, (block.attn2.heads, -1)).transpose(1, 2)


def key_value_proj(block: SanaTransformerBlock, condition: Tensor) -> KeyValue:
    """Keys and values, `[B, heads, M, d]`, of a block's cross-attention for the condition `[B, M, D]`."""
    return _heads(block, block.attn2.to_k(condition)), _heads(block, block.attn2.to_v(condition))


def cross_attention(
    block: SanaTransformerBlock, x: Tensor, condition: Tensor | KeyValue, bias: Tensor | None
) -> Tensor:
    """Softmax attention from `[B, R N, D]` to the condition `[B, M, D]`; the R samples share its keys and values."""
    k, v = condition if isinstance(condition, tuple) else key_value_proj(block, condition)
    out = attention(_heads(block, block.attn2.to_q(x)), k, v, bias)
    return block.attn2.to_out[0](out.transpose(1, 2).flatten(2))


def mix_feed_forward(block: SanaTransformerBlock, x: Tensor, height: int, width: int) -> Tensor:
    """SANA's GLUMBConv on `[B, N, D]`; its 1x1 convolutions are linear maps over channels-last tokens."""
    ff = block.ff
    x = F.silu(_pointwise(ff.conv_inverted, x))                                         # [B, N, 2 H]
    x = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)                             # channels-last view
    x = ff.conv_depth(x).permute(0, 2, 3, 1).flatten(1, 2)
    value, gate = x.chunk(2, dim=-1)
    return _pointwise(ff.conv_point, value * F.silu(gate))


def _pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution on channels-last tokens `[B, N, D]`, or the linear map that stands for it."""
    if isinstance(layer, nn.Conv2d):
        return F.linear(x, layer.weight.flatten(1), layer.bias)
    mapped: Tensor = layer(x)
    return mapped


def _rows(read: Tensor | KeyValue, rows: Tensor | None) -> Tensor | KeyValue:
    """Some rows of what a block's cross-attention reads; None: all."""
    if rows is None:
        return read
    return (read[0][rows], read[1][rows]) if isinstance(read, tuple) else read[rows]


class DenoiserBlock(SanaTransformerBlock):
    """SANA's block with our own forward; the reference is `SanaTransformerBlock.forward`."""

    self_attention: Callable[[SanaTransformerBlock, Tensor], Tensor]

    def forward(  # type: ignore[override]  # the library's own loop over the blocks, which has other inputs, never runs
        self,
        x: Tensor,
        modulation: Tensor,
        condition: Tensor | KeyValue,
        bias: Tensor,
        shape: tuple[int, int, int, int],
    ) -> Tensor:
        """The block's output, `[B R, N, D]` as `x` is.

        Args:
            modulation: `[B R, T, 6, D]`; condition: `[B, M, D]`, or its keys and values; shape: (B, R, h, w).
        """
        batch, samples, height, width = shape
        table = self.scale_shift_table + modulation                                     # [B R, T, 6, D]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table.to(x.dtype).unbind(2)
        read = self.self_attention(self, torch.addcmul(shift_1, self.norm1(x), 1 + scale_1))
        x = torch.addcmul(x, gate_1, read)
        shared = x.reshape(batch, samples * x.shape[1], -1)                               # [B, R N, D]
        x = x + cross_attention(self, shared, condition, bias).view_as(x)
        modulated = torch.addcmul(shift_2, self.norm2(x), 1 + scale_2)
        return torch.addcmul(x, gate_2, mix_feed_forward(self, modulated, height, width))


class Denoiser(nn.Module):
    """Velocity and features of block `align_depth` from a noisy latent, its time and the condition."""

    def __init__(self, config: DenoiserConfig, channels: int, grid: int) -> None:
        super().__init__()
        self.config = config
        self.network = SanaTransformer2DModel(
            **library_fields(config, SANA_FIELDS),
            in_channels=channels,
            out_channels=channels,
            cross_attention_dim=config.width,
            sample_size=grid,
            patch_size=1,
            interpolation_scale=config.interpolation_scale,
        )
        for block in self.network.transformer_blocks:
            block.__class__ = DenoiserBlock  # the same weights; sharding and checkpointing wrap its forward
            block.self_attention = {"linear": linear_attention, "softmax": softmax_attention}[config.self_attention]
        read = config.reference_channels(channels)
        if read:  # starts at zero: a DiT without references keeps its function
            self.reference_embed = nn.Conv2d(read, config.width, 1, bias=False, device="meta")
            self.reference_embed.weight = nn.Parameter(torch.zeros(config.width, read, 1, 1))

    def key_values(self, condition: Tensor) -> list[KeyValue]:
        """The blocks' keys and values of a condition `[B, M, C]`, which are the same at every step of a sampler."""
        condition = self._caption(condition)
        return [key_value_proj(block, condition) for block in self.network.transformer_blocks]

    def _caption(self, condition: Tensor) -> Tensor:
        return self.network.caption_norm(self.network.caption_projection(condition))  # [B, M, D]

    def forward(
        self,
        latent: Tensor,
        time: Tensor,
        condition: Tensor | list[KeyValue],
        mask: Tensor,
        reference: Tensor | None = None,
        cache: StepCache | None = None,
    ) -> DenoiserOutput:
        """Predict the velocity.

        Args:
            latent: `[B R, D_p, h, w]`, samples of one image adjacent.
            time: `[B R]` in [0, 1], 1 is noise; or `[B R, N]`, a time for each token.
            condition: `[B, M, C]`, or its `key_values`; mask: `[B, M]`, 1 for real tokens.
            reference: `[B, D_r, h, w]`, what each cell gets of the image to edit; zero in rows without one.
            cache: of this call of a sampler, one sample an image; the features are then those of the last block.
        """
        network, (height, width) = self.network, latent.shape[-2:]
        batch, samples = len(mask), len(latent) // len(mask)
        # A convolution's channels come first in memory; the blocks would keep that and copy at every product.
        x = network.patch_embed(latent).contiguous()                                 # [B R, N, D]
        if self.config.position_gain:
            places = sincos_pos_embed_2d(x.shape[-1], height, width, POSITION_BASE).to(x)
            x = x + self.config.position_gain * places
        if reference is not None:
            known = self.reference_embed(reference).flatten(2).transpose(1, 2)       # [B, N, D]
            x = x + known.repeat_interleave(samples, dim=0)
        modulation, embedded = network.time_embed(time.flatten() * TIME_STEPS, hidden_dtype=x.dtype)
        modulation, embedded = modulation.view(len(x), -1, 6, x.shape[-1]), embedded.view(len(x), -1, x.shape[-1])
        reads = condition if isinstance(condition, list) else [self._caption(condition)] * self.config.layers
        bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill(~mask.bool(), MASKED)[:, None, None]
        if cache is None:
            x, features = self._run(x, modulation, reads, bias, (batch, samples, height, width))
        else:
            x = features = self._run_cached(cache, x, modulation, reads, bias, (height, width))
        shift, scale = (network.scale_shift_table + embedded[:, :, None]).unbind(2)  # [B R, T, D] each
        x = network.proj_out(network.norm_out.norm(x) * (1 + scale) + shift)         # [B R, N, D_p]
        velocity = x.transpose(1, 2).unflatten(2, (height, width))                       # [B R, D_p, h, w]
        return DenoiserOutput(velocity=velocity, features=features)

    def _run(
        self, x: Tensor, modulation: Tensor, reads: Sequence[Tensor | KeyValue], bias: Tensor,
        shape: tuple[int, int, int, int], first: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The output of the blocks after the first `first`, which read `reads`, and of block `align_depth`."""
        features = x
        blocks = self.network.transformer_blocks[first:]
        for number, (block, read) in enumerate(zip(blocks, reads, strict=True), start=first + 1):
            x = block(x, modulation, read, bias, shape)
            if number == self.config.align_depth:
                features = x
        return x, features

    def _run_cached(
        self, cache: StepCache, x: Tensor, modulation: Tensor, reads: Sequence[Tensor | KeyValue], bias: Tensor,
        grid: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        """The output of all blocks, of which a cache runs only the first where the others would change little."""
        if len(x) != len(bias):
            raise ValueError(f"expected one noise sample an image beside a cache, got {len(x)} of {len(bias)}")

        def first(x: Tensor) -> Tensor:
            return self.network.transformer_blocks[0](x, modulation, reads[0], bias, (len(x), 1, *grid))

        def others(x: Tensor, rows: Tensor | None) -> Tensor:
            own, mine = (modulation, bias) if rows is None else (modulation[rows], bias[rows])
            return self._run(x, own, [_rows(read, rows) for read in reads[1:]], mine, (len(x), 1, *grid), first=1)[0]

        return cache.run(x, first, others)
