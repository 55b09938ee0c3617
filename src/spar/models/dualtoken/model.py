"""DualToken's unified model: an autoregressive LLM over words and dual visual tokens.

At a visual position the LLM reads both vocabularies: the sum of a position's entries passes an MLP of its vocabulary,
and the two results are concatenated along the channels. From the LLM's state before a position two depth heads predict
that position's pixel codes and, given those or not, its semantic codes.
B batch, T sequence tokens, N = h w positions in raster order, L the LLM's width, D depths.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from spar.models.attention import attention_bias, position_ids_from_mask
from spar.models.dualtoken.config import DualTokenConfig
from spar.models.dualtoken.depth_head import DepthHead
from spar.models.dualtoken.sampling import CodeSampling, choose
from spar.models.dualtoken.tokenizer import DualCodes, DualTokenizer
from spar.models.language import LanguageModel
from spar.models.sampling import GREEDY, TextSampling, gumbel_noise


class DualEmbedder(nn.Module):
    """Codes of the vocabularies that the LLM reads to one token a position; they share the channels equally."""

    positions: nn.Parameter | None

    def __init__(self, config: DualTokenConfig) -> None:
        super().__init__()
        self.reads = config.reads
        shape = config.grid**2, config.text.hidden_size
        self.register_parameter("positions", nn.Parameter(torch.zeros(shape)) if config.visual_positions else None)
        for name in config.reads:
            self.add_module(name, self._mlp(getattr(config, name).width, config.text.hidden_size // len(config.reads)))

    @staticmethod
    def _mlp(width: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, vectors: Mapping[str, Tensor], place: int | None = None) -> Tensor:
        """Quantised vectors `[..., N, C]` of the vocabularies that are read, by name, to `[..., N, L]`; or those of one
        `place` in the raster, `[..., C]` to `[..., L]`.
        """
        tokens = torch.cat([self.get_submodule(name)(vectors[name]) for name in self.reads], dim=-1)
        if self.positions is None:
            return tokens
        return tokens + (self.positions if place is None else self.positions[place]).to(tokens.dtype)


class DualTokenModel(nn.Module):
    """One model that understands and generates. Parts: `tokenizer`, `language`, `embedder` and the two heads."""

    def __init__(self, config: DualTokenConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = DualTokenizer(config)
        self.language = LanguageModel(config.text)
        self.embedder = DualEmbedder(config)
        for name, codes in config.vocabularies.items():
            given = config.pixel.width if name == "semantic" and config.semantic_given_pixel else 0
            head = DepthHead(config.text.hidden_size, codes, getattr(config, f"{name}_head"), given)
            self.add_module(f"{name}_head", head)

    @property
    def heads(self) -> dict[str, DepthHead]:
        """By the names of the vocabularies."""
        return {name: getattr(self, f"{name}_head") for name in self.config.vocabularies}

    def embed_codes(self, codes: DualCodes) -> Tensor:
        """Codes `[B, h, w, D]` to LLM tokens `[B, N, L]`, in raster order."""
        return self.embedder(self._vectors(DualCodes(codes.pixel.flatten(1, 2), codes.semantic.flatten(1, 2))))

    def _vectors(self, codes: DualCodes) -> dict[str, Tensor]:
        """Codes `[..., D]` to quantised vectors `[..., C]` of the vocabularies that the LLM reads."""
        quantizers = self.tokenizer.quantizers
        return {name: quantizers[name].decode(getattr(codes, name)) for name in self.config.reads}

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

    def image_logits(self, tokens: Tensor, mask: Tensor, codes: DualCodes) -> dict[str, Tensor]:
        """Teacher forcing of whole images after their prompts: the logits `[B N, D, K]`, by vocabulary.

        Args:
            tokens: `[B, T]`, padded on the left, ending with the image's opening token.
            mask: as `tokens`, 1 for real tokens.
            codes: of the images, `[B, h, w, D]` each.
        """
        visual = self.embed_codes(codes)                                       # [B, N, L]
        embeddings = torch.cat([self.embed(tokens, None).to(visual.dtype), visual[:, :-1]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(visual), visual.shape[1] - 1)], dim=1)
        bias = attention_bias(mask, embeddings, causal=True)
        states = self.language(embeddings, bias, position_ids_from_mask(mask))[0]
        before = states[:, tokens.shape[1] - 1 :].flatten(0, 1)                # [B N, L]
        return self.code_logits(before, DualCodes(codes.pixel.flatten(0, 2), codes.semantic.flatten(0, 2)))

    def code_logits(self, states: Tensor, codes: DualCodes) -> dict[str, Tensor]:
        """Teacher forcing: the logits `[M, D, K]` of given codes, by vocabulary.

        Args:
            states: `[M, L]`, the LLM's states before M positions.
            codes: of these positions, `[M, D]` each.
        """
        quantizers, found, given = self.tokenizer.quantizers, {}, None
        for name, head in self.heads.items():
            sums = quantizers[name].partial_sums(getattr(codes, name))
            found[name] = head(states, sums[..., :-1, :], given if head.from_given else None)
            given = sums[..., -1, :]
        return found

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
        for place in range(self.config.grid**2):
            bias = attention_bias(mask, x, causal=True, past=past)
            final, _ = self.language(x, bias, position_ids, past_key_values=cache)
            past = mask.shape[1]
            codes = self._sample_position(final[:, -1], sampling, generators)
            yield codes
            rows = len(mask) // len(generators)
            x = self.embedder(self._vectors(codes), place).repeat(rows, 1)[:, None].to(x.dtype)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position_ids = position_ids[:, -1:] + 1

    def _sample_position(
        self, states: Tensor, sampling: CodeSampling, generators: Sequence[torch.Generator]
    ) -> DualCodes:
        """The codes `[B, D]` of one position, depth by depth, from the LLM's states `[B or 2 B, L]`."""
        found: dict[str, Tensor] = {}
        given: Tensor | None = None
        rows = len(states) // len(generators)
        for name, head in self.heads.items():
            quantizer = self.tokenizer.quantizers[name]
            depth, entries = quantizer.config.depth, quantizer.config.entries
            noise = gumbel_noise(generators, (depth, entries), states.device)   # [B, D, K]
            codes = torch.zeros(len(generators), 0, dtype=torch.long, device=states.device)
            for d in range(depth):
                sums = states.new_zeros(len(states), 0, quantizer.config.width)
                if d:
                    sums = quantizer.partial_sums(codes).repeat(rows, 1, 1)
                other = given if head.from_given else None
                logits = head(states, sums, other)[:, -1].float()              # [B or 2 B, K]
                codes = torch.cat([codes, choose(logits, noise[:, d], sampling.at_depth(d))[:, None]], dim=1)
            found[name], given = codes, quantizer.decode(codes).repeat(rows, 1)
        return DualCodes(found.get("pixel", found["semantic"]), found["semantic"])

    def understand(
        self, tokens: Tensor, mask: Tensor, codes: DualCodes, *, max_new_tokens: int, sampling: TextSampling = GREEDY
    ) -> list[list[int]]:
        """Answers to `tokens` `[B, T]`, which hold the images' placeholders: ids of each row."""
        embedded = self.embed(tokens, codes)
        return self.language.generate(embedded, mask, max_new_tokens=max_new_tokens, sampling=sampling)
