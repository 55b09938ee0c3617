from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from spar.common.errors import InputError
from spar.models.attention import attention_bias, position_ids_from_mask, transformers_attention
from spar.models.early_exit import ExitMap, exit_operations, fit_exits, route_with_exits
from spar.models.router import normalize_hidden_states
from spar.models.spar import SparModel

IMAGE = 5  # the placeholder's id
LENGTHS = (5, 11, 8)
PROMPT = max(LENGTHS)
NEVER, ALWAYS = 0.0, 1.01


@pytest.fixture(scope="module")
def model(config, randomize) -> SparModel:
    return randomize(SparModel(config))


def rows(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of random words, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(7, 128, (length,), generator=generator).tolist() for length in lengths]
    longest = max(lengths)
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    return ids, torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])


def sequences(model: SparModel, count: int = 40) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [model.sequence(*rows(*LENGTHS, seed=seed)) for seed in range(count)]


@pytest.fixture(scope="module")
def exits(model) -> tuple[ExitMap, ...]:
    return fit_exits(model, sequences(model))


def everywhere(exits, threshold: float) -> list[float]:
    """The same threshold at each exit."""
    return [threshold] * len(exits)


def route(model, exits, threshold, lengths=LENGTHS):
    return route_with_exits(
        model, exits, everywhere(exits, threshold), *model.sequence(*rows(*lengths, seed=99)), max(lengths)
    )


# ---- thresholds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [False, True], ids=["prompt", "edit"])
def test_at_threshold_zero_it_is_the_full_model_bit_for_bit(model, exits, image):
    ids, mask = rows(*LENGTHS)
    f_v = None
    if image:
        f_v = torch.randn(3, 16, model.config.text.hidden_size, generator=torch.Generator().manual_seed(0))
        ids = torch.cat([ids, torch.full((3, 16), IMAGE)], dim=1)
        mask = torch.cat([mask, mask.new_ones(3, 16)], dim=1)
    sequence = model.sequence(ids, mask, f_v)
    full = model.route(*sequence, ids.shape[1])
    found = route_with_exits(model, exits, everywhere(exits, NEVER), *sequence, ids.shape[1])
    assert torch.equal(found.routed.states, full.states) and torch.equal(found.routed.weights, full.weights)
    assert (found.depths == model.config.text.layers).all()


def test_above_one_every_token_has_the_first_exits_estimate(model, exits):
    ids, mask = rows(*LENGTHS, seed=99)
    embeddings, mask = model.sequence(ids, mask)
    found, real = route(model, exits, ALWAYS), mask.bool()
    first = model.layers[0]
    assert (found.depths[real] == first).all()
    bias, positions = attention_bias(mask, embeddings, causal=True), position_ids_from_mask(mask)
    _, (state,) = model.language(embeddings, bias, positions, layers=(first,))
    unit = normalize_hidden_states([state])[0]
    weights = exits[0].weights(unit)
    own = normalize_hidden_states([state], model.config.router.scale)[0]
    mixed = weights[..., :1] * model.router.alpha[0] * own + exits[0].rest(unit)
    wanted = model.router.projection(model.router.norm(mixed))
    torch.testing.assert_close(found.routed.states[real], wanted[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.routed.weights[real], weights[real], rtol=1e-4, atol=1e-5)


def test_the_threshold_is_strict_and_the_deeper_layers_weigh_together(model):
    """A planted 0.4 after the first exit and 0.25 after the second, of four routed layers."""
    assert len(model.layers) == 4
    shares, found = torch.tensor([0.6, 0.15, 0.125, 0.125]), {}
    exits = [planted(model, level, shares) for level in range(3)]
    deep = [float(exits[0].weights(torch.zeros(1, 32))[0, level:].sum()) for level in (1, 2, 3)]
    for threshold in (deep[2], deep[2] + 1e-4, deep[1] + 1e-4, deep[0], deep[0] + 1e-4):
        found[threshold] = set(route(model, exits, threshold, (6,)).depths.flatten().tolist())
    assert [*found.values()] == [{4}, {3}, {2}, {2}, {1}]


def test_each_exit_has_its_own_threshold(model, exits):
    real = model.sequence(*rows(*LENGTHS))[1].bool()
    for level, layer in enumerate(model.layers[:-1]):
        thresholds = [NEVER] * level + [ALWAYS] * (len(exits) - level)
        out = route_with_exits(model, exits, thresholds, *model.sequence(*rows(*LENGTHS)), PROMPT)
        assert (out.depths[real] == layer).all()


def planted(model: SparModel, level: int, shares: torch.Tensor) -> ExitMap:
    """A map that gives every token these weights, and zeros for the rest."""
    text = model.config.text
    kept = 2 * text.kv_heads * (text.hidden_size // text.heads) * (text.layers - model.layers[level])
    bias = torch.cat([shares, torch.zeros(text.hidden_size + kept)])
    return ExitMap(len(shares), torch.zeros(text.hidden_size, len(bias)), bias)


# ---- what the maps find ----------------------------------------------------------------------------------------------


def test_the_next_layers_keys_and_values_are_linear_and_so_found_exactly(model):
    """A layer's input enters its keys and values through a norm: linear in the state of unit size."""
    exits = fit_exits(model, sequences(model), ridge=1e-12)
    embeddings, mask = model.sequence(*rows(*LENGTHS, seed=99))
    bias, positions = attention_bias(mask, embeddings, causal=True), position_ids_from_mask(mask)
    for level, depth in enumerate(model.layers[:-1]):
        _, (state,) = model.language(embeddings, bias, positions, layers=(depth,))
        layer = model.language.network.layers[depth]
        normed = layer.input_layernorm(state)
        wanted = torch.cat([layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)], dim=-1)
        found = exits[level].key_values(normalize_hidden_states([state])[0], model.config.text.layers - depth)
        torch.testing.assert_close(found[0][mask.bool()], wanted[mask.bool()], rtol=1e-3, atol=1e-3)


def test_estimated_weights_are_shares_of_one_and_near_the_gates(model, exits):
    full = model.route(*model.sequence(*rows(*LENGTHS, seed=99)), PROMPT)
    real = model.sequence(*rows(*LENGTHS))[1].bool()
    found = route(model, exits, ALWAYS).routed.weights[real]
    torch.testing.assert_close(found.sum(-1), torch.ones(len(found)))
    assert (found >= 0).all()
    wanted = full.weights[real]
    chance = (wanted - wanted.mean(0)).square().mean()
    assert (found - wanted).square().mean() < chance


def test_where_deeper_layers_change_nothing_an_exit_loses_nothing(config, randomize):
    """Layers that add nothing, a gate that says the same of every token: all that is skipped is linear."""
    model = randomize(SparModel(config))
    with torch.no_grad():
        for layer in model.language.network.layers[model.layers[0] :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.language.network.norm.weight.fill_(1)
        model.router.gate[2].weight.zero_()
    exits = fit_exits(model, sequences(model), ridge=1e-12)
    full, found = model.route(*model.sequence(*rows(*LENGTHS, seed=99)), PROMPT), route(model, exits, ALWAYS)
    real = model.sequence(*rows(*LENGTHS))[1].bool()
    assert (found.depths[real] == 1).all()
    torch.testing.assert_close(found.routed.states[real], full.states[real], rtol=1e-3, atol=1e-3)


def test_the_same_sequences_give_the_same_maps_in_any_batches(model, exits):
    again = fit_exits(model, sequences(model))
    assert all(torch.equal(one.matrix, other.matrix) for one, other in zip(exits, again, strict=True))
    assert all(torch.equal(one.bias, other.bias) for one, other in zip(exits, again, strict=True))
    ids, mask = rows(*LENGTHS)
    whole = fit_exits(model, [model.sequence(ids, mask)])
    parts = fit_exits(model, [model.sequence(ids[row : row + 1], mask[row : row + 1]) for row in range(3)])
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.matrix, other.matrix, rtol=1e-3, atol=1e-3)


# ---- packing ---------------------------------------------------------------------------------------------------------


def unpacked(model, exits, threshold, embeddings, mask):
    """The same in plain words: every layer computes all tokens, and those that left take nothing of it."""
    text, heads = model.config.text, (-1, model.config.text.hidden_size // model.config.text.heads)
    bias, positions = attention_bias(mask, embeddings, causal=True), position_ids_from_mask(mask)
    rotary = model.language.network.rotary_emb(embeddings, positions)
    x, left, states = embeddings, torch.zeros_like(mask, dtype=torch.bool), []
    depths = torch.full(mask.shape, text.layers)
    estimates = torch.zeros(text.layers, *mask.shape, 2, text.kv_heads, heads[1])
    weights, rest = torch.zeros(*mask.shape, len(model.layers)), torch.zeros_like(x)
    for i, layer in enumerate(model.language.network.layers):
        own, normed = layer.self_attn, layer.input_layernorm(x)
        query, key, value = (part(normed).unflatten(-1, heads) for part in (own.q_proj, own.k_proj, own.v_proj))
        key = torch.where(left[..., None, None], estimates[i, ..., 0, :, :], key)
        value = torch.where(left[..., None, None], estimates[i, ..., 1, :, :], value)
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *rotary)
        read, _ = transformers_attention(own, query, key, value.transpose(1, 2), bias)
        h = x + own.o_proj(read.flatten(2))
        x = torch.where(left[..., None], x, h + layer.mlp(layer.post_attention_layernorm(h)))
        if i + 1 in model.layers:
            states.append(x)
        if i + 1 in model.layers[:-1]:
            estimate, unit = exits[len(states) - 1], normalize_hidden_states([x])[0]
            asked = estimate.weights(unit)
            leaves = ~left & (asked[..., len(states) :].sum(-1) < threshold)
            depths[leaves], weights[leaves], rest[leaves] = i + 1, asked[leaves], estimate.rest(unit)[leaves]
            filled = estimate.key_values(unit, text.layers - i - 1).unflatten(-1, (2, text.kv_heads, heads[1]))
            estimates[i + 1 :, leaves] = filled[:, leaves]
            left = left | leaves
    states[-1] = model.language.network.norm(x)
    states = normalize_hidden_states(states, model.config.router.scale)
    weights[~left] = model.router.weights(states)[~left]
    mixed = rest
    for layer, alpha, state, share in zip(model.layers, model.router.alpha, states, weights.unbind(-1), strict=True):
        mixed = mixed + torch.where(depths >= layer, share * alpha, 0)[..., None] * state
    return model.router.projection(model.router.norm(mixed)), weights, depths


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.75, ALWAYS])
@pytest.mark.parametrize(("layers", "count"), [(4, 4), (7, 3)])  # an exit after each layer; after the third and fifth
def test_packed_tokens_equal_those_that_are_not(config, randomize, threshold, layers, count):
    text, router = replace(config.text, layers=layers), replace(config.router, count=count)
    model = randomize(SparModel(replace(config, text=text, router=router)))
    exits = fit_exits(model, sequences(model, 10))
    embeddings, mask = model.sequence(*rows(*LENGTHS, seed=99))
    states, weights, depths = unpacked(model, exits, threshold, embeddings, mask)
    found, real = route(model, exits, threshold), mask.bool()
    assert torch.equal(found.depths[real], depths[real])
    torch.testing.assert_close(found.routed.weights[real], weights[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.routed.states[real], states[real], rtol=1e-3, atol=1e-3)


def test_the_packing_is_put_to_the_test_by_rows_of_different_depths(model, exits):
    depths, real = route(model, exits, 0.6).depths, model.sequence(*rows(*LENGTHS))[1].bool()
    assert len(set(depths[real].tolist())) > 2
    assert len({int((row[mask] == 4).sum()) for row, mask in zip(depths, real, strict=True)}) > 1


def test_a_row_does_not_depend_on_its_neighbours_or_its_padding(model, exits):
    ids, mask = rows(*LENGTHS, seed=99)
    together = route(model, exits, 0.6)
    for row, length in enumerate(LENGTHS):
        one = slice(row, row + 1)
        sequence = model.sequence(ids[one, -length:], mask[one, -length:])
        alone = route_with_exits(model, exits, everywhere(exits, 0.6), *sequence, length)
        own = slice(PROMPT - length, None)
        assert torch.equal(together.depths[row, own], alone.depths[0])
        torch.testing.assert_close(together.routed.states[row, own], alone.routed.states[0], rtol=1e-4, atol=1e-5)


# ---- operations ------------------------------------------------------------------------------------------------------


def attention_flops(query, key, value, *_, **__) -> int:
    return int(sdpa_flop_count(query, key, value))


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def counted(function) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("threshold", [NEVER, 0.5, 0.6, ALWAYS])
def test_operations_are_those_that_torch_counts(model, exits, threshold):
    """Of one row without padding, beyond the router, which computes all tokens in both."""
    text, length = model.config.text, 30
    embeddings, mask = model.sequence(*rows(length, seed=99))
    states = torch.zeros(len(model.layers), *embeddings.shape)
    router = counted(lambda: model.router(states))
    found = route(model, exits, threshold, (length,))
    full, spent = exit_operations(text, model.layers, found.depths, mask, length)
    assert counted(lambda: model.route(embeddings, mask, length)) - router == full.sum()
    measured = counted(lambda: route(model, exits, threshold, (length,)))
    assert measured - router == spent.sum()


def test_operations_fall_as_the_threshold_rises(config, randomize):
    """Planted estimates: layers add nothing, so that no exit changes what another token is told."""
    model = randomize(SparModel(config))
    with torch.no_grad():
        for layer in model.language.network.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    exits, (_, mask) = fit_exits(model, sequences(model, 4)), model.sequence(*rows(*LENGTHS))
    spent, depths = [], []
    for threshold in [NEVER, *torch.linspace(0.02, ALWAYS, 30).tolist()]:
        out = route(model, exits, threshold)
        depths.append(out.depths[mask.bool()])
        spent.append(exit_operations(model.config.text, model.layers, out.depths, mask, PROMPT)[1])
    assert all((after <= before).all() for before, after in zip(depths, depths[1:], strict=False))
    assert all((after <= before).all() for before, after in zip(spent, spent[1:], strict=False))
    assert len({int(one.sum()) for one in spent}) > 5
    full = exit_operations(model.config.text, model.layers, out.depths, mask, PROMPT)[0]
    assert spent[-1].sum() < 0.7 * full.sum() and (full[~mask.bool()] == 0).all()


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(config, model, exits, randomize):
    for threshold in (-0.1, float("nan")):
        with pytest.raises(InputError, match="thresholds: expected at least 0, got"):
            route(model, exits, threshold)
    with pytest.raises(InputError, match="expected 3 maps and thresholds, one for each exit, got 2 and 2"):
        route(model, exits[:2], 0.5)
    with pytest.raises(InputError, match="got 3 and 1"):
        route_with_exits(model, exits, [0.5], *model.sequence(*rows(*LENGTHS)), PROMPT)
    with pytest.raises(InputError, match="expected at least one sequence, got none"):
        fit_exits(model, [])
    with pytest.raises(InputError, match="at most 10 tokens at once"):
        route(randomize(SparModel(replace(config, text=replace(config.text, max_positions=10)))), exits, 0.5)
    other = randomize(SparModel(replace(config, router=replace(config.router, kind="global"))))
    for call in (lambda: fit_exits(other, []), lambda: route(other, exits, 0.5)):
        with pytest.raises(InputError, match="expected a router of kind dtr, got global"):
            call()
