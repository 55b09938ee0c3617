"""Other words keep the meaning, and what tests ask in is never what training says."""

import re
from collections import Counter

import numpy as np
import pytest

from spar.worlds.shapes.captions import caption, open_caption, parse
from spar.worlds.shapes.edits import BY_ANYTHING, edit_kinds, make_edit
from spar.worlds.shapes.forms import (
    CAPTION_FORMS,
    EDIT_FORMS,
    GROUND_FORMS,
    POLITE,
    POLITE_TEST,
    QUESTION_FORMS,
    RELATION_FORMS,
    SYNONYMS,
    form_words,
    paraphrase,
)
from spar.worlds.shapes.questions import BINDING_QUESTION_KINDS, QUESTION_KINDS, questions
from spar.worlds.shapes.scene import ALL_KINDS, COLORS, SHAPES, SIZES, make_scene, pick
from spar.worlds.shapes.tokenizer import VOCABULARY, check_words

FORMS = (*QUESTION_FORMS, *EDIT_FORMS, *CAPTION_FORMS)
SCENES = [make_scene(seed, kind=kind) for seed in range(60) for kind in ALL_KINDS]


def sentences(seed):
    """(kind, canonical sentence) of every kind."""
    rng = np.random.default_rng(seed)
    for scene in SCENES:
        yield "caption", caption(scene, rng)
        yield "caption", open_caption(scene, rng)
        kind = pick(rng, [kind for kind in edit_kinds(scene, naming=BY_ANYTHING) if kind != "add"])
        yield kind, make_edit(scene, rng, kind, naming=BY_ANYTHING).instruction
        for question in questions(scene, rng, tuple(dict.fromkeys((*QUESTION_KINDS, *BINDING_QUESTION_KINDS)))):
            yield question.kind, question.text
    yield "describe", "describe the image"


def canonical_form(text):
    """The forms whose pattern a sentence has, the first counts."""
    return next((form.kind for form in FORMS if re.fullmatch(form.pattern, text)), None)


def test_every_canonical_sentence_has_forms_of_its_own_kind():
    alike = {"color": "attribute", "shape": "attribute", "size": "attribute", "total": "count", "count_color": "count"}
    for kind, text in sentences(0):
        found = canonical_form(text)
        if kind == "neighbor":
            assert found in ("neighbor", "attribute"), text
        else:
            assert found == alike.get(kind, kind), text


def test_test_forms_are_no_training_forms_and_bring_no_word():
    for form in FORMS:
        assert not {*form.training} & {*form.test} and form.training and form.test
    assert not {*POLITE} & {*POLITE_TEST} and not {*GROUND_FORMS[0]} & {*GROUND_FORMS[1]}
    rng = np.random.default_rng(1)
    for _, text in sentences(1):
        check_words(paraphrase(text, rng, test=True))
        check_words(paraphrase(text, rng))
    templates = [t for form in FORMS for t in form.test] + [*GROUND_FORMS[1], *POLITE_TEST]
    templates += [t for _, test in RELATION_FORMS.values() for t in test]
    assert {word for t in templates for word in re.findall(r"\w+", re.sub(r"\{\w\}", " ", t))} <= {*VOCABULARY}
    assert {*form_words()} <= {*VOCABULARY}


def test_test_sentences_are_never_said_in_training():
    rng = np.random.default_rng(2)
    plain = lambda text: re.sub(r"[^\w ]", "", text.lower())  # noqa: E731
    trained = {plain(paraphrase(text, rng)) for _ in range(5) for _, text in sentences(3)}
    asked = [plain(paraphrase(text, rng, test=True)) for _, text in sentences(3)]
    assert not trained & {*asked}


def undone(text):
    """The sentence without capitals, marks and synonyms."""
    text = re.sub(r"[.!]$", "", text.lower())
    for word, others in SYNONYMS.items():
        text = re.sub(rf"\b({'|'.join(others)})\b", word, text)
    return re.sub(r"\ban? (\w)", lambda m: ("an " if m[1] in "aeiou" else "a ") + m[1], text)


def test_words_are_exchanged_for_their_synonyms_only():
    rng, kept = np.random.default_rng(4), 0
    texts = [text for kind, text in sentences(5) if kind == "caption"]
    for text in texts:
        if undone(paraphrase(text, rng)) == text:
            kept += 1
            parse(text)
    assert 0.25 < kept / len(texts) < 0.5  # the canonical share, and captions whose only change is undone


def test_attributes_survive_in_their_order():
    """Colours, shapes and numbers of a caption are the same words after rewording, in order."""
    rng = np.random.default_rng(6)
    marks = {*SHAPES, *COLORS, *SIZES}
    for kind, text in sentences(7):
        if kind in ("caption", "remove", "exists", "size"):
            for test in (False, True):
                said = undone(paraphrase(text, rng, test=test))
                said = re.sub(r"\b(\w+) that is (\w+)", r"\2 \1", said)
                before, after = ([w for w in re.findall(r"\w+", one) if w in marks] for one in (text, said))
                assert before == after, (text, said)


@pytest.mark.parametrize("test", [False, True])
def test_the_same_choices_give_the_same_words(test):
    once = [paraphrase(text, np.random.default_rng(9), test=test) for _, text in sentences(8)]
    assert once == [paraphrase(text, np.random.default_rng(9), test=test) for _, text in sentences(8)]
    assert len(Counter(once)) > 200
