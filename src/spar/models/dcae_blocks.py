"""DC-AE's blocks with channels last in memory: the library's classes and weights, the same function in less time.

diffusers moves the channels to the end for every norm and linear map and back again. Each move is a copy, and a linear
map of a tensor that is not contiguous copies its weight once for every row of the image (a quarter of a decoder's time
on a CPU). Here images stay contiguous with channels last from the first convolution to the last.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d, Decoder, EfficientViTBlock, Encoder, ResBlock
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor, nn

from spar.common.autocast import without_autocast
from spar.models.attention import compute_dtype

NORM_CHUNK = 2**18  # numbers that are normalised at a time on a CPU: in float32 a MiB, which a core's cache holds
SUBPIXELS = {1: (2, 2), 2: (2, 1), 4: (1, 1)}  # by a channel's repetitions: the rows and columns of its own sub-pixels
# Of a row's three weights those that meet the same pixel: by sub-pixel, by pixel of the row before it was enlarged.
SUMMED_WEIGHTS = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


def channels_last(image: Tensor) -> Tensor:
    """The same `[B, C, H, W]`, with channels last in memory."""
    return image.contiguous(memory_format=torch.channels_last)


def is_bare(part: nn.Module) -> bool:
    """Whether a part is the library's own class without hooks, so that its weights may be read without calling it.

    Offloading and casting by diffusers or accelerate bring a part's weights when it is called, and an adapter around it
    adds its own.
    """
    hooked = "forward" in vars(part) or part._forward_pre_hooks or part._forward_hooks
    return type(part) in (nn.Conv2d, RMSNorm) and not hooked


def normalize(norm: nn.Module | None, image: Tensor, residual: Tensor | None = None) -> Tensor:
    """`[B, C, H, W]` normalised over its channels, plus `residual`.

    In inference mode the result has the type of `image`, and on a CPU takes its place: autocast would leave the sums of
    all blocks in float32, and each of the norm's operations would read and write the whole image. Training's targets,
    which have no gradients either, stay as exact as what is compared with them.
    """
    if not isinstance(norm, RMSNorm):
        raise TypeError(f"expected DC-AE's RMSNorm, got {type(norm).__name__}")
    rows, width = image.permute(0, 2, 3, 1), image.shape[1]
    inference = torch.is_inference_mode_enabled() and not torch.compiler.is_compiling()
    streams = inference and image.device.type == "cpu" and rows.is_contiguous() and is_bare(norm)
    if not streams or norm.weight is None:
        normed = norm(rows).permute(0, 3, 1, 2)
        total = normed if residual is None else normed + residual
        return total.to(image.dtype) if inference else total
    flat = rows.view(-1, width)
    others = None if residual is None else channels_last(residual).permute(0, 2, 3, 1).reshape(-1, width)
    weight, count = norm.weight.float(), max(1, NORM_CHUNK // width)
    bias = None if norm.bias is None else norm.bias.float()
    for start in range(0, len(flat), count):
        part = flat[start : start + count]
        one = part.to(torch.float32, copy=True)
        scale = torch.linalg.vector_norm(one, dim=-1, keepdim=True).square_().div_(width).add_(norm.eps).rsqrt_()
        one.mul_(scale).mul_(weight)
        if bias is not None:
            one.add_(bias)
        if others is not None:
            one.add_(others[start : start + count])
        part.copy_(one)
    return image


class ChannelsLastResBlock(ResBlock):
    """Two convolutions and a norm beside a residual."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = channels_last(hidden_states)
        return normalize(self.norm, self.conv2(self.nonlinearity(self.conv1(hidden_states))), hidden_states)


class ChannelsLastEfficientViTBlock(EfficientViTBlock):
    """Linear attention at several scales, then a gated depthwise convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(channels_last(x)))


class ChannelsLastGatedConvolution(GLUMBConv):
    """Pointwise, depthwise, gate, pointwise, norm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden, gate = self.conv_depth(self.nonlinearity(self.conv_inverted(hidden_states))).chunk(2, dim=1)
        return normalize(self.norm, self.conv_point(hidden * self.nonlinearity(gate)), hidden_states)


def convolve_enlarged(conv: nn.Conv2d, image: Tensor) -> Tensor:
    """What a 3x3 convolution makes of `image` `[B, C, H, W]` enlarged twice by repetition: `[B, C', 2 H, 2 W]`.

    A sub-pixel's nine weights meet four different pixels, so they are summed first: 16 products in place of 36.
    """
    dtype = compute_dtype(image)
    rounded = conv.weight.to(dtype).float()  # weights that are held in the products' type give the same sums
    with without_autocast(image):
        sums = torch.tensor(SUMMED_WEIGHTS, dtype=torch.float32, device=image.device)
        weight = torch.einsum("iar,jbs,ocrs->ijocab", sums, sums, rounded).flatten(0, 2)
    bias = None if conv.bias is None else conv.bias.repeat(4)
    parts = F.conv2d(image, weight.to(dtype), bias, padding=1).permute(0, 2, 3, 1)
    batch, height, width, channels = *parts.shape[:3], parts.shape[3] // 4
    enlarged = parts.new_empty(batch, height - 1, 2, width - 1, 2, channels)
    for row in range(2):  # the products of a sub-pixel of the second row lie one row further down, and so on
        for column in range(2):
            part = parts.narrow(3, (2 * row + column) * channels, channels)
            enlarged[:, :, row, :, column] = part[:, row : row + height - 1, column : column + width - 1]
    return enlarged.view(batch, 2 * height - 2, 2 * width - 2, channels).permute(0, 3, 1, 2)


class ChannelsLastUpBlock(DCUpBlock2d):
    """Twice the side, beside a shortcut that repeats channels and deals them to the sub-pixels."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.shortcut and self.repeats not in SUBPIXELS:
            return super().forward(hidden_states)
        hidden_states, inference = channels_last(hidden_states), torch.is_inference_mode_enabled()
        if inference and self.interpolate and self.interpolation_mode == "nearest" and is_bare(self.conv):
            image = convolve_enlarged(self.conv, hidden_states)
        elif self.interpolate:
            image = self.conv(F.interpolate(hidden_states, scale_factor=self.factor, mode=self.interpolation_mode))
        else:
            image = F.pixel_shuffle(self.conv(hidden_states), self.factor)
        if not self.shortcut:
            return image
        batch, channels, height, width = *image.shape[:2], image.shape[2] // 2, image.shape[3] // 2
        own = channels_last(image).permute(0, 2, 3, 1).view(batch, height, 2, width, 2, channels)
        repeated = hidden_states.permute(0, 2, 3, 1).view(batch, height, width, channels, *SUBPIXELS[self.repeats])
        shortcut = repeated.expand(-1, -1, -1, -1, 2, 2).permute(0, 1, 4, 2, 5, 3)
        total = own.add_(shortcut) if inference else own + shortcut
        return total.view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class ChannelsLastAttention:
    """The library's processor of its linear attention, with the channels last."""

    def __call__(self, attn: SanaMultiscaleLinearAttention, image: Tensor) -> Tensor:
        batch, _, height, width = image.shape
        rows, size = image.permute(0, 2, 3, 1), attn.attention_head_dim
        qkv = torch.cat([attn.to_q(rows), attn.to_k(rows), attn.to_v(rows)], dim=3).permute(0, 3, 1, 2)
        scales = torch.cat([qkv, *(scale(qkv) for scale in attn.to_qkv_multiscale)], dim=1)
        heads = scales.permute(0, 2, 3, 1).reshape(batch, height * width, -1, 3, size).permute(3, 0, 2, 1, 4)
        query, key, value = attn.nonlinearity(heads[0]), attn.nonlinearity(heads[1]), heads[2]  # [B, heads, N, size]
        if height * width > size:
            if key.dtype == torch.float16:  # in which sums over all pixels are infinite
                query, key, value = query.float(), key.float(), value.float()
            with without_autocast(key):
                totals = key.sum(2, dtype=torch.float32)[..., None].to(key.dtype)
                read = (query @ (key.transpose(2, 3) @ value)).float() / ((query @ totals).float() + attn.eps)
        else:
            weights = (query @ key.transpose(2, 3)).float()
            read = (weights / (weights.sum(3, keepdim=True) + attn.eps)).to(value.dtype) @ value
        joined = read.to(image.dtype).transpose(1, 2).reshape(batch, height, width, -1)
        out = attn.to_out(joined).permute(0, 3, 1, 2)
        return normalize(attn.norm_out, out, image if attn.residual_connection else None)


class ChannelsLastEncoder(Encoder):
    """Takes an image of any layout."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(channels_last(hidden_states))


class ChannelsLastDecoder(Decoder):
    """Takes a latent of any layout."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = channels_last(hidden_states)
        inner = self.conv_in(hidden_states)
        if self.in_shortcut:
            inner = inner + hidden_states.repeat_interleave(self.in_shortcut_repeats, dim=1)
        for block in reversed(self.up_blocks):
            inner = block(inner)
        active = self.conv_act(normalize(self.norm_out, channels_last(inner)))
        return self.conv_out(active)  # type: ignore[misc]  # the library sets None first, and a convolution then


CHANNELS_LAST: dict[type[nn.Module], type[nn.Module]] = {
    ResBlock: ChannelsLastResBlock, EfficientViTBlock: ChannelsLastEfficientViTBlock,
    GLUMBConv: ChannelsLastGatedConvolution, DCUpBlock2d: ChannelsLastUpBlock, Encoder: ChannelsLastEncoder,
    Decoder: ChannelsLastDecoder,
}  # fmt: skip


def keep_channels_last(network: nn.Module) -> None:
    """Have a DC-AE's parts compute as the classes above; weights and their names stay as they are."""
    for part in network.modules():
        if own := CHANNELS_LAST.get(type(part)):
            part.__class__ = own
        elif isinstance(part, SanaMultiscaleLinearAttention):
            part.processor = ChannelsLastAttention()  # type: ignore[assignment]  # any processor will do
