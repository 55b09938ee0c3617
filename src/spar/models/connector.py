"""The connector: queries, bidirectional layers, projection to the DiT's caption width (SPAR section 3.2).

B batch, T condition tokens, D the LLM's width, C the DiT's caption channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from spar.models.attention import ATTENTION, attention_bias, position_ids_from_mask, sincos_pos_embed_2d
from spar.models.config import SparConfig
from spar.models.encoder import qwen_config
from spar.models.language import LanguageModel


def _load_weights(module: nn.Module, source: nn.Module) -> None:
    module.load_state_dict(source.state_dict())


class Connector(nn.Module):
    """Routed states to the DiT's condition. `queries` are the learnable embeddings that end every sequence."""

    def __init__(self, config: SparConfig) -> None:
        super().__init__()
        library = qwen_config(config.text)
        library._attn_implementation = ATTENTION
        width = config.text.hidden_size
        self.config = config
        self.queries = nn.Parameter(torch.randn(config.connector.queries, width) * 0.02)
        layers = [Qwen2DecoderLayer(library, i) for i in range(config.connector.layers)]
        for layer in layers:
            layer.self_attn.is_causal = False
        self.layers = nn.ModuleList(layers)
        self.rotary = Qwen2RotaryEmbedding(library)
        self.norm = Qwen2RMSNorm(width, eps=config.text.rms_norm_eps)
        self.projection = nn.Linear(width, config.denoiser.caption_channels)
        if config.connector.reference_positions:
            self.reference_gain = nn.Parameter(torch.ones(()))

    def initialize_from(
        self, language: LanguageModel, copy: Callable[[nn.Module, nn.Module], object] = _load_weights
    ) -> None:
        """Copy the LLM's last layers into the connector's, and the norm that follows them.

        Args:
            copy: gives its first argument the weights of its second one, a module of the same form; sharded modules
                need one of their own.
        """
        layers = language.network.layers
        for own, source in zip(self.layers, layers[len(layers) - len(self.layers) :], strict=True):
            copy(own, source)
        if self.layers:
            copy(self.norm, language.network.norm)

    def forward(
        self,
        states: Tensor,
        mask: Tensor,
        is_reference: Tensor,
        reference: Tensor | None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Condition the DiT.

        Args:
            states: routed states `[B, T, D]`.
            mask: `[B, T]`, 1 for real tokens (padding on the left).
            is_reference: `[B, T]`, true at reference-image positions.
            reference: `f_v` of the references, `[B_with_reference, N, D]`, which replaces the routed states there (or
                is added to them), so that pixel detail reaches the DiT; None if no row has one.
            grid: rows and columns of a reference's tokens, by default the trained square.

        Returns:
            `[B, T, C]`.
        """
        if reference is not None:
            if self.config.connector.reference_scale == "unit":
                reference = reference * torch.rsqrt(reference.float().pow(2).mean(-1, keepdim=True) + 1e-6)
            placed = states.masked_scatter(is_reference[..., None], reference.to(states.dtype))
            if self.config.connector.reference == "added":
                placed = torch.where(is_reference[..., None], states + placed, states)
            states = placed
        bias = attention_bias(mask, states, causal=False)
        rotary = self.rotary(states, position_ids_from_mask(mask))
        for layer in self.layers:
            states = layer(states, attention_mask=bias, position_embeddings=rotary)
        condition = self.projection(self.norm(states))
        if reference is not None and self.config.connector.reference_positions:
            rows, columns = grid or (self.config.grid, self.config.grid)
            table = sincos_pos_embed_2d(condition.shape[-1], rows, columns).to(condition)
            table = (self.reference_gain * table).to(condition.dtype).expand(len(reference), -1, -1)
            added = torch.zeros_like(condition).masked_scatter(is_reference[..., None], table)
            condition = condition + added
        return condition
