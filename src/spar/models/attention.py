"""Softmax attention and its masks, shared by all parts."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from spar.common.autocast import under_autocast

KeyValue = tuple[Tensor, Tensor]  # keys and values of some tokens, [B, heads, T, d] each
MASKED = -6e4  # added to a forbidden score; finite in every half precision, so that no row can become NaN


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for `[B, heads, T, d]`.

    It uses torch's fused kernel, except in training on a CPU, where the kernel's backward pass is several times slower
    at these lengths than three plain operations (benchmarks/attention.py).
    """
    learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if query.device.type == "cpu" and learning:
        scores = (query * (1 / math.sqrt(query.shape[-1]))) @ key.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        return torch.softmax(scores, dim=-1) @ value  # in half precision too, torch sums a softmax in float32
    return F.scaled_dot_product_attention(query, key, value, attn_mask=None if bias is None else bias.to(query.dtype))


def transformers_attention(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_ignored: Any
) -> tuple[Tensor, None]:
    """`attention` with the interface of transformers' layers: key heads are repeated if fewer; `[B, T, heads, d]`."""
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    return attention(query, key, value, attention_mask).transpose(1, 2).contiguous(), None


ATTENTION = "spar"
AttentionInterface.register(ATTENTION, transformers_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)  # additive, as `attention` takes it


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type of matrix products on `x`: autocast's if enabled, else the tensor's own."""
    return torch.get_autocast_dtype(x.device.type) if under_autocast(x) else x.dtype


def attention_bias(mask: Tensor, like: Tensor, *, causal: bool, past: int = 0) -> Tensor:
    """Additive bias `[B, 1, T, past + T]` from a mask `[B, past + T]` (1 keep) or an explicit `[B, T, T]`."""
    if mask.dim() == 3:
        allowed = mask.bool()
    else:
        total = mask.shape[1]
        allowed = mask.bool()[:, None, :].expand(-1, total - past, -1)
        if causal:
            rows = torch.arange(past, total, device=mask.device)[:, None]
            allowed = allowed & (torch.arange(total, device=mask.device)[None] <= rows)
    bias = torch.zeros(allowed.shape, dtype=compute_dtype(like), device=mask.device)
    return bias.masked_fill(~allowed, MASKED)[:, None]


def position_ids_from_mask(mask: Tensor) -> Tensor:
    """Position ids `[B, T]` that count only real tokens (padding on the left)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def sincos_pos_embed_2d(width: int, height: int, columns: int, base: float = 100.0) -> Tensor:
    """2-D sine-cosine embedding `[height * columns, width]`, half for each axis, row-major.

    The wavelengths run from 2 pi to `base` times that, in tokens.
    """
    frequencies = base ** (-torch.arange(width // 4, dtype=torch.float32) / (width // 4))

    def axis(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows = axis(height)[:, None].expand(-1, columns, -1)
    return torch.cat([rows, axis(columns)[None].expand(height, -1, -1)], dim=2).reshape(height * columns, -1)
