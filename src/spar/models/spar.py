"""SPAR, the figure of the paper: condition, velocity, decode, understand.

B batch, T sequence tokens, N visual tokens, Q queries, K routed layers, D the LLM's width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spar.models.attention import KeyValue, attention_bias, position_ids_from_mask
from spar.models.config import SparConfig
from spar.models.connector import Connector
from spar.models.denoiser import Denoiser, DenoiserOutput
from spar.models.language import LanguageModel
from spar.models.router import RouterOutput, build_router, normalize_hidden_states, routed_layers
from spar.models.sampling import GREEDY, TextSampling
from spar.models.step_cache import StepCache
from spar.models.tokenizer import UnifiedTokenizer


@dataclass(frozen=True)
class Condition:
    """Condition of the denoiser: `states` `[B, T, C]`, `mask` `[B, T]`, the routing `weights` `[B, T, K]`, and for an
    edit what each cell gets of the image, `reference` `[B, D_r, h, w]`: its normalised latent, and the states of its
    tokens where the denoiser reads those. `key_values` are the keys and values of the denoiser's blocks, if precomputed
    (`SparModel.precompute_key_values`).
    """

    states: Tensor
    mask: Tensor
    weights: Tensor
    reference: Tensor | None = None
    key_values: list[KeyValue] | None = None

    def repeat(self, count: int) -> "Condition":
        """The same for `count` images a prompt, `[B count, ...]`.

        The denoiser could share a prompt's keys and values among its images, but attention would then round an image
        differently in a batch than alone.
        """

        def repeated(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(count, dim=0)

        reference = None if self.reference is None else repeated(self.reference)
        return Condition(repeated(self.states), repeated(self.mask), repeated(self.weights), reference)

    def first(self, count: int) -> "Condition":
        """The first `count` rows alone."""
        reference = None if self.reference is None else self.reference[:count]
        read = self.key_values and [(key[:count], value[:count]) for key, value in self.key_values]
        return Condition(self.states[:count], self.mask[:count], self.weights[:count], reference, read)


class SparModel(nn.Module):
    """One model, four tasks. Parts: `tokenizer`, `language`, `router`, `connector`, `denoiser`."""

    def __init__(self, config: SparConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = routed_layers(config.text.layers, config.router.count)
        self.tokenizer = UnifiedTokenizer(config)
        self.language = LanguageModel(config.text)
        self.router = build_router(config.text.hidden_size, config.router)
        self.connector = Connector(config)
        self.denoiser = Denoiser(config.denoiser, config.autoencoder.latent_channels, config.grid)

    def embed(self, tokens: Tensor, f_v: Tensor | None) -> Tensor:
        """Word embeddings `[B, T, D]` with `f_v` `[images, N, D]` in place of the image placeholders, in order."""
        embeddings = self.language.embed(tokens)
        places = tokens == self.config.text.image_token_id
        if int(places.sum()) != (0 if f_v is None else f_v.shape[0] * f_v.shape[1]):
            raise ValueError(
                f"expected one visual token for each of {int(places.sum())} image placeholders, "
                f"got {'no image' if f_v is None else tuple(f_v.shape)}"
            )
        if f_v is None:
            return embeddings
        return embeddings.masked_scatter(places[..., None], f_v.to(embeddings.dtype))

    def canvas(self, count: int) -> Tensor:
        """`f_v` `[count, N, D]` of a blank image, mid-gray, which a layout is laid out on."""
        side = self.config.image_size
        with torch.no_grad():
            f_v: Tensor = self.tokenizer.encoder(self.tokenizer.encoder.pixel_mean.new_full((1, 3, side, side), 0.5))
        return f_v.float().expand(count, -1, -1)

    def condition(
        self, tokens: Tensor, mask: Tensor, f_v: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Condition:
        """Prompt to condition (SPAR section 3.2).

        Args:
            tokens: `[B, T]` ids, padded on the left; the queries are appended here.
            mask: `[B, T]`, 1 for real tokens.
            f_v: `[references, N, D]` of the reference images whose placeholders are in `tokens`.
            size: height and width of the references in pixels, by default the trained square.
        """
        embeddings, mask = self.sequence(tokens, mask, f_v)                    # [B, T + Q, D]
        is_reference = torch.zeros_like(mask, dtype=torch.bool)
        is_reference[:, : tokens.shape[1]] = tokens == self.config.text.image_token_id
        routed = self.route(embeddings, mask, tokens.shape[1])                 # [B, T + Q, D]
        condition = self.connector(routed.states, mask, is_reference, f_v, self._grid(size))  # [B, T + Q, C]
        reference = None if f_v is None else self._reference_cells(condition, is_reference, f_v, size)
        return Condition(states=condition, mask=mask, weights=routed.weights, reference=reference)

    def sequence(self, tokens: Tensor, mask: Tensor, f_v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the LLM reads for a condition: the tokens' embeddings and the queries, `[B, T + Q, D]`, and their mask.

        Arguments as in `condition`.
        """
        batch, embeddings = len(tokens), self.embed(tokens, f_v)
        tail = self.connector.queries.to(embeddings.dtype).expand(batch, -1, -1)
        ones = mask.new_ones(batch, tail.shape[1])
        return torch.cat([embeddings, tail], dim=1), torch.cat([mask, ones], dim=1)

    def route(self, embeddings: Tensor, mask: Tensor, prompt: int) -> RouterOutput:
        """The routed states of a sequence, of which the first `prompt` tokens are no queries."""
        states = self._routed_states(embeddings, mask, prompt)                 # K of [B, T + Q, D]
        return self.router(normalize_hidden_states(states, self.config.router.scale))

    def _reference_cells(
        self, condition: Tensor, is_reference: Tensor, f_v: Tensor, size: tuple[int, int] | None
    ) -> Tensor | None:
        """What each cell gets of its row's first reference, `[B, D_r, h, w]`, zero in rows without one.

        Its normalised `z_f`, then the condition's states at its tokens, as the denoiser's configuration says. Like the
        latent to denoise, `z_f` is an input: no gradient reaches the tokenizer through it.
        """
        config = self.config.denoiser
        if not (config.reference_latent or config.reference_states):
            return None
        counts = is_reference.sum(1) // f_v.shape[1]                           # references of each row
        has_one, parts = counts > 0, []
        if config.reference_latent:
            with torch.no_grad():
                latents = self.tokenizer.normalize(self.tokenizer.fuse(f_v, size).z_f)
            parts.append(latents[(counts.cumsum(0) - counts)[has_one]])
        if config.reference_states:
            first = is_reference & (is_reference.cumsum(1) <= f_v.shape[1])
            states = condition[first].unflatten(0, (-1, f_v.shape[1]))          # [rows with one, N, C]
            parts.append(states.transpose(1, 2).unflatten(2, self._grid(size)))
        cells = torch.cat(parts, dim=1)
        rows = cells.new_zeros(len(counts), *cells.shape[1:])
        rows[has_one] = cells
        return rows

    def _grid(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of a height and width, by default the trained square."""
        stride = self.config.token_stride
        return (self.config.grid,) * 2 if size is None else (size[0] // stride, size[1] // stride)

    def _routed_states(self, embeddings: Tensor, mask: Tensor, prompt: int) -> list[Tensor]:
        """The K hidden states of every token, in two passes: the first `prompt` tokens, then the queries.

        No token of the prompt attends to a query, so with a frozen LLM its states have no gradient, and training keeps
        only the graph of the queries' pass.
        """
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.language.parameters())
        positions, cache = position_ids_from_mask(mask), self.language.empty_kv_cache()
        words, queries = embeddings[:, :prompt], embeddings[:, prompt:]
        with torch.set_grad_enabled(learns):
            bias = attention_bias(mask[:, :prompt], words, causal=True)
            _, first = self.language(words, bias, positions[:, :prompt], layers=self.layers, past_key_values=cache)
        bias = attention_bias(mask, queries, causal=True, past=prompt)
        _, last = self.language(queries, bias, positions[:, prompt:], layers=self.layers, past_key_values=cache)
        return [torch.cat(pair, dim=1) for pair in zip(first, last, strict=True)]

    def precompute_key_values(self, condition: Condition) -> Condition:
        """The condition with the keys and values that are the same at every step of a sampler."""
        return replace(condition, key_values=self.denoiser.key_values(condition.states))

    def velocity(
        self, latent: Tensor, time: Tensor, condition: Condition, cache: StepCache | None = None
    ) -> DenoiserOutput:
        """Velocity of the normalised latent `[B R, D_p, h, w]`; `time` and `cache` as the denoiser has them."""
        reads = condition.states if condition.key_values is None else condition.key_values
        return self.denoiser(latent, time, reads, condition.mask, condition.reference, cache)

    def decode(self, latent: Tensor, tile: int | None = None) -> Tensor:
        """Normalised latent to pixels in [0, 1]; `tile` as in `UnifiedTokenizer.decode`."""
        return self.tokenizer.decode(self.tokenizer.denormalize(latent), tile).clamp(0, 1)

    def understand(
        self, tokens: Tensor, mask: Tensor, f_v: Tensor, *, max_new_tokens: int, sampling: TextSampling = GREEDY
    ) -> list[list[int]]:
        """Answers to `[B, T]` left-padded questions about images with features `f_v` `[B, N, D]`."""
        embedded = self.embed(tokens, f_v)
        return self.language.generate(embedded, mask, max_new_tokens=max_new_tokens, sampling=sampling)
