"""Shapes-VQA's questions and its blind baseline."""

from collections import Counter

import pytest

from spar.evaluation.options import EvalOptions
from spar.evaluation.shapes_vqa import BlindBaseline, is_right, pattern, vqa_items
from spar.worlds.shapes.detector import detect
from spar.worlds.shapes.questions import QUESTION_KINDS, Question
from spar.worlds.shapes.scene import SEED_RANGES, is_held_out, make_scene


@pytest.fixture(scope="module")
def items():
    return vqa_items(EvalOptions())


def test_there_are_two_hundred_a_kind_each_of_another_scene(items):
    assert Counter(item.question.kind for item in items) == {kind: 200 for kind in QUESTION_KINDS}
    assert len({item.scene for item in items}) == len(items)
    assert not any(is_held_out(item.scene) for item in items)
    assert all(is_held_out(item.scene) for item in vqa_items(EvalOptions(limit=5, combinations="held_out")))


def test_yes_and_no_are_balanced(items):
    for kind in ("exists", "position"):
        yes = [item.question.answer == "yes" for item in items if item.question.kind == kind]
        assert 0.4 < sum(yes) / len(yes) < 0.6


def test_background_answers_are_what_the_judge_sees(items):
    for item in [item for item in items if item.question.kind == "background"][::10]:
        assert detect(item.image).background == item.question.answer


def test_blind_answers_are_far_from_right_but_better_than_none(items):
    blind = BlindBaseline.learn("seen")
    right = Counter(item.question.kind for item in items if blind.answer(item.question) == item.question.answer)
    assert all(right[kind] / 200 < 0.75 for kind in QUESTION_KINDS)
    assert right["color"] / 200 > 1 / 16 and right["exists"] / 200 > 0.4


def test_the_blind_baseline_learns_from_validation_scenes_alone(monkeypatch):
    from spar.evaluation import shapes_vqa

    seeds = []

    def spy(seed, **keywords):
        seeds.append(seed)
        return make_scene(seed, **keywords)

    monkeypatch.setattr(shapes_vqa, "make_scene", spy)
    monkeypatch.setattr(shapes_vqa, "BLIND_SAMPLE", 50)
    shapes_vqa._learn.__wrapped__("seen", "shapes-vqa")
    start, stop = SEED_RANGES["validation"]
    assert len(seeds) == 50 and all(start <= seed < stop for seed in seeds)


def test_the_narrowest_words_that_say_something_answer():
    blind = BlindBaseline({"is there a red star?": "no", "is there a <color> <shape> ?": "yes"}, {"exists": "maybe"})
    assert blind.answer(Question("exists", "is there a red star?", "")) == "no"
    assert blind.answer(Question("exists", "is there an orange star?", "")) == "yes"
    assert blind.answer(Question("exists", "is there anything?", "")) == "maybe"


def test_a_pattern_leaves_colours_and_shapes_open():
    assert pattern("how many crosses are there?") == "how many <shape> are there ?"
    assert pattern("is the red star above the blue ring?") == "is the <color> <shape> above the <color> <shape> ?"
    assert pattern("what color is the background?") == "what color is the background ?"


@pytest.mark.parametrize(("answer", "right"), [(" Red.", True), ("red", True), ("red circle", False), ("", False)])
def test_an_answer_is_one_word(answer, right):
    assert is_right(answer, "red") == right
