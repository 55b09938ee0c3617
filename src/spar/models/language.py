"""The language model: embeddings, the K routed hidden states, next-token logits, answers.

transformers' `Qwen2Model` has the weights; the pass over its layers is ours, so that only the routed states are kept.
B batch, T tokens, D width, K routed layers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Model

from spar.common.errors import InputError
from spar.models.attention import ATTENTION, KeyValue, attention_bias, position_ids_from_mask
from spar.models.config import TextConfig
from spar.models.encoder import qwen_config
from spar.models.sampling import GREEDY, TextSampling


class LayerKVCache:
    """Keys and values `[B, heads, T, d]` of one layer for the tokens before the current ones.

    transformers' layers call `update`. It does not change `past`, so that a layer may be computed twice (activation
    checkpointing), and ignores the layer's index, since torch.compile would otherwise compile each layer separately.
    """

    def __init__(self, before: KeyValue | None = None) -> None:
        self.past, self.key_value = before, before

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> KeyValue:
        """Keys and values of all tokens including the new ones.

        Further arguments of a layer (its index; keywords from transformers 5.24 on) are for other caches.
        """
        if self.past is not None:
            key, value = torch.cat([self.past[0], key], dim=2), torch.cat([self.past[1], value], dim=2)
        self.key_value = (key, value)
        return self.key_value


class LanguageModel(nn.Module):
    """Causal LLM; `network` has transformers' own parameter names, `head` exists if it is not tied."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        library = qwen_config(config)
        library._attn_implementation = ATTENTION
        self.config = config
        self.network = Qwen2Model(library)
        self.head = None if config.tied_head else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """`[B, T]` ids to `[B, T, D]`."""
        return self.network.embed_tokens(tokens)

    def empty_kv_cache(self) -> list[KeyValue | None]:
        """The cache of each layer before the first token."""
        return [None] * len(self.network.layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[B, T, D]` final states to `[B, T, vocabulary]`, with the token embeddings if the head is tied."""
        return nn.functional.linear(hidden, (self.head or self.network.embed_tokens).weight)

    def forward(
        self,
        embeddings: Tensor,
        bias: Tensor,
        position_ids: Tensor,
        *,
        layers: tuple[int, ...] = (),
        past_key_values: list[KeyValue | None] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the LLM.

        Args:
            embeddings: `[B, T, D]`.
            bias: additive attention bias `[B, 1, T, T_total]`.
            position_ids: `[B, T]`.
            layers: the hidden states to keep, 0 the embedding output, L the last layer after the final norm
                (transformers' own numbering).
            past_key_values: each layer's keys and values of the earlier tokens, replaced by those of all.

        Returns:
            The final states `[B, T, D]` and the kept states, each `[B, T, D]`.

        Raises:
            InputError: a sequence with more tokens, padding not counted, than the model has positions.
        """
        self.check_length(int(position_ids.max()) + 1)
        network, kept = self.network, {0: embeddings}
        rotary = network.rotary_emb(embeddings, position_ids)
        x = embeddings
        for i, layer in enumerate(network.layers, start=1):
            past = LayerKVCache(past_key_values[i - 1]) if past_key_values else None
            # Positional: transformers 5.24 calls the fourth `cache`, and deprecates 5.23's name, `past_key_values`.
            x = layer(x, bias, position_ids, past, position_embeddings=rotary)
            if past and past_key_values:
                past_key_values[i - 1] = past.key_value
            if i in layers:
                kept[i] = x
        final = network.norm(x)
        kept[self.config.layers] = final
        return final, [kept[i] for i in layers]

    def check_length(self, tokens: int) -> None:
        """Refuse more tokens than the model has positions."""
        if tokens > self.config.max_seq_len:
            raise InputError(
                f"the language model takes at most {self.config.max_seq_len} tokens at once (prompt, images, queries "
                f"and answer together; text.max_positions), got {tokens}"
            )

    @torch.inference_mode()
    def generate(
        self, embeddings: Tensor, mask: Tensor, *, max_new_tokens: int, sampling: TextSampling = GREEDY
    ) -> list[list[int]]:
        """Continuation, batched; each row ends before its own end-of-turn token. Arguments as in `stream`."""
        rows: list[list[int]] = [[] for _ in range(len(embeddings))]
        for step in self.stream(embeddings, mask, max_new_tokens=max_new_tokens, sampling=sampling):
            for row, token in zip(rows, step, strict=True):
                if token is not None:
                    row.append(token)
        return rows

    def stream(
        self, embeddings: Tensor, mask: Tensor, *, max_new_tokens: int, sampling: TextSampling = GREEDY
    ) -> Iterator[list[int | None]]:
        """The same continuation token by token: each step has one token per row, or None if the row has ended.

        The caller disables gradients.

        Args:
            embeddings: `[B, T, D]`, padded on the left; mask: `[B, T]`.
            sampling: with a seed for each row, which draws the same in any batch.

        Raises:
            InputError: the longest answer would not fit after its question.
        """
        self.check_length(int(mask.sum(1).max()) + max_new_tokens)
        return self._steps(embeddings, mask, max_new_tokens, sampling)

    def _steps(
        self, x: Tensor, mask: Tensor, max_new_tokens: int, sampling: TextSampling
    ) -> Iterator[list[int | None]]:
        choose = sampling.chooser()
        seen, past, position_ids = self.empty_kv_cache(), 0, position_ids_from_mask(mask)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(max_new_tokens):
            bias = attention_bias(mask, x, causal=True, past=past)
            final, _ = self(x, bias, position_ids, past_key_values=seen)
            past = mask.shape[1]
            token = choose(self.logits(final[:, -1]))
            done = done | (token == self.config.eos_token_id)
            if bool(done.all()):
                return
            yield [None if ended else value for value, ended in zip(token.tolist(), done.tolist(), strict=True)]
            x = self.embed(token)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position_ids = position_ids[:, -1:] + 1
