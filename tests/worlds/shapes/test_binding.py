"""Truths about version 2's scenes, names, questions and edits: one attribute is not enough, each name is unique."""

import re
from collections import Counter

import numpy as np
import pytest

from spar.common.errors import InputError
from spar.worlds.shapes.captions import Claim, Group, caption, open_caption, parse, to_text
from spar.worlds.shapes.detector import detect, detector_accuracy, satisfies
from spar.worlds.shapes.edits import ALL_EDIT_KINDS, BY_ANYTHING, BY_NEED, edit_kinds, make_edit
from spar.worlds.shapes.questions import BINDING_QUESTION_KINDS, QUESTION_KINDS, questions
from spar.worlds.shapes.references import PLACES, references
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import (
    ALL_KINDS,
    BINDING_KINDS,
    COMBINATIONS,
    HELD_OUT_PAIRS,
    RELATIONS,
    Object,
    Scene,
    are_apart,
    fits,
    is_held_out,
    make_scene,
)
from spar.worlds.shapes.tokenizer import NUMBERS, SINGULARS, check_words

SCENES = [make_scene(seed, kind=kind, combinations="any") for seed in range(400) for kind in BINDING_KINDS]


@pytest.mark.parametrize("combinations", COMBINATIONS)
def test_scenes_share_what_they_must(combinations):
    for seed in range(200):
        scene = make_scene(seed, kind="shared", combinations=combinations)
        pairs = [item.pair for item in scene.objects]
        assert len(pairs) in (3, 4) and len(set(pairs)) == len(pairs)
        assert max(Counter(item.shape for item in scene.objects).values()) >= 2
        assert max(Counter(item.color for item in scene.objects).values()) >= 2
        twins = make_scene(seed, kind="twins", combinations=combinations)
        first, second = twins.objects[:2]
        assert 2 <= len(twins.objects) <= 4 and first.pair == second.pair
        assert first.size != second.size or are_apart(first, second)
        assert Counter(item.pair for item in twins.objects).most_common()[0] == (first.pair, 2)
        for one in (scene, twins):
            assert all(fits(item, [x for x in one.objects if x is not item]) for item in one.objects)
            held_out = any(item.pair in HELD_OUT_PAIRS for item in one.objects)
            assert combinations == "any" or held_out == (combinations == "held_out")


def found_by(scene: Scene, name: str) -> list[Object]:
    """The objects of a name, read word by word."""
    name, _, place = name.partition(" on the ") if " on the " in name else name.partition(" at the ")
    words = {*name.split()} - {"object"}
    items = [item for item in scene.objects if words <= {item.shape, item.color, item.size}]
    if place:
        axis, last = {"left": ("x", 0), "right": ("x", -1), "top": ("y", 0), "bottom": ("y", -1)}[place]
        items = [sorted(items, key=lambda item: getattr(item, axis))[last]]
    return items


def test_a_name_fits_one_object():
    for scene in SCENES:
        for item in scene.objects:
            names = references(scene, item)
            assert len(set(names)) == len(names)
            assert all(found_by(scene, name) == [item] for name in names), (scene, item, names)
    assert {phrase for scene in SCENES for item in scene.objects for name in references(scene, item)
            for phrase in PLACES.values() if phrase in name} == set(PLACES.values())  # fmt: skip


def test_twins_apart_are_told_by_place_and_others_by_size():
    low, high = Object("ring", "red", "small", 20, 12), Object("ring", "red", "small", 22, 50)
    scene = Scene("gray", (low, high), "twins")
    names = ("ring", "red ring", "small ring", "red object", "small red ring", "small red object")
    assert set(references(scene, low)) == {f"{name} at the top" for name in names}
    big = Object("ring", "red", "large", 24, 14)
    assert "small red ring" in references(Scene("gray", (big, high), "twins"), high)
    near = Object("ring", "red", "small", 32, 24)
    assert references(Scene("gray", (low, near), "twins"), low) == []  # alike, and too near to tell


def answer(scene: Scene, text: str) -> str:
    """The answer found from the words alone, by other means than the asker's."""
    if text == "how many objects are there?":
        return NUMBERS[len(scene.objects)]
    if found := re.fullmatch(r"how many (\w+) objects are there\?", text):
        return NUMBERS[sum(item.color == found[1] for item in scene.objects)]
    if found := re.fullmatch(r"how many (\w+) (\w+) are there\?", text):
        return NUMBERS[sum(item.pair == (found[1], SINGULARS[found[2]]) for item in scene.objects)]
    if found := re.fullmatch(r"what (size|color|shape) is the (.+)\?", text):
        around = "|".join(RELATIONS.values())
        beside = re.fullmatch(rf"object ({around}) the (.+)", found[2])
        if beside:
            return neighbor(scene, beside[1], beside[2]).color
        (item,) = found_by(scene, found[2])
        return getattr(item, found[1])
    found = re.fullmatch(r"what is (to the left of|to the right of|above|below) the (.+)\?", text)
    assert found is not None, text
    return neighbor(scene, found[1], found[2]).shape


def neighbor(scene: Scene, phrase: str, name: str) -> Object:
    (other,) = found_by(scene, name)
    axis, sign = ("x" if phrase.startswith("to") else "y"), (-1 if phrase in ("to the left of", "above") else 1)
    (item,) = [item for item in scene.objects if sign * (getattr(item, axis) - getattr(other, axis)) > 0]
    return item


def test_answers_are_true_words():
    rng, kinds = np.random.default_rng(0), [kind for kind in BINDING_QUESTION_KINDS if kind not in QUESTION_KINDS]
    asked = [(scene, q) for scene in SCENES for q in questions(scene, rng, kinds)]
    assert {q.kind for _, q in asked} == set(kinds)
    for scene, question in asked:
        assert question.answer == answer(scene, question.text), (scene, question)
        assert check_words(question.answer) == [question.answer] and check_words(question.text)
    sizes = Counter(q.answer for _, q in asked if q.kind == "size")
    assert 0.4 < sizes["small"] / sizes.total() < 0.6


@pytest.mark.parametrize("naming", [BY_NEED, BY_ANYTHING], ids=["by_need", "by_anything"])
def test_edits_change_the_object_named_and_nothing_else(naming):
    rng = np.random.default_rng(1)
    seen: Counter[str] = Counter()
    for scene in SCENES:
        for kind in edit_kinds(scene, "any", naming):
            try:
                edit = make_edit(scene, rng, kind, "any", naming)
            except ValueError:
                continue
            seen[kind] += 1
            check_words(edit.instruction)
            gone = [item for item in scene.objects if item not in edit.target.objects]
            new = [item for item in edit.target.objects if item not in scene.objects]
            if kind in ("background", "add"):
                assert not gone and len(new) == (kind == "add")
                continue
            assert len(gone) == 1 and len(new) == (kind != "remove")
            verbs = "recolor|make|change the color of|remove|delete|replace|change|move"
            name = re.match(rf"(?:{verbs}) the (.+)", edit.instruction)
            words = re.split(r" to | with an? | larger| smaller| up$| down$", name[1])[0]
            if kind == "recolor":
                words = words.removesuffix(f" {new[0].color}")
            assert found_by(scene, words) == gone, (edit.instruction, scene)
            if kind == "move":
                direction, item = edit.place
                assert item is gone[0] and fits(new[0], [x for x in edit.target.objects if x is not new[0]])
                dx, dy = new[0].x - item.x, new[0].y - item.y
                way = {"left": -dx, "right": dx, "above": -dy, "below": dy}[direction]
                assert 8 <= way <= 16 + 1e-9 and way == pytest.approx(abs(dx) + abs(dy))
            if kind == "resize":
                assert ("larger" in edit.instruction) == (new[0].size == "large")
    assert set(seen) == set(ALL_EDIT_KINDS)


def test_open_captions_are_true_of_their_scene_and_of_any_other_that_fits():
    rng = np.random.default_rng(2)
    texts = Counter()
    for seed in range(300):
        scene = make_scene(seed, kind=ALL_KINDS[seed % len(ALL_KINDS)])
        text = open_caption(scene, rng)
        texts[text] += 1
        assert to_text(parse(text)) == text
        assert satisfies(detect(render(scene)), parse(text))[0], (text, scene)
    assert any("object" in text for text in texts) and any(text.startswith("some ") for text in texts)
    pair = Scene("gray", (Object("star", "red", "small", 15, 15), Object("star", "blue", "large", 45, 45)), "two")
    seen = detect(render(pair))
    truths = {"two stars": True, "some stars": True, "some objects": True, "a red object and a blue star": True,
              "something red and a large object": True, "three stars": False, "a star": False, "some circles": False,
              "something green and a star": False}  # fmt: skip
    assert {text: satisfies(seen, parse(text))[0] for text in truths} == truths
    one = detect(render(Scene("gray", pair.objects[:1], "single")))
    assert not satisfies(one, parse("some stars"))[0] and satisfies(one, parse("something red"))[0]
    assert parse("a circle!") == parse("a circle") == parse("A circle?")
    with pytest.raises(InputError, match="a number for all groups"):
        parse("some stars and some circles")
    assert parse("something red") == Claim(None, (Group(None, "red", None, 1),))


def test_a_neighbor_lies_mainly_where_it_is_said_to_lie():
    rng = np.random.default_rng(5)
    for scene in SCENES:
        for question in questions(scene, rng, ("neighbor",)):
            phrase, name = re.search(r"(to the left of|to the right of|above|below) the (.+)\?", question.text).groups()
            (other,) = found_by(scene, name)
            item = neighbor(scene, phrase, name)
            dx, dy = abs(item.x - other.x), abs(item.y - other.y)
            assert (dx if phrase.startswith("to") else dy) >= max(6, min(dx, dy)), (scene, question)
            assert (dx >= dy) == phrase.startswith("to") or dx == dy


def test_places_do_not_relate_the_shapes_whose_relations_are_held_out():
    objects = (Object("triangle", "green", "small", 20, 12), Object("cross", "green", "small", 22, 50))
    assert not any(" at " in name for name in references(Scene("gray", objects, "two"), objects[0]))
    held_out = Scene("gray", (*objects, Object("circle", "purple", "small", 50, 30)), "multi")
    assert "green object at the top" in references(held_out, objects[0])


def test_captions_of_twins_say_both():
    scene = make_scene(3, kind="twins")
    text = caption(scene, np.random.default_rng(0), size=True, background=True)
    assert satisfies(detect(render(scene)), parse(text))[0]
    assert sum(group.count for group in parse(text).groups) == len(scene.objects)
    assert not is_held_out(scene)


@pytest.mark.parametrize(("degrade", "least"), [(False, 0.999), (True, 0.99)])
def test_the_detector_reads_these_scenes_as_well(degrade, least):
    assert detector_accuracy(1000, degrade, kinds=BINDING_KINDS) >= least
