"""Shapes-Edit's verdict: what must hold, what must stay, and what may move."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from spar.evaluation.options import EvalOptions
from spar.evaluation.shapes_edit import EditItem, check_edit, edit_items, needs_binding, run_edits
from spar.worlds.shapes.edits import ALL_EDIT_KINDS, EDIT_KINDS, Edit
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import BINDING_KINDS, Object, Scene, is_held_out

CIRCLE = Object("circle", "red", "large", 18.0, 18.0)
STAR = Object("star", "blue", "small", 46.0, 20.0)
NEW = Object("square", "green", "small", 46.0, 46.0)
SOURCE = Scene("gray", (CIRCLE, STAR), "two")


def item(kind, instruction, *objects, background="gray", place=None):
    return EditItem(0, 0, SOURCE, render(SOURCE), Edit(kind, instruction, Scene(background, objects, "two"), place))


RECOLOR = item("recolor", "make the red circle cyan", replace(CIRCLE, color="cyan"), STAR)
REMOVE = item("remove", "remove the red circle", STAR)
ADD = item("add", "add a small green square", CIRCLE, STAR, NEW)
PLACED = item("add", "add a small green square below the blue star", CIRCLE, STAR, NEW, place=("below", STAR))
SQUARE = replace(CIRCLE, shape="square", color="green")
REPLACE = item("replace", "replace the red circle with a green square", SQUARE, STAR)
BACKGROUND = item("background", "make the background navy", CIRCLE, STAR, background="navy")
ALL = {"recolor": RECOLOR, "remove": REMOVE, "add": ADD, "placed": PLACED, "replace": REPLACE, "background": BACKGROUND}


def verdict(asked, *objects, background="gray"):
    return check_edit(asked, render(Scene(background, objects, "multi")))


def test_a_moved_object_must_go_its_way_and_a_resized_one_stays() -> None:
    move = item("move", "move the blue star down", CIRCLE, replace(STAR, y=36.0), place=("below", STAR))
    for y, x, right in ((36, 46, True), (28, 46, True), (24, 46, False), (12, 46, False), (36, 51, False)):
        assert verdict(move, CIRCLE, replace(STAR, x=float(x), y=float(y))).right is right, (x, y)
    assert not verdict(move, replace(CIRCLE, y=24.0), replace(STAR, y=36.0)).right
    grow = item("resize", "make the blue star larger", CIRCLE, replace(STAR, size="large"))
    assert verdict(grow, CIRCLE, replace(STAR, size="large")).right
    assert not verdict(grow, CIRCLE, STAR).right
    assert not verdict(grow, CIRCLE, replace(STAR, size="large", x=40.0)).right


def test_edits_that_need_binding_concern_an_object_that_shares_something() -> None:
    items = edit_items(EvalOptions(limit=20), "shapes-edit-bind")
    assert Counter(one.edit.kind for one in items) == dict.fromkeys(set(ALL_EDIT_KINDS) - {"background"}, 20)
    for one in items:
        assert one.scene.kind in BINDING_KINDS and needs_binding(one.scene, one.edit)
        assert check_edit(one, render(one.edit.target)).right and not check_edit(one, one.image).right
        assert one.edit.kind != "add" or one.edit.place is not None
    alone = Scene("gray", (CIRCLE, STAR), "two")
    assert not needs_binding(alone, Edit("remove", "remove the red circle", Scene("gray", (STAR,), "single")))


def test_a_refused_instruction_is_wrong_and_the_others_are_asked(oracle) -> None:
    options = EvalOptions(limit=1)
    items, pipe = edit_items(options), oracle(options)
    pipe.refused = {items[1].edit.instruction}
    verdicts = run_edits(pipe, items, [one.edit.instruction for one in items], options)
    assert [v.right for v in verdicts] == [True, False, True, True, True]


@pytest.mark.parametrize("asked", ALL.values(), ids=ALL)
def test_the_target_is_right_and_the_source_is_not(asked):
    done = check_edit(asked, render(asked.edit.target))
    assert done.right and all(done.parts.values())
    left = check_edit(asked, asked.image)
    assert not left.right and not left.parts["instruction"]
    assert left.parts["kept"]


@pytest.mark.parametrize("asked", ALL.values(), ids=ALL)
def test_an_object_kept_may_move_by_no_more_than_two_pixels(asked):
    def moved(by):
        objects = [replace(one, x=one.x + by) if one == STAR else one for one in asked.edit.target.objects]
        return verdict(asked, *objects, background=asked.edit.target.background)

    assert moved(1.5).right
    far = moved(3.0)
    assert not far.right and not far.parts["kept"]


@pytest.mark.parametrize("change", [{"color": "pink"}, {"shape": "cross"}, {"size": "large"}])
@pytest.mark.parametrize("asked", ALL.values(), ids=ALL)
def test_an_object_kept_keeps_its_look(asked, change):
    objects = [replace(one, **change) if one == STAR else one for one in asked.edit.target.objects]
    found = verdict(asked, *objects, background=asked.edit.target.background)
    assert not found.right and not found.parts["kept"]


@pytest.mark.parametrize("asked", ALL.values(), ids=ALL)
def test_nothing_else_may_appear_and_the_background_must_hold(asked):
    target = asked.edit.target
    more = verdict(asked, *target.objects, Object("cross", "orange", "small", 20.0, 50.0), background=target.background)
    assert not more.right and not more.parts["nothing_else"] and more.parts["instruction"]
    ground = verdict(asked, *target.objects, background="brown")
    assert not ground.right and not ground.parts["background"] and ground.parts["kept"]


def test_an_added_object_lies_anywhere_unless_its_place_is_said():
    elsewhere = replace(NEW, x=20.0, y=50.0)
    assert verdict(ADD, CIRCLE, STAR, elsewhere).right
    assert verdict(PLACED, CIRCLE, STAR, elsewhere).right  # lower left is still below the star
    above = replace(NEW, x=34.0, y=10.0)
    assert verdict(ADD, CIRCLE, replace(STAR, x=54.0), above).parts["instruction"]
    assert not verdict(PLACED, CIRCLE, STAR, replace(NEW, x=44.0, y=8.0)).parts["instruction"]


def test_a_replaced_object_stays_in_its_place_and_size():
    new = REPLACE.edit.target.objects[0]
    assert not verdict(REPLACE, replace(new, x=new.x + 4), STAR).right
    assert not verdict(REPLACE, replace(new, size="small"), STAR).right


def test_psnr_is_of_what_lies_outside_the_edit():
    assert check_edit(RECOLOR, render(RECOLOR.edit.target)).psnr == 100.0
    assert check_edit(BACKGROUND, render(BACKGROUND.edit.target)).psnr is None
    noisy = render(RECOLOR.edit.target).astype(int)
    noisy[48:] += 10  # a quarter of the rows, far from the circle
    found = check_edit(RECOLOR, noisy.astype(np.uint8))
    inside = 26 * 26  # about the circle's region
    expected = -10 * np.log10((10 / 255) ** 2 * 16 * 64 / (64 * 64 - inside))
    assert found.psnr == pytest.approx(expected, abs=0.2)


def test_a_moved_object_is_outside_of_nothing_as_far_as_it_goes():
    move = item("move", "move the blue star down", CIRCLE, replace(STAR, y=36.0), place=("below", STAR))
    for y in (28.0, 36.0, 50.0):
        assert verdict(move, CIRCLE, replace(STAR, y=y)).psnr == 100.0


def test_an_added_object_is_outside_of_nothing_wherever_it_lies():
    assert verdict(ADD, CIRCLE, STAR, replace(NEW, x=20.0, y=50.0)).psnr == 100.0


@pytest.mark.parametrize("combinations", ["seen", "held_out"])
def test_there_are_a_hundred_a_kind_and_their_targets_are_right(combinations):
    items = edit_items(EvalOptions(combinations=combinations))
    assert Counter(one.edit.kind for one in items) == {kind: 100 for kind in EDIT_KINDS}
    for one in items[::17]:
        assert check_edit(one, render(one.edit.target)).right, one.edit
    if combinations == "seen":
        assert not any(is_held_out(one.scene) or is_held_out(one.edit.target) for one in items)
    else:
        assert all(is_held_out(one.scene) or is_held_out(one.edit.target) for one in items)
