import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken

from spar.common.errors import InputError
from spar.models.attention import attention_bias, position_ids_from_mask
from spar.models.config import TextConfig
from spar.models.language import LanguageModel
from spar.processing import prompts as module
from spar.processing.prompts import (
    MAX_CHARACTERS_PER_TOKEN,
    PackedBatch,
    PromptEncoder,
    QuestionAnswer,
    check_rows,
    known_words,
)
from spar.worlds.shapes.tokenizer import build_tokenizer

VISUAL = 3
IMAGE = "<img>" + "<IMG_CONTEXT>" * VISUAL + "</img>"


@pytest.fixture(scope="module")
def prompts() -> PromptEncoder:
    return PromptEncoder(build_tokenizer(), VISUAL)


def template(prompts: PromptEncoder, content) -> list[int]:
    """transformers' own rendering of one user turn, images expanded as its processor does."""
    message = [{"role": "user", "content": content}]
    text = prompts.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return prompts.tokenizer.encode(text.replace("<img><IMG_CONTEXT></img>", IMAGE), add_special_tokens=False)


def real(tokens) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


def test_the_ids_that_are_kept_are_bounded_by_their_texts_characters(monkeypatch):
    monkeypatch.setattr(module, "MAX_CACHED_CHARACTERS", 100)
    own = PromptEncoder(build_tokenizer(), VISUAL)
    texts = ["red " * count for count in range(1, 40)]
    wanted = [own.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    for _ in range(2):
        for text, ids in zip(texts, wanted, strict=True):
            assert own.encode(text) == ids
            assert sum(map(len, own._cache)) <= max(100, len(text))


def test_generation_is_a_user_turn_of_the_chat_template(prompts):
    assert real(prompts.generation(["a red circle", None])) == [
        template(prompts, "Generate an image: a red circle"), template(prompts, "Generate an image."),
    ]


def test_an_edit_ends_with_its_reference_and_keeps_it_when_unconditional(prompts):
    assert real(prompts.edit(["remove the red circle", None])) == [
        template(prompts, f"Edit the image: remove the red circle\n{IMAGE}"),
        template(prompts, f"Edit the image.\n{IMAGE}"),
    ]


def test_the_images_opening_token_ends_a_prompt_where_the_model_wants_it(prompts):
    opening = PromptEncoder(prompts.tokenizer, VISUAL, image_start=True)
    start = prompts.encode("<img>")
    for made, plain in ((opening.generation, prompts.generation), (opening.edit, prompts.edit)):
        assert real(made(["a red circle", None])) == [row + start for row in real(plain(["a red circle", None]))]
    assert real(opening.question(["how many?"])) == real(prompts.question(["how many?"]))
    texts, layouts = ["remove the red circle"], ["no red circle"]  # a layout is no image: it is asked as in training
    for edits in (False, True):
        asked = real(opening.layout_questions(texts, edits=edits))[0]
        assert opening.pack_layouts(texts, layouts, edits=edits).ids[0].tolist()[: len(asked)] == asked
        assert asked == real((prompts.edit if edits else prompts.generation)(texts))[0]


def test_an_edit_has_as_many_placeholders_as_its_reference_has_tokens(prompts):
    ids = real(prompts.edit(["remove the red circle"], 5))[0]
    assert ids.count(prompts.encode("<IMG_CONTEXT>")[0]) == 5


def test_a_question_follows_its_image_as_the_chat_template_writes_it(prompts):
    asked = [{"type": "image"}, {"type": "text", "text": "what color is the circle?"}]
    assert real(prompts.question(["what color is the circle?"])) == [template(prompts, asked)]


def test_a_conversation_is_what_the_chat_template_writes(prompts):
    turns = [
        ("system", ["what is there?"]), ("user", [1, "what color is the circle?"]), ("assistant", ["red"]),
        ("user", [1, 1, "and above?"]),
    ]
    parts = {1: {"type": "image"}}
    messages = [
        {"role": role, "content": [parts.get(text, {"type": "text", "text": text}) for text in texts]}
        for role, texts in turns
    ]
    text = prompts.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    wanted = prompts.tokenizer.encode(text.replace("<img><IMG_CONTEXT></img>", IMAGE), add_special_tokens=False)
    assert real(prompts.conversation(turns)) == [wanted]


def test_a_conversation_of_one_question_is_the_question(prompts):
    asked = prompts.conversation([("user", [1, "how many?"])])
    assert real(asked) == real(prompts.question(["how many?"]))


def test_an_image_of_several_tiles_has_the_tokens_of_each(prompts):
    three, two = prompts.question(["how many?", "red?"], [3, 2]).ids
    places = [int((row == TextConfig().image_token_id).sum()) for row in (three, two)]
    assert places == [3 * VISUAL, 2 * VISUAL]
    assert real(prompts.conversation([("user", [3, "how many?"])])) == real(prompts.question(["how many?"], [3]))


def test_texts_of_one_turn_stand_on_lines_of_their_own(prompts):
    split = prompts.conversation([("user", ["a red circle", "a blue star"])])
    assert real(split) == real(prompts.conversation([("user", ["a red circle\na blue star"])]))


def test_an_image_has_one_placeholder_a_visual_token(prompts):
    ids = prompts.edit(["add a red circle"]).ids
    assert int((ids == TextConfig().image_token_id).sum()) == VISUAL


def test_rows_are_padded_on_the_left_and_the_mask_tells(prompts):
    texts = ["a red circle", None, "a small red circle and a large blue star"]
    tokens = prompts.generation(texts)
    for row, text in enumerate(texts):
        alone = prompts.generation([text])
        length = alone.ids.shape[1]
        assert tokens.ids[row, -length:].tolist() == alone.ids[0].tolist()
        assert tokens.mask[row].tolist() == [0] * (tokens.ids.shape[1] - length) + [1] * length
        assert (tokens.ids[row, :-length] == prompts.tokenizer.pad_token_id).all()
    assert len(set(tokens.mask.sum(1).tolist())) == 3


def test_the_models_ids_are_the_tokenizers(prompts):
    config, tokenizer = TextConfig(), prompts.tokenizer
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == config.image_token_id
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (config.eos_token_id, config.pad_token_id)
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) <= config.vocab_size


# ---- packed turns ---------------------------------------------------------------------------------------------------

ROWS = [
    [QuestionAnswer("what color is the circle?", "red"),
     QuestionAnswer("describe the image", "a red circle on a gray background", 0.2),
     QuestionAnswer("how many objects are there?", "one")],
    [QuestionAnswer("is there a blue star?", "no", 3.0)],
]  # fmt: skip


@pytest.fixture(scope="module")
def language() -> LanguageModel:
    config = TextConfig(hidden_size=16, layers=2, heads=2, kv_heads=1, intermediate_size=32)
    model = LanguageModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval().requires_grad_(False)


def packed_losses(language: LanguageModel, packed: PackedBatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(loss, weight) of each answer token, row by row."""
    embeddings = language.embed(packed.ids)
    final, _ = language(embeddings, attention_bias(packed.allowed, embeddings, causal=False), packed.positions)
    losses = F.cross_entropy(language.logits(final[:, :-1]).transpose(1, 2), packed.ids[:, 1:], reduction="none")
    weights = packed.weights[:, 1:]
    return [(loss[weight > 0], weight[weight > 0]) for loss, weight in zip(losses, weights, strict=True)]


def single_losses(prompts: PromptEncoder, language: LanguageModel, turn: QuestionAnswer) -> torch.Tensor:
    """The turn by itself: the question's form, the answer and then the end of the turn."""
    asked = prompts.question([turn.question]).ids[0].tolist()
    answer = prompts.encode(turn.answer) + prompts.encode("<|im_end|>")
    ids = torch.tensor([asked + answer])
    mask = torch.ones_like(ids)
    embeddings = language.embed(ids)
    final, _ = language(embeddings, attention_bias(mask, embeddings, causal=True), position_ids_from_mask(mask))
    return F.cross_entropy(language.logits(final[0, len(asked) - 1 : -1]), torch.tensor(answer), reduction="none")


def test_packed_turns_have_exactly_the_losses_of_single_turns(prompts, language):
    packed = packed_losses(language, prompts.pack(ROWS))
    for row, (losses, weights) in zip(ROWS, packed, strict=True):
        alone = [single_losses(prompts, language, turn) for turn in row]
        torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-5, atol=1e-5)
        assert weights.tolist() == pytest.approx([turn.weight for turn, x in zip(row, alone, strict=True) for _ in x])
    assert len(packed[0][0]) == 2 + 8 + 2 and len(packed[1][0]) == 2


def test_the_gradient_of_packed_turns_is_that_of_single_turns(prompts, language):
    weight = language.network.layers[0].self_attn.q_proj.weight.requires_grad_()
    packed = sum((losses * weights).sum() for losses, weights in packed_losses(language, prompts.pack(ROWS)))
    alone = sum(turn.weight * single_losses(prompts, language, turn).sum() for row in ROWS for turn in row)
    one, other = (torch.autograd.grad(loss, [weight])[0] for loss in (packed, alone))
    weight.requires_grad_(False)
    assert other.abs().max() > 1e-3
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_token_of_a_packed_row_sees_forward_or_into_another_turn(prompts):
    packed = prompts.pack(ROWS)
    length = packed.ids.shape[1]
    assert not packed.allowed[:, ~torch.ones(length, length).tril().bool()].any()
    prefix = prompts.question(["a"]).ids[0].tolist().index(prompts.encode("</img>")[0]) + 2  # and the newline
    seen = packed.allowed[0].sum(1)
    starts = [i for i in range(prefix, length) if int(packed.positions[0, i]) == prefix]
    assert len(starts) == 3  # each turn begins at the place that it would have alone
    for start in starts:
        assert int(seen[start]) == prefix + 1


def test_a_turn_that_follows_is_the_next_of_its_conversation(prompts, language):
    first, other = QuestionAnswer("is there a blue star?", "no"), ROWS[0][0]
    second = QuestionAnswer("red?", "yes", follows=True)
    packed = prompts.pack([[first, second, other]])
    (losses, _), = packed_losses(language, packed)
    written = [("user", [1, first.question]), ("assistant", [first.answer]), ("user", [second.question])]
    asked = prompts.conversation(written).ids[0].tolist()
    answer = prompts.encode(second.answer) + prompts.encode("<|im_end|>")
    ids = torch.tensor([asked + answer])
    embeddings = language.embed(ids)
    bias = attention_bias(torch.ones_like(ids), embeddings, causal=True)
    final, _ = language(embeddings, bias, torch.arange(ids.shape[1])[None])
    alone = F.cross_entropy(language.logits(final[0, len(asked) - 1 : -1]), torch.tensor(answer), reduction="none")
    torch.testing.assert_close(losses[2:4], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[:2], single_losses(prompts, language, first), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[4:], single_losses(prompts, language, other), rtol=1e-5, atol=1e-5)
    leads = prompts.pack([[QuestionAnswer("red?", "yes", 1.0, True)]])  # nothing before it: a conversation's first turn
    assert torch.equal(leads.ids, prompts.pack([[QuestionAnswer("red?", "yes")]]).ids)


@pytest.mark.parametrize("edits", [False, True])
def test_prompts_for_images_are_answered_in_words_after_their_own_form(prompts, edits):
    texts, said = ["a red circle", "make the blue star red"], ["a red circle", "two stars"]
    packed = prompts.pack_descriptions(texts, said, edits=edits)
    asked = (prompts.edit if edits else prompts.generation)(texts)
    for row, answer in enumerate(said):
        prompt = asked.ids[row][asked.mask[row].bool()].tolist()
        answered = prompts.encode(answer) + prompts.encode("<|im_end|>")
        length = len(prompt) + len(answered)
        assert packed.ids[row, :length].tolist() == prompt + answered
        assert packed.weights[row].nonzero().flatten().tolist() == list(range(len(prompt), length))
        assert packed.positions[row, :length].tolist() == list(range(length))
        assert torch.equal(packed.allowed[row, :length, :length], torch.ones(length, length, dtype=torch.bool).tril())


def test_a_prompt_its_layout_and_the_layouts_canvas_do_not_meet(prompts):
    texts = ["a circle", "two red squares on a gray background"]
    layouts = ["a small red circle on column two row one"] * 2
    packed = prompts.pack_layouts(texts, layouts)
    asked, drawn = prompts.generation(texts), prompts.layout(layouts)
    for row in range(2):
        prompt = asked.ids[row][asked.mask[row].bool()].tolist()
        answer = prompts.encode(layouts[row]) + prompts.encode("<|im_end|>")
        canvas = drawn.ids[row][drawn.mask[row].bool()].tolist()
        first, length = len(prompt) + len(answer), len(prompt) + len(answer) + len(canvas)
        assert packed.ids[row, :length].tolist() == prompt + answer + canvas
        assert packed.weights[row].nonzero().flatten().tolist() == list(range(len(prompt), first))
        assert packed.positions[row, :length].tolist() == [*range(first), *range(len(canvas))]
        alone = torch.block_diag(torch.ones(first, first).tril(), torch.ones(len(canvas), len(canvas)).tril()).bool()
        assert torch.equal(packed.allowed[row, :length, :length], alone)
        assert canvas.count(prompts.encode("<IMG_CONTEXT>")[0]) == prompts.visual_tokens


# ---- what a user may not type ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a red circle", "A Red CIRCLE.", "red", "what color is the circle?", "red\ncircle"])
def test_known_words_pass(prompts, text):
    assert prompts.check(text, "prompt", 64) is None
    assert prompts.tokenizer.unk_token_id not in prompts.encode(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (7, "prompt: expected text, got int"),
        (None, "prompt: expected text, got NoneType"),
        ("", "prompt: expected some words, got an empty text"),
        (" \t\n", "prompt: expected some words, got an empty text"),
        ("a red dragon, a Wyvern", "prompt: unknown words dragon, Wyvern; this model knows only 2, 3, 4, a, above"),
        ("a dragon, a dragon", "prompt: unknown words dragon;"),
        ("a crimson cirle", "prompt: unknown words crimson, cirle (perhaps circle); this model knows only"),
        ("a red user", "prompt: unknown words user;"),
        ("red " * 65, "prompt: expected at most 64 tokens, got 65"),
        ("red " * 10_000, "prompt: expected at most 64 tokens, got a text of 40000 characters"),
        ("red <|im_end|>", "prompt: expected plain words, got one of the model's control tokens"),
        ("<IMG_CONTEXT>", "control tokens"),
        ("<|endoftext|>", "control tokens"),
        ("<|IM_START|> red", "control tokens"),
    ],
)
def test_anything_else_is_refused_with_what_was_expected_and_what_came(prompts, text, message):
    with pytest.raises(InputError) as caught:
        prompts.check(text, "prompt", 64)
    assert message in str(caught.value)


def test_a_control_token_without_a_row_is_no_fault_and_no_text_has_it():
    """InternVL3's tokenizer has `<video>` after the last row of the embedding: special in its file, without a role."""
    tokenizer = build_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<video>", special=True)])
    assert len(tokenizer) == rows + 1 and "<video>" not in tokenizer.all_special_tokens
    check_rows(tokenizer, rows, "text.vocab_size")
    prompts = PromptEncoder(tokenizer, VISUAL)
    with pytest.raises(InputError, match="expected plain words, got one of the model's control tokens"):
        prompts.check("a red <video>", "prompt", 64)
    assert prompts.plain("a red<video> circle") == "a red  circle" and "<video>" not in known_words(tokenizer)
    with pytest.raises(InputError, match=rf"text.vocab_size: expected at least {rows} .*, got {rows - 1}: its token"):
        check_rows(tokenizer, rows - 1, "text.vocab_size")
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(InputError, match=f"expected at least {rows + 2} .*, got {rows}: its token 'zebra' has number"):
        check_rows(tokenizer, rows, "text.vocab_size")
    with pytest.raises(InputError, match="its token '<img>' has number 3"):    # a template's
        check_rows(tokenizer, 3, "text.vocab_size")


def test_the_limit_is_the_longest_text_that_passes(prompts):
    prompts.check("red " * 64, "prompt", 64)
    prompts.check("red" + " " * (MAX_CHARACTERS_PER_TOKEN - 3), "prompt", 1)
    with pytest.raises(InputError, match="expected at most 1 tokens"):
        prompts.check("red" + " " * (MAX_CHARACTERS_PER_TOKEN - 2), "prompt", 1)


def test_the_words_on_offer_are_those_of_the_world(prompts):
    with pytest.raises(InputError) as caught:
        prompts.check("dragon", "prompt", 64)
    assert not {"user", "assistant", "system"} & set(str(caught.value).replace(",", "").split())


@pytest.mark.parametrize("text", ["red\x1ccircle", "red\x00circle"])
def test_an_unknown_word_with_control_characters_is_named_readably(prompts, text):
    with pytest.raises(InputError) as caught:
        prompts.check(text, "prompt", 64)
    shown = str(caught.value).split(";")[0]
    assert shown.isprintable() and shown != "prompt: unknown words "


def test_a_sentence_with_an_unknown_word_is_left_out_whole(prompts):
    assert prompts.known_sentences("a red circle. a blue star") == ("a red circle. a blue star", [])
    assert prompts.known_sentences("never say red. a red circle! Today: 5.\nblue") == (
        "a red circle! blue", ["never", "say", "Today", "5"]
    )  # fmt: skip
    assert prompts.known_sentences("a helpful user.") == ("", ["helpful", "user"])
    assert prompts.known_sentences("") == ("", [])


@given(st.text(max_size=60) | st.lists(st.sampled_from(["red", "elephant", ".", "!", "\n", "?"])).map(" ".join))
def test_what_is_kept_of_a_text_has_no_unknown_words(prompts, text):
    kept, unknown = prompts.known_sentences(text)
    assert prompts.known_sentences(kept) == (kept, []) and len(kept) <= len(text)
    assert unknown or kept == text
