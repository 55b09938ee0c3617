"""Conversations as they come in: what is accepted, and the message for each fault; tokens that become text."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spar.common.errors import InputError
from spar.common.limits import MAX_CHAT_IMAGES, MAX_MESSAGES, MAX_PARTS
from spar.processing.chat import ChatMessage, TextStream, read_messages
from spar.processing.images import to_square
from spar.worlds.shapes.tokenizer import build_tokenizer

RED = Image.new("RGB", (8, 6), "red")
SIDE = 4


def squares(image: Image.Image) -> list[Image.Image]:
    return [to_square(image, SIDE)]


def user(*parts, role: str = "user") -> dict:
    return {"role": role, "content": list(parts) if len(parts) != 1 or not isinstance(parts[0], str) else parts[0]}


def text(words: str = "how many ?") -> dict:
    return {"type": "text", "text": words}


def image(source=RED) -> dict:
    return {"type": "image", "image": source}


def test_a_conversation_keeps_its_turns_and_opens_its_images(tmp_path):
    RED.save(tmp_path / "red.png")
    turns = read_messages(
        [
            user("look closely", role="system"),
            user(image(tmp_path / "red.png"), text(), text("and ?"), image((tmp_path / "red.png").read_bytes())),
            user(text("one"), role="assistant"),
            user("what color ?"),
        ],
        squares,
    )
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    assert [turn.parts for turn in turns if not turn.images] == [("look closely",), ("one",), ("what color ?",)]
    assert turns[1].parts[2:] == ("how many ?", "and ?")
    assert turns[1].images == [square for part in turns[1].parts[:2] for square in part]
    assert [np.asarray(one).tolist() for one in turns[1].images] == [[[[255, 0, 0]] * SIDE] * SIDE] * 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(("a", "b", 1, 2)), min_size=1, max_size=8))
def test_images_come_before_the_text_of_their_turn_each_in_its_order(order):
    parts = [text(one) if isinstance(one, str) else image(Image.new("RGB", (4, 4), (one, 0, 0))) for one in order]
    (turn,) = read_messages([user(*parts)], squares)
    kept = [part if isinstance(part, str) else part[0].getpixel((0, 0))[0] for part in turn.parts]
    assert kept == [one for one in order if one in (1, 2)] + [one for one in order if one in ("a", "b")]


def test_a_conversation_may_be_one_question_without_an_image():
    assert read_messages([user("how many ?")], squares) == [ChatMessage("user", ("how many ?",))]
    assert read_messages(({"role": "user", "content": (text(),)},), squares) == [ChatMessage("user", ("how many ?",))]


def test_what_says_nothing_is_left_out_and_errors_keep_the_numbers():
    empty = [user("", role="system"), user(" ", role="assistant"), user(text(""), text("\n"), role="system")]
    turns = read_messages([*empty, user("x"), user("", role="assistant"), user("y")], squares)
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert [turn.name for turn in turns] == ["messages[3]", "messages[4]", "messages[5]"]
    with pytest.raises(InputError, match=r"messages\[4\].role: expected assistant, got user"):
        read_messages([*empty, user("x"), user("y")], squares)
    with pytest.raises(InputError, match=r"messages\[1\].role: expected user, got assistant"):
        read_messages(empty, squares)
    with pytest.raises(InputError, match="expected the last message from the user, got system"):
        read_messages(empty[:1], squares)
    assert [turn.parts for turn in read_messages([user("")], squares)] == [("",)]  # a user's is refused by its words


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "messages: expected a list of messages, got NoneType"),
        ("how many ?", "messages: expected a list of messages, got str"),
        (user("x"), "messages: expected a list of messages, got dict"),
        ([], f"messages: expected 1 to {MAX_MESSAGES}, got 0"),
        ([user("x")] * (MAX_MESSAGES + 1), f"got {MAX_MESSAGES + 1}"),
        (["how many ?"], r"messages\[0\]: expected role and content, got str"),
        ([{}], r"messages\[0\]: expected role and content, got nothing"),
        ([{"role": "user"}], r"messages\[0\]: expected role and content, got role"),
        ([{**user("x"), "name": "me"}], r"expected role and content, got role, content, name"),
        ([user("x", role="tool")], r"messages\[0\].role: expected system, user or assistant, got 'tool'"),
        ([user("x", role=None)], "got None"),
        ([{"role": "user", "content": None}], r"messages\[0\].content: expected text or a list of parts, got NoneType"),
        ([user()], rf"messages\[0\].content: expected 1 to {MAX_PARTS} parts, got 0"),
        ([user(*[text()] * (MAX_PARTS + 1))], f"got {MAX_PARTS + 1}"),
        ([user(text(), 7)], r"messages\[0\].content\[1\]: expected a part of type text or image, got int"),
        ([user({"type": "image_url"})], "got type 'image_url'"),
        ([user({"text": "x"})], "got type None"),
        ([user({"type": "text"})], r"content\[0\]: expected type and text, got type"),
        ([user({"type": "image", "text": "x"})], "expected type and image, got type, text"),
        ([user(text(7))], r"content\[0\]: expected text, got int"),
        ([user(image(7))], "expected an image as a path, bytes, a Pillow image or an array, got int"),
        ([user(image(b"GIF89a"))], "expected an image"),
        ([user(image(), role="system"), user("x")], "expected an image from the user only, got one from the system"),
        ([user("x"), user(image(), role="assistant"), user("x")], "got one from the assistant"),
        ([user("x"), user("x")], r"messages\[1\].role: expected assistant, got user"),
        ([user("x", role="assistant")], r"messages\[0\].role: expected user, got assistant"),
        ([user("x"), user("x", role="system"), user("x")], r"messages\[1\].role: expected assistant, got system"),
        ([user("x", role="system")], "expected the last message from the user, got system"),
        ([user("x"), user("x", role="assistant")], "expected the last message from the user, got assistant"),
        ([user(*[image()] * (MAX_CHAT_IMAGES + 1))], f"at most {MAX_CHAT_IMAGES} images, got {MAX_CHAT_IMAGES + 1}"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_malformed_conversation_gets_a_message(messages, words):
    with pytest.raises(InputError, match=words):
        read_messages(messages, squares)


# ---- text from tokens ------------------------------------------------------------------------------------------------


def pieces(tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.add_token(token) for token in ids), stream.flush()]


WORDS = build_tokenizer()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=20))
def test_pieces_of_words_join_to_the_whole_text(ids):
    assert "".join(pieces(WORDS, ids)) == WORDS.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte, as the published models' tokenizers have it for rare characters."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def test_a_piece_has_whole_characters_only(byte_tokenizer):
    answer = "a 红色 circle \U0001f534, é\n"
    ids = byte_tokenizer.encode(answer)
    assert len(ids) == len(answer.encode())
    got = pieces(byte_tokenizer, ids)
    assert [piece for piece in got if piece] == list(answer)
    grown = list(accumulate(got))
    assert all(answer.startswith(part) for part in grown) and grown[-1] == answer


def test_what_never_becomes_a_character_comes_at_the_end(byte_tokenizer):
    ids = byte_tokenizer.encode("ok \U0001f534")[:-1]
    got = pieces(byte_tokenizer, ids)
    assert got[:3] == ["o", "k", " "] and got[3:-1] == [""] * 3
    assert "".join(got) == byte_tokenizer.decode(ids) == "ok \ufffd"


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=12))
def test_any_bytes_join_to_what_they_decode_to(byte_tokenizer, data):
    letters = byte_tokenizer.convert_tokens_to_ids
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ids = letters([bytes_to_unicode()[byte] for byte in data])
    assert "".join(pieces(byte_tokenizer, ids)) == byte_tokenizer.decode(ids)
