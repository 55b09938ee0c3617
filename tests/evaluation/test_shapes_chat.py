"""Shapes-Chat: three turns, of which the last can be answered from the image alone, and what the model has said."""

from types import SimpleNamespace

import pytest

from spar.common.errors import InputError
from spar.evaluation.options import EvalOptions
from spar.evaluation.shapes_chat import KINDS, TURNS, chat_items, converse, gives_away
from spar.worlds.shapes.questions import Question


def test_conversations_have_three_kinds_and_do_not_say_the_answer():
    items = chat_items(EvalOptions())
    assert len(items) == 150
    for item in items:
        kinds = [question.kind for question in item.questions]
        assert len(set(kinds)) == TURNS and {*kinds} <= {*KINDS}
        assert not gives_away(item.questions[:-1], item.questions[-1])


def test_what_gives_an_answer_away():
    cross = Question("position", "is the pink cross above the red ring?", "yes")
    assert gives_away([cross], Question("color", "what color is the cross?", "pink"))
    assert not gives_away([cross], Question("color", "what color is the star?", "blue"))
    assert gives_away([cross], Question("exists", "is there a pink cross?", "yes"))
    assert not gives_away([cross], Question("exists", "is there a blue cross?", "no"))
    count = Question("total", "how many objects are there?", "two")
    assert gives_away([count], Question("count", "how many stars are there?", "two"))
    assert not gives_away([count], Question("position", "is the pink cross above the red ring?", "yes"))


def test_each_turn_reads_what_was_said_and_a_refusal_ends_the_conversation():
    seen, item = [], chat_items(EvalOptions(limit=1))[0]

    def chat(messages):
        seen.append([message["content"] for message in messages])
        return iter([] if len(seen) == 1 else ["yes", " indeed"])  # an empty answer is one too

    pipe = SimpleNamespace(chat=chat, check_text=lambda text, what: None)
    answers = converse(pipe, item)
    assert answers == ["", "yes indeed", "yes indeed"] and [len(turns) for turns in seen] == [1, 3, 5]
    assert seen[2][1] == answers[0] and seen[2][3] == answers[1]
    assert [part["type"] for part in seen[0][0]] == ["image", "text"]
    assert [part["type"] for part in seen[2][4]] == ["text"]

    def refuse(text, what):
        if text == item.questions[1].text:
            raise InputError("unknown words")

    assert converse(SimpleNamespace(chat=chat, check_text=refuse), item) == ["yes indeed", "", ""]


def test_a_conversation_that_no_longer_fits_is_wrong_from_there_on():
    """An answer without an end leaves no room for the next turn; what is refused at once is no such case."""
    item = chat_items(EvalOptions(limit=1))[0]

    class Endless:
        def __init__(self, room):
            self.room = room

        def check_text(self, text, what):
            pass

        def chat(self, messages):
            if len(messages) > self.room:
                raise InputError("messages: expected at most 512 tokens")
            return iter(["red"])

    assert converse(Endless(2), item) == ["red", "", ""]
    with pytest.raises(InputError):
        converse(Endless(0), item)
