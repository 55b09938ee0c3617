from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from spar.common.errors import InputError
from spar.models.config import RouterConfig, RouterKind, SparConfig, TextConfig
from spar.models.router import build_router, normalize_hidden_states, routed_layers

WIDTH, COUNT = 8, 3


def states(*, tokens: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(COUNT, 2, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def router(kind: str, randomize, *, temperature: float = 1.0):
    return randomize(build_router(WIDTH, RouterConfig(kind=kind, count=COUNT, temperature=temperature)))


def behind(built, mixed: torch.Tensor) -> torch.Tensor:
    """W_p(LN(mixed))."""
    normed = F.layer_norm(mixed, (WIDTH,), built.norm.weight, built.norm.bias)
    return normed @ built.projection.weight.T + built.projection.bias


def test_at_the_last_states_scale_the_last_stays_and_the_others_get_its_size():
    h = states() * torch.tensor([1.0, 300.0, 0.02])[:, None, None, None]
    scaled = normalize_hidden_states(list(h), "last")
    assert torch.equal(scaled[-1], h[-1])
    size = scaled.square().mean(-1).sqrt()
    torch.testing.assert_close(size, size[-1:].expand_as(size), rtol=1e-2, atol=1e-4)


def test_raw_states_are_the_papers_equation():
    h = states() * torch.tensor([1.0, 300.0, 0.02])[:, None, None, None]
    assert torch.equal(normalize_hidden_states(list(h), "none"), h)


def test_without_a_norm_the_router_is_the_papers_own_formula(randomize):
    """h = W_p(sum_k w_k alpha_k H_k)."""
    built, h = randomize(build_router(WIDTH, RouterConfig(count=COUNT, norm=False))), states()
    out = built(h)
    mixed = torch.einsum("btk,k,kbtd->btd", out.weights, built.alpha, h)
    torch.testing.assert_close(out.states, mixed @ built.projection.weight.T + built.projection.bias)
    assert not any("norm" in name for name in built.state_dict())


@pytest.mark.parametrize("kind", get_args(RouterKind))
def test_every_tokens_weights_are_shares_of_one(kind, randomize):
    weights = router(kind, randomize)(states()).weights
    assert weights.shape == (2, 5, COUNT) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_dynamic_routing_is_a_softmax_of_the_last_state(temperature, randomize):
    built, h = router("dtr", randomize, temperature=temperature), states()
    first, _, second = built.gate
    logits = F.silu(h[-1] @ first.weight.T + first.bias) @ second.weight.T + second.bias
    weights = torch.softmax(logits / temperature, dim=-1)
    mixed = sum(weights[..., k, None] * built.alpha[k] * h[k] for k in range(COUNT))
    routed = built(h)
    torch.testing.assert_close(routed.weights, weights)
    torch.testing.assert_close(routed.states, behind(built, mixed))


def test_dynamic_routing_learns_to_read_each_kind_of_token_from_its_own_layer(randomize):
    h = states(tokens=40)
    kind = (h[-1, ..., 0] > 0).long()                                                  # seen in the last state only
    h[-1, ..., 0] += 2 * h[-1, ..., 0].sign()
    planted = torch.where(kind[..., None] == 0, h[0], h[1])
    built = build_router(WIDTH, RouterConfig(kind="dtr", count=COUNT))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in (built.gate[0], built.gate[2]):
            layer.reset_parameters()
    with torch.no_grad():
        built.projection.weight.copy_(torch.eye(WIDTH))
        built.projection.bias.zero_()
    target = built.projection(built.norm(planted)).detach()
    optimizer = torch.optim.Adam(built.gate.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(built(h).states, target).backward()
        optimizer.step()
    weights = built(h).weights.detach()
    assert weights[kind == 0, 0].mean() > 0.9 and weights[kind == 1, 1].mean() > 0.9


@pytest.mark.parametrize("layer", range(COUNT))
def test_a_gate_that_points_at_a_layer_reads_that_layer_alone(layer, randomize):
    built, h = router("dtr", randomize), states()
    with torch.no_grad():
        built.gate[2].bias[layer] += 100
    torch.testing.assert_close(built(h).states, behind(built, built.alpha[layer] * h[layer]))


def test_the_last_layer_baseline(randomize):
    built, h = router("last", randomize), states()
    torch.testing.assert_close(built(h).states, behind(built, built.alpha[-1] * h[-1]))
    assert built(h).weights[0, 0].tolist() == [0, 0, 1]


def test_the_static_average_baseline(randomize):
    built, h = router("average", randomize), states()
    torch.testing.assert_close(built(h).states, behind(built, h.mean(0)))
    assert not any("alpha" in name for name in built.state_dict())  # nothing of the mixture is learned


def test_the_token_agnostic_baseline(randomize):
    built, h = router("global", randomize), states()
    weights = torch.softmax(built.logits, 0)
    mixed = sum(weights[k] * built.alpha[k] * h[k] for k in range(COUNT))
    torch.testing.assert_close(built(h).states, behind(built, mixed))
    torch.testing.assert_close(built(h).weights, weights.expand(2, 5, -1))


def test_the_static_concatenation_baseline(randomize):
    built, h = router("concat", randomize), states()
    side_by_side = torch.cat([built.alpha[k] * h[k] for k in range(COUNT)], dim=-1)
    torch.testing.assert_close(
        built(h).states, behind(built, side_by_side @ built.merge.weight.T + built.merge.bias)
    )


def test_a_concatenation_reports_each_layers_share_of_its_merge(randomize):
    built, h = router("concat", randomize), states()
    alone = []
    for k in range(COUNT):  # what is left of the merge when the other layers are silent
        silent = torch.zeros_like(h)
        silent[k] = h[k]
        alone.append((built.mix(silent, None) - built.merge.bias).norm(dim=-1))
    sizes = torch.stack(alone, dim=-1)
    torch.testing.assert_close(built(h).weights, sizes / sizes.sum(-1, keepdim=True))
    with torch.no_grad():
        built.alpha[1:] = 0
    torch.testing.assert_close(built(h).weights[..., 0], torch.ones(2, 5))


@pytest.mark.parametrize(
    ("layers", "count", "wanted"),
    [
        (24, 4, (6, 12, 18, 24)),  # SPAR-1B
        (28, 4, (7, 14, 21, 28)),  # SPAR-3B
        (8, 4, (2, 4, 6, 8)),
        (4, 4, (1, 2, 3, 4)),
        (7, 3, (3, 5, 7)),  # interval floor(7 / 3), counted back from the last
        (11, 4, (5, 7, 9, 11)),
        (5, 1, (5,)),
    ],
)
def test_routed_layers_stand_at_one_interval_and_end_with_the_last(layers, count, wanted):
    assert routed_layers(layers, count) == wanted


def test_more_routed_layers_than_the_llm_has_are_refused():
    with pytest.raises(InputError, match="router.count: expected at most 8 LLM layers, got 9"):
        SparConfig(text=TextConfig(layers=8), router=RouterConfig(count=9))


def test_a_common_scale_forgets_the_size_of_a_state_and_keeps_its_direction():
    h = states()
    scaled = normalize_hidden_states(list(h))
    torch.testing.assert_close(scaled.square().mean(-1), torch.ones(COUNT, 2, 5), rtol=1e-4, atol=0)
    torch.testing.assert_close(F.cosine_similarity(scaled, h, dim=-1), torch.ones(COUNT, 2, 5))
    sizes = torch.tensor([0.1, 1.0, 30.0])[:, None, None, None]
    torch.testing.assert_close(normalize_hidden_states(list(sizes * h)), scaled, rtol=1e-3, atol=1e-4)
