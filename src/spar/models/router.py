"""Dynamic Token Routing and its four baselines (SPAR section 3.2): K hidden states per token to one state.

Every router takes `[K, B, T, D]` states on a common scale and returns the mixed state and its weights. `routed_layers`
gives the layers of the K states; a router knows only their number.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from spar.models.config import RouterConfig


def routed_layers(layers: int, count: int) -> tuple[int, ...]:
    """The K layers at interval floor(L / K) that end with the last: (6, 12, 18, 24) for L = 24, K = 4."""
    interval = layers // count
    return tuple(layers - interval * k for k in reversed(range(count)))


def normalize_hidden_states(states: list[Tensor], scale: Literal["unit", "last", "none"] = "unit") -> Tensor:
    """Stack K states `[B, T, D]` to `[K, B, T, D]`, each scaled to root mean square 1, or to that of its last state.

    transformers returns the last state after the final norm and the others before it; without a common scale the layer
    with the largest norm, not the softmax, dominates the mixture. With "last" the last state is unchanged. With "none"
    all are as they come, as in the paper's equation.
    """
    x = torch.stack(states)
    if scale == "none":
        return x
    squares = x.float().pow(2).mean(-1, keepdim=True) + 1e-6                    # [K, B, T, 1]
    return x * (squares.rsqrt() if scale == "unit" else (squares[-1] / squares).sqrt()).to(x.dtype)


@dataclass(frozen=True)
class RouterOutput:
    """`states` `[B, T, D]`, and `weights` `[B, T, K]`, each layer's share of the mixture: they sum to 1 over K."""

    states: Tensor
    weights: Tensor


class Router(nn.Module):
    """Base class of the routers: weights, scaled sum, LayerNorm, W_p. A subclass defines the weights."""

    def __init__(self, width: int, config: RouterConfig) -> None:
        super().__init__()
        self.count = config.count
        self.alpha = nn.Parameter(torch.ones(config.count))
        self.norm = nn.LayerNorm(width) if config.norm else nn.Identity()
        self.projection = nn.Linear(width, width)

    def weights(self, states: Tensor) -> Tensor:
        """`[K, B, T, D]` to `[B, T, K]`."""
        raise NotImplementedError  # pragma: no cover

    def mix(self, states: Tensor, weights: Tensor) -> Tensor:
        """sum_k w_k alpha_k H_k: `[B, T, D]`."""
        scaled = weights * self.alpha.to(weights.dtype)
        return torch.einsum("kbtd,btk->btd", states, scaled.to(states.dtype))

    def forward(self, states: Tensor) -> RouterOutput:
        weights = self.weights(states)                       # [B, T, K]
        mixed = self.mix(states, weights)                    # [B, T, D]
        return RouterOutput(self.projection(self.norm(mixed)), weights)


class DynamicTokenRouter(Router):
    """w_i = softmax(g(H_i^(K)) / tau), g: Linear D to D/2, SiLU, Linear to K."""

    def __init__(self, width: int, config: RouterConfig) -> None:
        super().__init__(width, config)
        self.temperature = config.temperature
        self.gate = nn.Sequential(nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, config.count))

    def weights(self, states: Tensor) -> Tensor:
        return torch.softmax(self.gate(states[-1]).float() / self.temperature, dim=-1)


class LastLayerRouter(Router):
    """Every token reads the last layer."""

    def weights(self, states: Tensor) -> Tensor:
        return states.new_tensor([0.0] * (self.count - 1) + [1.0]).expand(*states.shape[1:3], -1)


class AverageRouter(Router):
    """Every token reads the plain mean of the K layers; nothing is learned, so there is no alpha."""

    def __init__(self, width: int, config: RouterConfig) -> None:
        super().__init__(width, config)
        self.register_parameter("alpha", None)

    def mix(self, states: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("kbtd,btk->btd", states, weights.to(states.dtype))

    def weights(self, states: Tensor) -> Tensor:
        return states.new_full((self.count,), 1 / self.count).expand(*states.shape[1:3], -1)


class GlobalRouter(Router):
    """Learned weights over the K layers, the same for every token."""

    def __init__(self, width: int, config: RouterConfig) -> None:
        super().__init__(width, config)
        self.logits = nn.Parameter(torch.zeros(config.count))

    def weights(self, states: Tensor) -> Tensor:
        return torch.softmax(self.logits, dim=-1).expand(*states.shape[1:3], -1)


class ConcatRouter(Router):
    """The K layers concatenated and a linear map M = [M_1 .. M_K].

    It has no weights: it reports each layer's share of the merge, |M_k alpha_k H_k| over their sum.
    """

    def __init__(self, width: int, config: RouterConfig) -> None:
        super().__init__(width, config)
        self.merge = nn.Linear(config.count * width, width)

    @torch.no_grad()
    def weights(self, states: Tensor) -> Tensor:
        maps = self.merge.weight.unflatten(1, (self.count, -1))                        # [D, K, D]
        parts = torch.einsum("kbtd,ekd->btke", self._scaled(states), maps.to(states.dtype))
        sizes = parts.float().norm(dim=-1) + 1e-12                                     # [B, T, K]
        return sizes / sizes.sum(-1, keepdim=True)

    def mix(self, states: Tensor, weights: Tensor) -> Tensor:
        return self.merge(self._scaled(states).permute(1, 2, 0, 3).flatten(2))

    def _scaled(self, states: Tensor) -> Tensor:
        return states * self.alpha.to(states.dtype)[:, None, None, None]


ROUTERS: dict[str, type[Router]] = {
    "dtr": DynamicTokenRouter,
    "last": LastLayerRouter,
    "average": AverageRouter,
    "concat": ConcatRouter,
    "global": GlobalRouter,
}


def build_router(width: int, config: RouterConfig) -> Router:
    """The router of a configuration; `width` is the LLM's."""
    return ROUTERS[config.kind](width, config)
