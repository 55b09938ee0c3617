import copy
from dataclasses import replace

import pytest
import torch

from spar.models.attention import sincos_pos_embed_2d
from spar.models.connector import Connector
from spar.models.language import LanguageModel

REFERENCES = 16  # visual tokens of one reference
MASK = torch.tensor([[0] * 3 + [1] * 20, [1] * 23])
IS_REFERENCE = torch.zeros(2, 23, dtype=torch.bool)
IS_REFERENCE[1, 4 : 4 + REFERENCES] = True  # only the second row has one


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def connector(config, randomize) -> Connector:
    return randomize(Connector(config))


@pytest.fixture(scope="module")
def straight(config, randomize) -> Connector:
    """A connector whose layers pass their input on, so that what enters at a place leaves at that place."""
    built = randomize(Connector(config))
    for layer in built.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return built


def changed(connector: Connector, states: torch.Tensor, other: torch.Tensor) -> list[list[bool]]:
    """Where the condition differs between two sequences of states without references."""
    nowhere = torch.zeros(states.shape[:2], dtype=torch.bool)
    mask = MASK[: len(states)]
    before, after = (connector(x, mask, nowhere, None) for x in (states, other))
    return ((before - after).abs().amax(-1) > 1e-6).tolist()


def test_every_real_token_sees_every_other_and_none_sees_padding(connector):
    states = draw(2, 23, 32)
    last, padding = states.clone(), states.clone()
    last[:, 22] = draw(2, 32, seed=1)
    padding[0, :3] = draw(3, 32, seed=2)
    assert all(changed(connector, states, last)[1])
    assert all(changed(connector, states, last)[0][3:])
    assert not any(changed(connector, states, padding)[0][3:])


def test_without_a_reference_the_condition_is_the_projection_of_the_states(straight):
    states = draw(2, 23, 32)
    condition = straight(states, MASK, torch.zeros_like(IS_REFERENCE), None)
    torch.testing.assert_close(condition, straight.projection(straight.norm(states)))


def test_a_reference_stands_at_its_own_positions_and_nowhere_else(config, straight):
    states, f_v = draw(2, 23, 32), 7.0 * draw(1, REFERENCES, 32, seed=1)
    condition = straight(states, MASK, IS_REFERENCE, f_v)
    plain = straight.projection(straight.norm(states))
    torch.testing.assert_close(condition[~IS_REFERENCE], plain[~IS_REFERENCE])
    at_unit_size = f_v / f_v.square().mean(-1, keepdim=True).sqrt()
    table = straight.reference_gain * sincos_pos_embed_2d(config.denoiser.caption_channels, 4, 4)
    wanted = straight.projection(straight.norm(at_unit_size))[0] + table
    torch.testing.assert_close(condition[IS_REFERENCE], wanted, rtol=1e-4, atol=1e-4)


def test_the_routed_states_at_reference_positions_are_replaced(connector):
    states, f_v = draw(2, 23, 32), draw(1, REFERENCES, 32, seed=1)
    other = torch.where(IS_REFERENCE[..., None], draw(2, 23, 32, seed=2), states)
    condition = connector(states, MASK, IS_REFERENCE, f_v)
    assert torch.equal(condition, connector(other, MASK, IS_REFERENCE, f_v))
    assert not torch.equal(condition, connector(states, MASK, IS_REFERENCE, f_v.flip(1)))


def test_the_size_of_the_features_does_not_matter_only_their_direction(connector):
    """They join routed states of unit size: a common scale, as for the layers that the router mixes."""
    states, f_v = draw(2, 23, 32), draw(1, REFERENCES, 32, seed=1)
    condition = connector(states, MASK, IS_REFERENCE, f_v)
    torch.testing.assert_close(connector(states, MASK, IS_REFERENCE, 50 * f_v), condition, rtol=1e-4, atol=1e-4)


def test_references_go_to_their_rows_in_order(straight):
    everywhere = IS_REFERENCE[1].expand(2, -1)
    states, f_v = draw(2, 23, 32), draw(2, REFERENCES, 32, seed=1)
    both = straight(states, MASK, everywhere, f_v)
    for row in range(2):
        alone = straight(states[row : row + 1], MASK[row : row + 1], everywhere[:1], f_v[row : row + 1])
        torch.testing.assert_close(both[row], alone[0])


def test_without_reference_positions_no_table_is_added(config, randomize):
    bare = replace(config, connector=replace(config.connector, reference_positions=False))
    built = randomize(Connector(bare))
    f_v = draw(1, 1, 32).expand(1, REFERENCES, 32)  # one feature everywhere: only a position can tell tokens apart
    for layer in built.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    tokens = built(draw(2, 23, 32), MASK, IS_REFERENCE, f_v)[IS_REFERENCE]
    torch.testing.assert_close(tokens, tokens[:1].expand_as(tokens))
    assert "reference_gain" not in built.state_dict()


def test_the_grid_embedding_names_every_place_by_row_and_by_column():
    table = sincos_pos_embed_2d(16, 3, 5, base=10000.0).view(3, 5, 16)
    assert torch.equal(table[:, :, :8], table[:, :1, :8].expand(-1, 5, -1))       # the first half knows the row
    assert torch.equal(table[:, :, 8:], table[:1, :, 8:].expand(3, -1, -1))       # the second half the column
    assert torch.equal(table[2, 0, :8], table[0, 2, 8:])                          # by the same code
    assert torch.cdist(table.view(15, 16), table.view(15, 16)).fill_diagonal_(9).min() > 0.1
    torch.testing.assert_close(table[1, 0, :4], torch.tensor([1.0, 0.1, 0.01, 0.001]).sin())


def test_the_layers_start_as_copies_of_the_llms_last(config, randomize):
    two = replace(config, connector=replace(config.connector, layers=2))
    connector, language = randomize(Connector(two), seed=1), randomize(LanguageModel(config.text), seed=2)
    connector.initialize_from(language)
    for own, source in zip(connector.layers, language.network.layers[2:], strict=True):
        for name, value in source.state_dict().items():
            assert torch.equal(own.state_dict()[name], value)
    assert torch.equal(connector.norm.weight, language.network.norm.weight)       # which the copied layers feed
    before = language.network.layers[3].mlp.down_proj.weight.clone()
    connector.layers[1].mlp.down_proj.weight.add_(1)
    assert torch.equal(language.network.layers[3].mlp.down_proj.weight, before)   # a copy, not the same tensor


def test_a_connector_without_layers_has_nothing_to_copy(config):
    bare = replace(config, connector=replace(config.connector, layers=0))
    connector = Connector(bare)
    before = {name: value.clone() for name, value in connector.state_dict().items()}
    connector.initialize_from(LanguageModel(config.text))
    assert not connector.layers
    assert all(torch.equal(before[name], value) for name, value in connector.state_dict().items())


@pytest.mark.parametrize("learning", [False, True])  # each has its own form of attention
def test_the_layers_attend_as_the_librarys_own_do(config, connector, learning):
    eager = Connector(config).eval().requires_grad_(learning)
    for layer in eager.layers:
        layer.self_attn.config = copy.copy(layer.self_attn.config)
        layer.self_attn.config._attn_implementation = "eager"
    eager.load_state_dict(connector.state_dict())
    own = copy.deepcopy(connector).requires_grad_(learning)
    states, f_v = draw(2, 23, 32), draw(1, REFERENCES, 32, seed=1)
    one, other = (built(states, MASK, IS_REFERENCE, f_v) for built in (own, eager))
    real = MASK.bool()
    torch.testing.assert_close(one[real], other[real], rtol=1e-4, atol=1e-5)


def test_a_raw_reference_enters_as_the_encoder_gives_it(config, straight, randomize):
    raw = randomize(Connector(replace(config, connector=replace(config.connector, reference_scale="raw"))))
    raw.load_state_dict(straight.state_dict())
    raw.reference_gain.zero_()
    states, reference = draw(2, 23, config.text.hidden_size), 7.0 * draw(1, REFERENCES, config.text.hidden_size, seed=2)
    condition = raw(states, MASK, IS_REFERENCE, reference)
    wanted = raw.projection(raw.norm(reference))
    torch.testing.assert_close(condition[1, 4 : 4 + REFERENCES], wanted[0])


def test_an_added_reference_leaves_the_routed_states_in_place(config, straight, randomize):
    changed = replace(config.connector, reference="added", reference_scale="raw")
    added = randomize(Connector(replace(config, connector=changed)))
    added.load_state_dict(straight.state_dict())
    added.reference_gain.zero_()
    states, reference = draw(2, 23, config.text.hidden_size), draw(1, REFERENCES, config.text.hidden_size, seed=2)
    condition = added(states, MASK, IS_REFERENCE, reference)
    summed = states.clone()
    summed[1, 4 : 4 + REFERENCES] += reference[0]
    torch.testing.assert_close(condition, added.projection(added.norm(summed)))
