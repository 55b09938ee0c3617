"""DualToken's unified model: an autoregressive LLM over words and dual visual tokens.

At a visual position the LLM reads both vocabularies: the sum of a position's entries passes an MLP of its vocabulary,
and the two results are concatenated along the channels. From the LLM's state before a position two depth heads predict
that position's pixel codes and semantic codes.
B batch, T sequence tokens, N = h w positions in raster order, L the LLM's width, D depths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spar.models.attention import attention_bias, position_ids_from_mask
from spar.models.dualtoken.config import DualTokenConfig
from spar.models.dualtoken.depth_head import DepthHead
from spar.models.dualtoken.sampling import CodeSampling, choose, gumbel_noise
from spar.models.dualtoken.tokenizer import DualCodes, DualTokenizer
from spar.models.language import LanguageModel


class DualEmbedder(nn.Module):
    """Codes of both vocabularies to one LLM token a position; each vocabulary has one half of the channels."""

    def __init__(self, config: DualTokenConfig) -> None:
        super().__init__()
        half = config.text.hidden_size // 2
        self.pixel = self._mlp(config.pixel.width, half)
        self.semantic = self._mlp(config.semantic.width, half)

    @staticmethod
    def _mlp(width: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, pixel: Tensor, semantic: Tensor) -> Tensor:
        """Quantised vectors `[..., C]` of both vocabularies to `[..., L]`."""
        return torch.cat([self.pixel(pixel), self.semantic(semantic)], dim=-1)


@dataclass(frozen=True)
class CodeLogits:
    """Logits of the codes of M positions, `pixel` `[M, D_pix, K_pix]` and `semantic` `[M, D_sem, K_sem]`."""

    pixel: Tensor
    semantic: Tensor


class DualTokenModel(nn.Module):
    """One model that understands and generates. Parts: `tokenizer`, `language`, `embedder` and the two heads."""

    def __init__(self, config: DualTokenConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = DualTokenizer(config)
        self.language = LanguageModel(config.text)
        self.embedder = DualEmbedder(config)
        self.pixel_head = DepthHead(config.text.hidden_size, config.pixel, config.pixel_head)
        self.semantic_head = DepthHead(config.text.hidden_size, config.semantic, config.semantic_head)

    def embed_codes(self, codes: DualCodes) -> Tensor:
        """Codes `[B, h, w, D]` to LLM tokens `[B, N, L]`, in raster order."""
        tokenizer = self.tokenizer
        pixel = tokenizer.pixel_quantizer.decode(codes.pixel)
        return self.embedder(pixel, tokenizer.semantic_quantizer.decode(codes.semantic)).flatten(1, 2)

    def embed(self, tokens: Tensor, codes: DualCodes | None) -> Tensor:
        """Word embeddings `[B, T, L]` with the images' tokens in place of the image placeholders, in order."""
        embeddings = self.language.embed(tokens)
        places = tokens == self.config.text.image_token_id
        expected = 0 if codes is None else len(codes) * self.config.grid**2
        if int(places.sum()) != expected:
            raise ValueError(
                f"expected one visual token for each of {int(places.sum())} image placeholders, got {expected}"
            )
        if codes is None:
            return embeddings
        return embeddings.masked_scatter(places[..., None], self.embed_codes(codes).to(embeddings.dtype))

    def code_logits(self, states: Tensor, codes: DualCodes) -> CodeLogits:
        """Teacher forcing: the logits of given codes.

        Args:
            states: `[M, L]`, the LLM's states before M positions.
            codes: of these positions, `[M, D]` each.
        """
        pixel = self.tokenizer.pixel_quantizer.partial_sums(codes.pixel)[..., :-1, :]
        semantic = self.tokenizer.semantic_quantizer.partial_sums(codes.semantic)[..., :-1, :]
        return CodeLogits(self.pixel_head(states, pixel), self.semantic_head(states, semantic))

    def generate_codes(
        self, tokens: Tensor, mask: Tensor, sampling: CodeSampling, generators: Sequence[torch.Generator]
    ) -> Iterator[DualCodes]:
        """Sample images position by position; each step yields the codes of its position, `[B, D]` each.

        The caller disables gradients. An image depends on its own generator and never on the rest of the batch.

        Args:
            tokens: `[B, T]`, or with guidance `[2 B, T]`: the unconditional prompts after the prompts; padded on the
                left, ending with the image's opening token.
            mask: as `tokens`, 1 for real tokens.
            generators: of each image.
        """
        x, cache = self.embed(tokens, None), self.language.empty_kv_cache()
        position_ids, past = position_ids_from_mask(mask), 0
        for _ in range(self.config.grid**2):
            bias = attention_bias(mask, x, causal=True, past=past)
            final, _ = self.language(x, bias, position_ids, past_key_values=cache)
            past = mask.shape[1]
            codes = self._sample_position(final[:, -1], sampling, generators)
            yield codes
            rows = len(mask) // len(generators)
            x = self.embedder(
                self.tokenizer.pixel_quantizer.decode(codes.pixel),
                self.tokenizer.semantic_quantizer.decode(codes.semantic),
            ).repeat(rows, 1)[:, None].to(x.dtype)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position_ids = position_ids[:, -1:] + 1

    def _sample_position(
        self, states: Tensor, sampling: CodeSampling, generators: Sequence[torch.Generator]
    ) -> DualCodes:
        """The codes `[B, D]` of one position, depth by depth, from the LLM's states `[B or 2 B, L]`."""
        found, rows = [], len(states) // len(generators)
        parts = (
            (self.pixel_head, self.tokenizer.pixel_quantizer), (self.semantic_head, self.tokenizer.semantic_quantizer)
        )  # fmt: skip
        for head, quantizer in parts:
            depth, entries = quantizer.config.depth, quantizer.config.entries
            noise = gumbel_noise(generators, (depth, entries), states.device)   # [B, D, K]
            codes = torch.zeros(len(generators), 0, dtype=torch.long, device=states.device)
            for d in range(depth):
                sums = states.new_zeros(len(states), 0, quantizer.config.width)
                if d:
                    sums = quantizer.partial_sums(codes).repeat(rows, 1, 1)
                logits = head(states, sums)[:, -1].float()                     # [B or 2 B, K]
                codes = torch.cat([codes, choose(logits, noise[:, d], sampling)[:, None]], dim=1)
            found.append(codes)
        return DualCodes(*found)

    def understand(self, tokens: Tensor, mask: Tensor, codes: DualCodes, *, max_new_tokens: int) -> list[list[int]]:
        """Greedy answers to `tokens` `[B, T]`, which hold the images' placeholders: ids of each row."""
        return self.language.generate(self.embed(tokens, codes), mask, max_new_tokens=max_new_tokens)
