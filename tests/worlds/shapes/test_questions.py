"""Truths about questions: answers are true, balanced, and never found in the words alone."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from spar.worlds.shapes.questions import QUESTION_KINDS, Question, questions
from spar.worlds.shapes.scene import HELD_OUT_PAIRS, HELD_OUT_POSITION_SHAPES, KINDS, Scene, make_scene
from spar.worlds.shapes.tokenizer import NUMBERS, SINGULARS, check_words

SCENES = [make_scene(seed) for seed in range(3000)]


def ask_all(scenes: list[Scene], seed: int = 0) -> list[tuple[Scene, Question]]:
    rng = np.random.default_rng(seed)
    return [(scene, question) for scene in scenes for question in questions(scene, rng)]


ASKED = ask_all(SCENES)


def answer(scene: Scene, text: str) -> str:
    """The answer found from the words and the objects alone, by other means than the asker's."""
    objects = scene.objects
    if text == "what color is the background?":
        return scene.background
    if found := re.fullmatch(r"what color (?:is|are) the (\w+)\?", text):
        (color,) = {item.color for item in objects if item.shape == SINGULARS.get(found[1], found[1])}
        return color
    if found := re.fullmatch(r"what shape (?:is|are) the (\w+) objects?\?", text):
        (shape,) = {item.shape for item in objects if item.color == found[1]}
        return shape
    if found := re.fullmatch(r"how many (\w+) are there\?", text):
        return NUMBERS[sum(item.shape == SINGULARS[found[1]] for item in objects)]
    if found := re.fullmatch(r"is there an? (\w+) (\w+)\?", text):
        return "yes" if (found[1], found[2]) in {item.pair for item in objects} else "no"
    found = re.fullmatch(r"is the (\w+ \w+) (to the left of|to the right of|above|below) the (\w+ \w+)\?", text)
    assert found is not None, text
    (first,) = [item for item in objects if " ".join(item.pair) == found[1]]
    (second,) = [item for item in objects if " ".join(item.pair) == found[3]]
    dx, dy = second.x - first.x, second.y - first.y
    offset = {"to the left of": dx, "to the right of": -dx, "above": dy, "below": -dy}[found[2]]
    assert abs(offset) >= 6, "too close to tell"
    return "yes" if offset > 0 else "no"


def test_answers_are_true_single_known_words() -> None:
    for scene, question in ASKED:
        assert question.answer == answer(scene, question.text)
        assert check_words(question.answer) == [question.answer]
        check_words(question.text)


def test_held_out_scenes_get_true_answers_too() -> None:
    scenes = [make_scene(seed, kind=kind, combinations="held_out") for seed in range(100) for kind in KINDS]
    asked = ask_all(scenes)
    assert all(question.answer == answer(scene, question.text) for scene, question in asked)
    assert {question.kind for _, question in asked} == set(QUESTION_KINDS)


@pytest.mark.parametrize("kind", ["exists", "position"])
def test_yes_and_no_are_balanced_whatever_the_words(kind: str) -> None:
    asked = [question for _, question in ASKED if question.kind == kind]
    assert len(asked) > 1200
    assert abs(np.mean([question.answer == "yes" for question in asked]) - 0.5) < 0.04
    by_word = defaultdict(list)
    for question in asked:
        for word in set(question.text.split()):
            by_word[word].append(question.answer == "yes")
    for word, answers in by_word.items():
        if len(answers) > 300:
            assert abs(np.mean(answers) - 0.5) < 0.15, word


@pytest.mark.parametrize(("kind", "limit"), [("color", 0.25), ("shape", 0.3), ("background", 0.25), ("exists", 0.6)])
def test_guessing_from_the_words_alone_fails(kind: str, limit: float) -> None:
    """The best blind guesser, which learns the commonest answer of each wording, tested on other scenes."""
    known: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for _, question in ASKED[: len(ASKED) // 2]:
        known[question.text][question.answer] += 1
    rest = [question for _, question in ASKED[len(ASKED) // 2 :] if question.kind == kind and question.text in known]
    right = [known[question.text].most_common(1)[0][0] == question.answer for question in rest]
    assert len(rest) > 300 and np.mean(right) < limit


def test_no_is_asked_about_what_nearly_is_there() -> None:
    hard = []
    for scene, question in ASKED:
        if question.kind == "exists" and question.answer == "no":
            color, shape = question.text.rstrip("?").split()[-2:]
            same_color = color in {item.color for item in scene.objects}
            same_shape = shape in {item.shape for item in scene.objects}
            assert same_color or same_shape
            if scene.kind == "multi":
                hard.append(same_color and same_shape)
    assert np.mean(hard) > 0.5


def test_training_is_never_asked_about_what_is_held_out() -> None:
    for _, question in ASKED:
        words = question.text.rstrip("?").split()
        if question.kind == "exists":
            assert (words[-2], words[-1]) not in HELD_OUT_PAIRS
        if question.kind == "position":
            assert not HELD_OUT_POSITION_SHAPES <= set(words)


def test_every_count_is_asked_for() -> None:
    answers = Counter(question.answer for _, question in ASKED if question.kind == "count")
    assert set(answers) == set(NUMBERS)
    assert 0.15 < answers["zero"] / sum(answers.values()) < 0.35


def test_kinds_are_those_asked_for_in_their_order() -> None:
    rng = np.random.default_rng(0)
    multi, single = make_scene(1, kind="multi"), make_scene(1, kind="single")
    assert [question.kind for question in questions(multi, rng)] == list(QUESTION_KINDS)
    assert [question.kind for question in questions(multi, rng, ("count", "color"))] == ["count", "color"]
    assert questions(single, rng, ("position",)) == []
    with pytest.raises(ValueError, match="question kind must be one of .*'weight'"):
        questions(multi, rng, ("weight",))


def curriculum_questions(kind: str, scenes: list[Scene]) -> list[tuple[Scene, Question]]:
    rng = np.random.default_rng(0)
    return [(scene, question) for scene in scenes for question in questions(scene, rng, (kind,))]


def test_a_relation_is_true_and_names_its_objects_without_doubt():
    answers = Counter()
    for scene, question in curriculum_questions("relation", SCENES[:1000]):
        found = re.fullmatch(r"where is the (\w+) (\w+) from the (\w+) (\w+)\?", question.text)
        (a,) = [o for o in scene.objects if o.pair == (found[1], found[2])]
        (b,) = [o for o in scene.objects if o.pair == (found[3], found[4])]
        dx, dy = a.x - b.x, a.y - b.y
        offsets = {"left": -dx, "right": dx, "above": -dy, "below": dy}
        assert offsets[question.answer] == max(abs(dx), abs(dy)) >= 6
        assert {a.shape, b.shape} != HELD_OUT_POSITION_SHAPES
        check_words(question.text)
        answers[question.answer] += 1
    assert min(answers.values()) > 0.15 * answers.total() and len(answers) == 4


def test_a_place_is_the_cell_of_the_objects_centre():
    numbers = "one two three four five six seven eight".split()
    seen = set()
    for scene, question in curriculum_questions("place", SCENES[:1000]):
        found = re.fullmatch(r"where is the (\w+) (\w+)\?", question.text)
        (item,) = [o for o in scene.objects if o.pair == (found[1], found[2])]
        place = re.fullmatch(r"column (\w+) row (\w+)", question.answer)
        for name, at in ((place[1], item.x), (place[2], item.y)):
            assert 8 * numbers.index(name) <= at < 8 * numbers.index(name) + 8
            seen.add(name)
        check_words(question.text), check_words(question.answer)
    assert len(seen) >= 6  # an object does not come nearer to the edge than its radius


def test_a_scene_of_one_object_or_of_like_ones_has_no_relation_and_an_empty_one_no_place():
    scenes = [make_scene(seed, kind=kind) for seed in range(50) for kind in ("single", "count")]
    assert curriculum_questions("relation", scenes) == []
    assert curriculum_questions("place", [Scene("gray", (), "single")]) == []
