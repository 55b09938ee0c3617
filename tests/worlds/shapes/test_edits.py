"""Truths about edits: the target is what the instruction says, and nothing else has changed."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from spar.worlds.shapes.captions import edit_layout
from spar.worlds.shapes.edits import ALL_EDIT_KINDS, EDIT_KINDS, Edit, edit_kinds, make_edit
from spar.worlds.shapes.render import coverages, render
from spar.worlds.shapes.scene import (
    HELD_OUT_PAIRS,
    HELD_OUT_POSITION_SHAPES,
    KINDS,
    MAX_OBJECTS,
    RELATIONS,
    Object,
    Scene,
    fits,
    is_clear,
    is_held_out,
    main_relation,
    make_scene,
)
from spar.worlds.shapes.tokenizer import check_words


def sample_edits(number: int = 600, combinations: str = "seen") -> list[tuple[Scene, Edit]]:
    rng = np.random.default_rng(0)
    scenes = [make_scene(seed, combinations=combinations) for seed in range(number)]
    return [(scene, make_edit(scene, rng, combinations=combinations)) for scene in scenes]


EDITS = sample_edits()


def named(scene: Scene, phrase: str) -> Object:
    """The one object that "<color> <shape>" names."""
    (item,) = [item for item in scene.objects if " ".join(item.pair) == phrase]
    return item


def expected(scene: Scene, edit: Edit) -> Scene:
    """What the words ask for, read by other means than the writer's; an added object is taken from the target."""
    text = edit.instruction
    objects, background = list(scene.objects), scene.background
    if found := re.fullmatch(r"(?:change the background to|make the background) (\w+)", text):
        background = found[1]
    elif found := re.fullmatch(r"(?:remove|delete) the (\w+ \w+)", text):
        objects.remove(named(scene, found[1]))
    elif found := re.fullmatch(r"(?:replace|change) the (\w+ \w+) (?:with|to) an? (\w+) (\w+)", text):
        old = named(scene, found[1])
        objects[objects.index(old)] = replace(old, color=found[2], shape=found[3])
    elif found := re.fullmatch(r"add a (small|large) (\w+) (\w+)(?: (.+) the (\w+ \w+))?", text):
        new = edit.target.objects[-1]
        assert (new.size, new.color, new.shape) == found.groups()[:3]
        if found[4]:
            anchor = named(scene, found[5])
            assert is_clear(new, anchor) and RELATIONS[main_relation(new, anchor)] == found[4]
        objects.append(new)
    else:
        found = re.fullmatch(r"(?:recolor|make|change the color of) the (\w+ \w+) (?:to )?(\w+)", text)
        assert found is not None, text
        old = named(scene, found[1])
        objects[objects.index(old)] = replace(old, color=found[2])
    return Scene(background, tuple(objects), edit.target.kind)


def test_the_target_is_what_the_words_ask_for_and_differs() -> None:
    for scene, edit in EDITS + sample_edits(200, "held_out") + sample_edits(200, "any"):
        assert edit.target == expected(scene, edit)
        assert (edit.target.background, edit.target.objects) != (scene.background, scene.objects)
        check_words(edit.instruction)


def test_targets_are_scenes_of_this_world() -> None:
    rng = np.random.default_rng(4)
    crowded = [scene for scene, _ in EDITS if "add" in edit_kinds(scene)]
    for edit in [edit for _, edit in EDITS] + [make_edit(scene, rng, "add") for scene in crowded]:
        objects = edit.target.objects
        assert 1 <= len(objects) <= MAX_OBJECTS
        assert all(fits(item, [other for other in objects if other is not item]) for item in objects)
        assert edit.target.kind in KINDS


def test_pixels_away_from_the_edited_object_stay() -> None:
    for scene, edit in EDITS[:200]:
        if edit.kind == "background":
            continue
        changed = set(scene.objects) ^ set(edit.target.objects)
        touched = sum(coverages(replace(scene, objects=(item,)))[0] for item in changed) > 0
        differs = (render(scene) != render(edit.target)).any(-1)
        assert differs.any() and not differs[~touched].any()


def test_every_kind_is_dealt_and_some_additions_have_a_place() -> None:
    kinds = Counter(edit.kind for _, edit in EDITS)
    assert min(kinds[kind] for kind in EDIT_KINDS) > 60
    added = [edit.instruction for _, edit in EDITS if edit.kind == "add"]
    placed = [text for text in added if " the " in text]
    assert 0.1 < len(placed) / len(added) < 0.6


def test_training_targets_never_hold_what_is_held_out() -> None:
    for _, edit in EDITS:
        assert not is_held_out(edit.target)
        assert not (edit.kind == "add" and HELD_OUT_POSITION_SHAPES <= set(edit.instruction.split()))


@pytest.mark.parametrize("kind", ["recolor", "add", "replace"])
def test_held_out_edits_make_something_new(kind: str) -> None:
    rng = np.random.default_rng(1)
    made = 0
    for seed in range(100):
        scene = make_scene(seed)
        if kind in edit_kinds(scene, "held_out"):
            new = set(make_edit(scene, rng, kind, "held_out").target.objects) - set(scene.objects)
            assert {item.pair for item in new} <= HELD_OUT_PAIRS and len(new) == 1
            made += 1
    assert made > 20


def test_a_kind_that_is_asked_for_is_made() -> None:
    rng = np.random.default_rng(2)
    for seed in range(60):
        scene = make_scene(seed, kind="two")
        assert set(EDIT_KINDS) <= set(edit_kinds(scene)) <= set(ALL_EDIT_KINDS)
        for kind in EDIT_KINDS:
            assert make_edit(scene, rng, kind).kind == kind


def test_edits_that_cannot_be_are_refused() -> None:
    rng = np.random.default_rng(3)
    single, count = make_scene(0, kind="single"), make_scene(0, kind="count")
    assert "remove" not in edit_kinds(single)
    assert not {"recolor", "remove", "replace"} & set(edit_kinds(count))
    with pytest.raises(ValueError, match="allows the edits .*got 'remove'"):
        make_edit(single, rng, "remove")
    with pytest.raises(ValueError, match="allows the edits .*got 'background'"):
        make_edit(single, rng, "background", "held_out")
    with pytest.raises(ValueError, match="held-out scene"):
        make_edit(make_scene(0, combinations="held_out"), rng)
    with pytest.raises(ValueError, match="kind must be one of .*'turn'"):
        make_edit(single, rng, "turn")
    with pytest.raises(ValueError, match="combinations must be one of"):
        make_edit(single, rng, combinations="new")


def placed(scene: Scene) -> Counter[str]:
    """The looks of a scene's objects with their cells, an eighth of the image a side."""
    names = ("one", "two", "three", "four", "five", "six", "seven", "eight")
    return Counter(
        f"{item.size} {item.color} {item.shape} on column {names[int(item.x // 8)]} row {names[int(item.y // 8)]}"
        for item in scene.objects
    )


def test_the_layout_of_an_edit_makes_the_target_of_the_source():
    rng = np.random.default_rng(0)
    edits = EDITS + [
        (scene, make_edit(scene, rng, kind))
        for scene in map(make_scene, range(200)) for kind in ("resize", "move") if kind in edit_kinds(scene)
    ]  # fmt: skip
    for scene, edit in edits:
        text = edit_layout(scene, edit.target)
        check_words(text)
        objects, background = placed(scene), scene.background
        for part in text.split(", "):
            first, rest = part.split(" ", 1)
            if rest.endswith(" background"):
                background = rest.removesuffix(" background")
            else:
                objects[rest] += {"no": -1, "a": 1}[first]
        assert +objects == placed(edit.target) == objects and background == edit.target.background
