from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from spar.common.errors import InputError
from spar.models.attention import attention_bias, position_ids_from_mask
from spar.models.encoder import qwen_config
from spar.models.language import LanguageModel

MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
PLACES = torch.tensor([[0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 5]])
LAYERS = (0, 1, 3, 4)
UNUSED = 6  # <unk>: an end of turn that these weights never write


@pytest.fixture(scope="module")
def config(config):
    """A rotary base that is no library's default."""
    return replace(config, text=replace(config.text, rope_theta=500.0))


@pytest.fixture(scope="module")
def language(config, randomize) -> LanguageModel:
    return randomize(LanguageModel(config.text))


def tokens() -> torch.Tensor:
    return torch.randint(7, 128, MASK.shape, generator=torch.Generator().manual_seed(0)) * MASK


def run(language: LanguageModel, embeddings: torch.Tensor, mask: torch.Tensor = MASK, **keywords):
    return language(embeddings, attention_bias(mask, embeddings, causal=True), position_ids_from_mask(mask), **keywords)


@pytest.mark.parametrize("learning", [False, True])  # each has its own form of attention
def test_states_equal_the_librarys_hidden_states_under_left_padding(config, language, learning):
    own = LanguageModel(config.text).eval().requires_grad_(learning)
    own.load_state_dict(language.state_dict())
    text = config.text
    by_hand = Qwen2Config(
        vocab_size=text.vocab_size, hidden_size=text.hidden_size, num_hidden_layers=text.layers,
        num_attention_heads=text.heads, num_key_value_heads=text.kv_heads, intermediate_size=text.intermediate_size,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, pad_token_id=0,
    )
    reference = Qwen2Model(by_hand).eval()
    reference.load_state_dict(language.network.state_dict())
    with torch.no_grad():
        wanted = reference(
            input_ids=tokens(), attention_mask=MASK, position_ids=PLACES, output_hidden_states=True
        )
    final, kept = run(own, own.embed(tokens()), layers=LAYERS)
    assert final.requires_grad == learning
    real = MASK.bool()
    torch.testing.assert_close(final[real], wanted.last_hidden_state[real], rtol=1e-4, atol=1e-5)
    assert len(wanted.hidden_states) == config.text.layers + 1
    for layer, state in zip(LAYERS, kept, strict=True):
        torch.testing.assert_close(state[real], wanted.hidden_states[layer][real], rtol=1e-4, atol=1e-5)


def test_states_come_in_the_order_asked_for(language):
    _, forwards = run(language, language.embed(tokens()), layers=(1, 4))
    _, backwards = run(language, language.embed(tokens()), layers=(4, 1))
    assert torch.equal(forwards[0], backwards[1]) and torch.equal(forwards[1], backwards[0])
    assert not torch.equal(*forwards)


def test_tokens_behind_a_cache_equal_the_full_pass(language):
    embeddings, seen, parts = language.embed(tokens()), language.empty_kv_cache(), []
    full, _ = run(language, embeddings)
    start = 0
    for stop in (4, 5, 7):  # a prompt, then one token, then two at once
        bias = attention_bias(MASK[:, :stop], embeddings, causal=True, past=start)
        part, _ = language(
            embeddings[:, start:stop], bias, position_ids_from_mask(MASK)[:, start:stop], past_key_values=seen
        )
        parts.append(part)
        start = stop
    real = MASK.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], full[real], rtol=1e-4, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours_or_its_padding(language):
    ids = tokens()
    together, _ = run(language, language.embed(ids))
    alone, _ = run(language, language.embed(ids[:1, 3:]), MASK[:1, 3:])
    torch.testing.assert_close(together[:1, 3:], alone, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def generated(config, language) -> list[list[int]]:
    """What transformers' own greedy search appends to each row, ten tokens long."""
    reference = Qwen2ForCausalLM(qwen_config(replace(config.text, eos_token_id=UNUSED))).eval()
    reference.model.load_state_dict(language.network.state_dict())
    reference.tie_weights()
    new = reference.generate(
        inputs_embeds=language.embed(tokens()), attention_mask=MASK, do_sample=False, max_new_tokens=10
    )
    assert new.shape == (3, 10) and not (new == UNUSED).any()
    return new.tolist()


def answers(config, language, eos: int, *, max_new_tokens: int = 10) -> list[list[int]]:
    own = LanguageModel(replace(config.text, eos_token_id=eos)).eval()
    own.load_state_dict(language.state_dict())
    return own.generate(own.embed(tokens()), MASK, max_new_tokens=max_new_tokens)


def test_greedy_answers_equal_transformers_generate(config, language, generated):
    assert answers(config, language, UNUSED) == generated
    assert len({tuple(row) for row in generated}) == 3 and max(len(set(row)) for row in generated) > 3
    assert answers(config, language, UNUSED, max_new_tokens=4) == [row[:4] for row in generated]


def test_a_row_ends_before_its_own_end_of_turn_and_the_others_go_on(config, language, generated):
    def until(row: list[int], eos: int) -> list[int]:
        return row[: row.index(eos)] if eos in row else row

    ends = [row[i] for row in generated for i in range(1, 6) if row[i] not in row[:i]]
    uneven = [eos for eos in ends if len({len(until(row, eos)) for row in generated}) > 1]
    assert uneven
    for eos in uneven[:3]:
        assert answers(config, language, eos) == [until(row, eos) for row in generated]


def test_the_stream_has_the_answers_token_by_token(config, language, generated):
    eos = generated[0][3]  # one row ends early, and says so from then on
    own = LanguageModel(replace(config.text, eos_token_id=eos)).eval()
    own.load_state_dict(language.state_dict())
    with torch.inference_mode():
        steps = [*own.stream(own.embed(tokens()), MASK, max_new_tokens=10)]
    rows = [[step[row] for step in steps] for row in range(3)]
    assert [[t for t in row if t is not None] for row in rows] == answers(config, language, eos)
    assert any(None in row for row in rows)
    assert all(row[len(row) - row.count(None) :] == [None] * row.count(None) for row in rows)


def short(config, language, positions: int) -> LanguageModel:
    own = LanguageModel(replace(config.text, max_positions=positions)).eval()
    own.load_state_dict(language.state_dict())
    return own


def test_more_tokens_than_the_model_has_positions_are_refused_and_padding_is_none(config, language):
    rows = tokens()
    final, _ = run(short(config, language, 7), language.embed(rows))
    assert final.isfinite().all()
    with pytest.raises(InputError, match="at most 6 tokens at once .* got 7"):
        run(short(config, language, 6), language.embed(rows))
    run(short(config, language, 6), language.embed(rows[[0, 2]]), MASK[[0, 2]])  # 4 and 6 tokens in rows of 7


def test_an_answer_that_would_not_fit_is_refused_before_its_first_token(config, language):
    def ask(positions: int) -> list[list[int]]:
        own = short(config, language, positions)
        return own.generate(own.embed(tokens()), MASK, max_new_tokens=3)

    assert ask(10) == ask(512)
    with pytest.raises(InputError, match="at most 9 tokens at once .* got 10"):
        ask(9)


# ---- what the published LLMs bring beyond the small one --------------------------------------------------------------


def test_an_untied_head_makes_the_logits(config, randomize):
    language = randomize(LanguageModel(replace(config.text, tied_head=False)))
    hidden = torch.randn(2, 3, config.text.hidden_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(language.logits(hidden), hidden @ language.head.weight.T)
    assert "head.weight" in language.state_dict() and "head.weight" not in LanguageModel(config.text).state_dict()


@pytest.mark.parametrize("length", [8, 14])
def test_dynamic_rotary_scaling_is_the_librarys_and_begins_behind_max_positions(config, randomize, length):
    """As InternVL3 has it: factor 2, nothing changes up to max_positions, twice as many tokens fit."""
    text = replace(config.text, max_positions=8, rope_factor=2.0)
    language = randomize(LanguageModel(text))
    plain = randomize(LanguageModel(replace(text, rope_factor=1.0, max_positions=16)))
    reference = Qwen2Model(
        Qwen2Config(
            vocab_size=text.vocab_size, hidden_size=text.hidden_size, num_hidden_layers=text.layers,
            num_attention_heads=text.heads, num_key_value_heads=text.kv_heads, pad_token_id=0,
            intermediate_size=text.intermediate_size, max_position_embeddings=8,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
        )
    ).eval()
    reference.load_state_dict(language.network.state_dict())
    ids = torch.randint(7, 128, (1, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        wanted = reference(input_ids=ids).last_hidden_state
    final, _ = run(language, language.embed(ids), mask)
    unscaled, _ = run(plain, plain.embed(ids), mask)
    torch.testing.assert_close(final, wanted, rtol=1e-4, atol=1e-5)
    assert torch.allclose(final, unscaled, atol=1e-5) == (length == 8)
    with pytest.raises(InputError, match="at most 16 tokens at once"):
        run(language, torch.zeros(1, 17, text.hidden_size), torch.ones(1, 17, dtype=torch.long))


def test_the_epsilon_of_the_norms_is_the_configured_one(config):
    language = LanguageModel(replace(config.text, rms_norm_eps=0.25))
    assert {m.variance_epsilon for m in language.modules() if hasattr(m, "variance_epsilon")} == {0.25}
