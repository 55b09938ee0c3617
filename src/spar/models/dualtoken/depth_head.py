"""The head of a vocabulary: a small causal Transformer over the depths of one position (RQ-Transformer's depth model).

Depth 1 reads the LLM's state, depth d the running sum of the entries of the codes before it; each depth has its own
classifier. The released project shows three layers; that depths have learned positions follows VILA-U (arXiv
2409.04429), since DualToken's own head was not published.
M positions of any images, D depths, C the codes' width, K entries, L the LLM's width.
"""

import torch
from torch import Tensor, nn

from spar.models.attention import attention_bias
from spar.models.dualtoken.config import DepthHeadConfig, QuantizerConfig
from spar.models.tokenizer import TransformerBlock


class DepthHead(nn.Module):
    """LLM states and earlier codes to the logits of each depth; `given` is the width of another vocabulary's vectors
    that it reads beside the states, or 0.
    """

    def __init__(self, llm_width: int, codes: QuantizerConfig, config: DepthHeadConfig, given: int = 0) -> None:
        super().__init__()
        width = config.width
        self.from_state = nn.Linear(llm_width, width)
        self.from_given = nn.Linear(given, width, bias=False) if given else None
        self.from_codes = nn.Linear(codes.width, width)
        self.positions = nn.Parameter(torch.zeros(codes.depth, width))
        self.layers = nn.ModuleList(
            TransformerBlock(width, config.heads, config.mlp_ratio) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.classifiers = nn.ModuleList(nn.Linear(width, codes.entries) for _ in range(codes.depth))

    def forward(self, states: Tensor, sums: Tensor, given: Tensor | None = None) -> Tensor:
        """Logits `[M, d + 1, K]` of the first d + 1 depths.

        Args:
            states: `[M, L]`, the LLM's state before each position.
            sums: `[M, d, C]`, the running sums of the position's first d codes' entries; d may be 0.
            given: `[M, given]`, the position's vectors of the other vocabulary, if this head reads them.
        """
        first = self.from_state(states)                                        # [M, width]
        if (given is None) != (self.from_given is None):
            expected = "none" if self.from_given is None else "those of the other vocabulary"
            raise ValueError(f"given vectors: expected {expected}, got {'none' if given is None else 'some'}")
        if self.from_given is not None and given is not None:
            first = first + self.from_given(given.to(first.dtype))
        x = torch.cat([first[:, None], self.from_codes(sums.to(first.dtype))], dim=1)  # [M, d + 1, width]
        x = x + self.positions[: x.shape[1]].to(x.dtype)
        bias = attention_bias(x.new_ones(1, x.shape[1]), x, causal=True)
        for layer in self.layers:
            x = layer(x, bias)
        x = self.norm(x)
        return torch.stack([self.classifiers[depth](x[:, depth]) for depth in range(x.shape[1])], dim=1)
