"""The attention projection between the encoder's width and the codes' (UniTok, arXiv 2502.20321; DualToken's code).

    y = proj(norm3(x)) + attn(norm1(x));  y = y + mlp(norm2(y))

Towards fewer channels attention averages its heads, each as wide as the result. B batch, N positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar.models.attention import attention, attention_bias

MLP_NORM_EPS = 1e-6  # the other norms have torch's own 1e-5


class ProjectionAttention(nn.Module):
    """Self-attention `[B, N, in]` to `[B, N, out]`, whose queries and values have a bias and whose keys have none.

    To a smaller width its heads are averaged, and their width is averaged down to `out` where it is larger; to a larger
    width the heads divide `out`.
    """

    def __init__(self, in_width: int, out_width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.reduces = heads, causal, in_width > out_width
        self.out_width, inner = out_width, max(in_width, out_width)
        self.qkv = nn.Linear(in_width, 3 * inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.proj = nn.Linear(out_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        batch, positions, _ = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias.to(x.dtype))
        query, key, value = qkv.view(batch, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = attention_bias(x.new_ones(1, positions), x, causal=True) if self.causal else None
        attended = attention(query, key, value, mask)                          # [B, heads, N, head]
        if self.reduces:
            y = F.adaptive_avg_pool1d(attended.mean(1), self.out_width)        # [B, N, out]
        else:
            y = attended.transpose(1, 2).reshape(batch, positions, self.out_width)
        return self.proj(y)


class GatedMlp(nn.Module):
    """w2(gelu(w0(LN(x))) * w1(LN(x))), with the tanh form of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=MLP_NORM_EPS)
        self.w0 = nn.Linear(width, hidden)
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x), approximate="tanh") * self.w1(x))


class AttnProjection(nn.Module):
    """`[B, N, in]` to `[B, N, out]`; `heads` divide the larger of the two widths."""

    def __init__(self, in_width: int, out_width: int, heads: int, *, causal: bool = False, mlp_ratio: int = 2) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_width)
        self.attn = ProjectionAttention(in_width, out_width, heads, causal=causal)
        self.norm3 = nn.LayerNorm(in_width)
        self.proj = nn.Linear(in_width, out_width)
        self.norm2 = nn.LayerNorm(out_width)
        self.mlp = GatedMlp(out_width, mlp_ratio * out_width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(self.norm3(x)) + self.attn(self.norm1(x))
        return y + self.mlp(self.norm2(y))
