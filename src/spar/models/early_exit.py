"""Early exit, an experiment (docs/evidence.md): a token leaves the LLM once deeper layers matter little to its mixture.

The router's gate reads the last layer, which a token that leaves never has. So after each routed layer but the last a
linear map of the token's state there estimates what the skipped depths would give: the routing weights, by which the
token leaves or stays; what the deeper layers add to its mixture; and their keys and values, since later tokens still
attend to it. A skipped layer then costs a token one small product, without queries, attention and MLP. (CALM, arXiv
2207.07061, copies the state to the skipped layers, which is further from the full model for the same operations.)

B batch, T prompt tokens, Q queries, D width, K routed layers, L layers, V keys and values of a token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from spar.common.errors import InputError
from spar.models.attention import KeyValue, attention_bias, position_ids_from_mask, transformers_attention
from spar.models.config import TextConfig
from spar.models.language import LayerKVCache
from spar.models.router import DynamicTokenRouter, RouterOutput, normalize_hidden_states
from spar.models.spar import SparModel

RIDGE = 1e-3  # of the mean square of a state's channels


@dataclass(frozen=True)
class ExitMap:
    """What the states `[n, D]`, of unit size, after a routed layer say of the depths after it.

    Attributes:
        count: K.
        matrix: `[D, K + D + (layers left) V]`; `bias` alike. The columns are the K routing weights, what the deeper
            routed layers add to the mixture, and the keys, before rotation, and values of each layer left.
    """

    count: int
    matrix: Tensor
    bias: Tensor

    def weights(self, states: Tensor) -> Tensor:
        """Estimated routing weights `[n, K]`: none is negative, and their sum is 1."""
        found = self._estimate(states, 0, self.count).clamp_min(0)
        return found / found.sum(-1, keepdim=True)

    def rest(self, states: Tensor) -> Tensor:
        """What the deeper routed layers add to the mixture: `[n, D]`."""
        return self._estimate(states, self.count, self.count + len(self.matrix))

    def key_values(self, states: Tensor, layers: int) -> Tensor:
        """Keys and values of the `layers` left: `[layers, n, V]`."""
        flat = self._estimate(states, self.count + len(self.matrix), None)
        return flat.unflatten(-1, (layers, -1)).movedim(-2, 0)

    def _estimate(self, states: Tensor, start: int, stop: int | None) -> Tensor:
        return (states @ self.matrix[:, start:stop] + self.bias[start:stop]).float()  # autocast rounds products


@dataclass(frozen=True)
class ExitOutput:
    """The router's output, whose weights are estimates where a token left, and the LLM layers that each token had,
    `depths` `[B, T + Q]`.
    """

    routed: RouterOutput
    depths: Tensor


@torch.no_grad()
def fit_exits(
    model: SparModel, sequences: Iterable[tuple[Tensor, Tensor]], ridge: float = RIDGE
) -> tuple[ExitMap, ...]:
    """The maps that estimate best, by ridge regression on what the full model does with some sequences.

    Args:
        model: of a router with a gate.
        sequences: embeddings and masks, as `SparModel.sequence` has them.
        ridge: the penalty of a slope, as a share of the mean square of a state's channels. The bias has none, so that
            estimated weights sum to 1.

    Raises:
        InputError: another router, or no sequence.
    """
    _check_router(model)
    sums: list[tuple[Tensor, Tensor]] = []
    for embeddings, mask in sequences:
        pairs = [_products(*pair) for pair in _states_and_targets(model, embeddings, mask)]
        sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, pairs, strict=True)] if sums else pairs
    if not sums:
        raise InputError("fit_exits: expected at least one sequence, got none")
    exits = []
    for gram, cross in sums:
        penalty = ridge * gram.diagonal()[:-1].mean() * torch.ones_like(gram[0])
        penalty[-1] = 0
        found = torch.linalg.solve(gram + penalty.diag(), cross).float()
        exits.append(ExitMap(len(model.layers), found[:-1].contiguous(), found[-1].contiguous()))
    return tuple(exits)


def _products(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the normal equations, with a last channel of ones for the bias."""
    ones = torch.cat([states.double(), states.new_ones(len(states), 1).double()], dim=1)
    return ones.T @ ones, ones.T @ targets.double()


def _states_and_targets(model: SparModel, embeddings: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each exit the states of all real tokens `[n, D]`, and what its map should give of them."""
    layers, router, real = model.language.network.layers, model.router, mask.bool()
    bias, positions = attention_bias(mask, embeddings, causal=True), position_ids_from_mask(mask)
    _, every = model.language(embeddings, bias, positions, layers=tuple(range(len(layers) + 1)))
    routed = normalize_hidden_states([every[i] for i in model.layers], model.config.router.scale)
    weights, pairs = router.weights(routed), []
    for level, depth in enumerate(model.layers[:-1]):
        deeper = slice(level + 1, None)
        rest = torch.einsum("kbtd,btk,k->btd", routed[deeper], weights[..., deeper], router.alpha[deeper])
        left = [part for i in range(depth, len(layers)) for part in _key_value(layers[i], every[i])]
        targets = torch.cat([weights, rest, *left], dim=-1)
        pairs.append((_unit(every[depth])[real], targets[real]))
    return pairs


def _key_value(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's keys, before rotation, and values of its input."""
    normed = layer.input_layernorm(x)
    return layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)


def _unit(x: Tensor) -> Tensor:
    return normalize_hidden_states([x])[0]


def _check_router(model: SparModel) -> None:
    if not isinstance(model.router, DynamicTokenRouter):
        raise InputError(f"early exit: expected a router of kind dtr, got {model.config.router.kind}")


class _Pass:
    """One pass over some tokens of a sequence, which leave it one by one.

    Padding goes on until the first token leaves: a pass that none leaves is the plain one, bit for bit.
    """

    def __init__(
        self, model: SparModel, exits: Sequence[ExitMap], thresholds: Sequence[float], real: Tensor
    ) -> None:
        text = model.config.text
        self.model, self.exits, self.thresholds, self.real = model, exits, thresholds, real
        self.going = torch.ones_like(real)                                      # [B, T]
        self.depths = torch.full(real.shape, text.layers, device=real.device)
        shape, kept = (*real.shape, len(model.layers)), 2 * text.kv_heads * (text.hidden_size // text.heads)
        self.weights = torch.zeros(shape, device=real.device)                   # [B, T, K]
        self.rest = torch.zeros(*real.shape, text.hidden_size, device=real.device)
        self.key_values = torch.zeros(text.layers, *real.shape, kept, device=real.device)

    def run(self, x: Tensor, bias: Tensor, positions: Tensor, cache: list[KeyValue | None]) -> list[Tensor]:
        """The K states of the tokens `[B, T, D]`, in which one that left stays; `cache` as the LLM has it."""
        network, states = self.model.language.network, []
        rotary = network.rotary_emb(x, positions)
        for i, layer in enumerate(network.layers, start=1):
            past = LayerKVCache(cache[i - 1])
            if bool(self.going.all()):
                x = layer(x, bias, positions, past, position_embeddings=rotary)
            else:
                x = self._layer(layer, self.key_values[i - 1], x, bias, past, rotary)
            cache[i - 1] = past.key_value
            if i in self.model.layers:
                states.append(x)
                if i < len(network.layers):
                    self._leave(len(states) - 1, i, x)
        return [*states[:-1], network.norm(x)]

    def _leave(self, level: int, depth: int, x: Tensor) -> None:
        """Let those tokens go whose deeper routed layers are estimated to weigh less than its threshold."""
        staying, estimate = self.going & self.real, self.exits[level]
        states = _unit(x[staying]).float()                                      # [n, D]
        weights = estimate.weights(states)
        leaves = weights[:, level + 1 :].sum(-1) < self.thresholds[level]
        if not bool(leaves.any()):
            return
        states, left = states[leaves], torch.zeros_like(staying)
        left[staying] = leaves
        self.going, self.depths[left] = staying & ~left, depth
        self.weights[left], self.rest[left] = weights[leaves], estimate.rest(states)
        self.key_values[depth:, left] = estimate.key_values(states, len(self.key_values) - depth)

    def _layer(
        self, layer: Any, key_values: Tensor, x: Tensor, bias: Tensor, past: LayerKVCache,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        """A layer for the tokens that go on, packed to the left; the others have the estimated `key_values`."""
        attention, going = layer.self_attn, self.going
        heads, (cos, sin) = (-1, attention.head_dim), rotary
        h = x[going]                                                            # [n, D]
        normed = layer.input_layernorm(h)
        new = torch.cat([attention.k_proj(normed), attention.v_proj(normed)], dim=-1)
        both = key_values.to(new.dtype, copy=True)
        both[going] = new
        key, value = (part.unflatten(-1, heads).transpose(1, 2) for part in both.chunk(2, dim=-1))
        key, _ = apply_rotary_pos_emb(key, key, cos, sin)
        key, value = past.update(key, value)
        if not len(h):
            return x
        most = int(going.sum(1).max())
        order = torch.argsort(~going, dim=1, stable=True)[:, :most]             # [B, G]: those that go on come first
        packed, at = going.gather(1, order), order[..., None]
        query = torch.zeros(*order.shape, attention.q_proj.out_features, dtype=new.dtype, device=x.device)
        query[packed] = attention.q_proj(normed)
        query = query.unflatten(-1, heads).transpose(1, 2)
        places = (part.gather(1, at.expand(-1, -1, part.shape[-1])) for part in rotary)
        query, _ = apply_rotary_pos_emb(query, query, *places)
        rows = bias.gather(2, at[:, None].expand(-1, -1, -1, bias.shape[-1]))
        read, _ = transformers_attention(attention, query, key, value, rows)    # [B, G, heads, d]
        h = h + attention.o_proj(read.flatten(2)[packed])
        h = h + layer.mlp(layer.post_attention_layernorm(h))
        out = x.clone()
        out[going] = h.to(x.dtype)
        return out


@torch.no_grad()
def route_with_exits(
    model: SparModel, exits: Sequence[ExitMap], thresholds: Sequence[float], embeddings: Tensor, mask: Tensor,
    prompt: int,
) -> ExitOutput:  # fmt: skip
    """`SparModel.route` in which a token leaves the LLM after the first routed layer where the deeper ones together are
    estimated to weigh less than that exit's threshold: at 0 none does, and if it is 0 everywhere the result is the full
    model's, bit for bit; above 1 all do.

    Args:
        exits: of `fit_exits`.
        thresholds: of each exit, from 0.
        embeddings: as `SparModel.route` has them.
        mask: likewise.
        prompt: likewise.

    Raises:
        InputError: another router, other numbers of exits or thresholds, a negative threshold, or too long a sequence.
    """
    _check_router(model)
    layers = torch.tensor(model.layers, device=mask.device)
    if not len(exits) == len(thresholds) == len(layers) - 1:
        raise InputError(
            f"early exit: expected {len(layers) - 1} maps and thresholds, one for each exit, got {len(exits)} and "
            f"{len(thresholds)}"
        )
    if not all(threshold >= 0 for threshold in thresholds):
        raise InputError(f"thresholds: expected at least 0, got {', '.join(map(str, thresholds))}")
    positions, cache = position_ids_from_mask(mask), model.language.empty_kv_cache()
    model.language.check_length(int(positions.max()) + 1)
    passes, kept = [], []
    for start, stop in ((0, prompt), (prompt, mask.shape[1])):                  # as `SparModel.route`: then the queries
        part = slice(start, stop)
        bias = attention_bias(mask[:, :stop], embeddings[:, part], causal=True, past=start)
        passes.append(_Pass(model, exits, thresholds, mask[:, part].bool()))
        kept.append(passes[-1].run(embeddings[:, part], bias, positions[:, part], cache))
    states = normalize_hidden_states([torch.cat(pair, dim=1) for pair in zip(*kept, strict=True)],
                                     model.config.router.scale)                 # [K, B, T + Q, D]
    weights, rest, depths = (
        torch.cat([getattr(one, name) for one in passes], dim=1) for name in ("weights", "rest", "depths")
    )
    left = (depths < model.config.text.layers)[..., None]
    weights = torch.where(left, weights, model.router.weights(states))
    mixed = model.router.mix(states, weights * (layers <= depths[..., None]))
    mixed = torch.where(left, mixed + rest, mixed)
    return ExitOutput(RouterOutput(model.router.projection(model.router.norm(mixed)), weights), depths)


def exit_operations(
    text: TextConfig, layers: Sequence[int], depths: Tensor, mask: Tensor, prompt: int
) -> tuple[Tensor, Tensor]:
    """Floating-point operations of the LLM for each token, `[B, T + Q]` each, 0 for padding: of the full model, and
    with exits, whose maps are included. The router is not.

    A token attends to all real tokens of its pass, and a query to the prompt's too: torch masks, and skips none.

    Args:
        layers: the routed ones.
        depths: of `ExitOutput`; `mask` and `prompt` as it had them.
    """
    width, head = text.hidden_size, text.hidden_size // text.heads
    kept = 2 * width * 2 * text.kv_heads * head                                 # keys and values
    products = kept + 2 * width * (2 * text.heads * head + 3 * text.intermediate_size)
    real, is_query = mask.bool(), torch.arange(mask.shape[1], device=mask.device) >= prompt
    seen = torch.where(is_query, mask.sum(1, keepdim=True), mask[:, :prompt].sum(1, keepdim=True))
    layer = products + 4 * seen * text.heads * head                             # [B, T + Q]
    asked = sum((depths >= depth).long() for depth in layers[:-1])
    left = depths < text.layers
    maps = 2 * width * (len(layers) * asked + width * left)
    spent = layer * depths + kept * (text.layers - depths) + maps
    return layer * text.layers * real, spent * real
