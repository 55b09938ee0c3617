"""Edits of a scene: an instruction in words and the scene that it asks for, which differs only where the words say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from spar.worlds.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    COMBINATIONS,
    HELD_OUT_PAIRS,
    HELD_OUT_POSITION_SHAPES,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    fits,
    is_clear,
    is_held_out,
    main_relation,
    pick,
    place,
    unique_objects,
)
from spar.worlds.shapes.words import look_text, with_article

EDIT_KINDS = ("recolor", "remove", "add", "replace", "background")
PLACED_SHARE = 0.5  # of the objects added, how many are given a place beside another object, where there is room
PLACE_TRIES = 200  # random centres tried for an added object


@dataclass(frozen=True)
class Edit:
    """An instruction and the scene that it makes of its source; objects kept are the source's own, in their order."""

    kind: str
    instruction: str
    target: Scene


def edit_kinds(scene: Scene, combinations: str = "seen") -> tuple[str, ...]:
    """The kinds of edit that a scene allows, as far as its objects' looks tell (lack of room may still bar "add").

    Removing needs a second object; recolouring, removing and replacing need one that colour and shape name uniquely.
    """
    named = unique_objects(scene)
    allowed = {
        "recolor": any(True for item in named for _ in _new_colors(scene, item, combinations)),
        "remove": bool(named) and len(scene.objects) > 1,
        "add": len(scene.objects) < MAX_OBJECTS,
        "replace": any(True for item in named for _ in _new_pairs(scene, item, combinations)),
        "background": True,
    }
    return tuple(kind for kind in EDIT_KINDS if allowed[kind])


def make_edit(scene: Scene, rng: np.random.Generator, kind: str | None = None, combinations: str = "seen") -> Edit:
    """A random edit of a scene.

    Args:
        scene: the source.
        rng: source of the choices.
        kind: one of EDIT_KINDS; any that the scene allows when None.
        combinations: which (colour, shape) pairs may be made: "seen" no held-out one, "held_out" only held-out ones
            (removing and changing the background make none, so that their source must be held out), "any" all.

    Raises:
        ValueError: an unknown kind, one that the scene does not allow (see `edit_kinds`), or a source that does not
            suit the combinations.
    """
    if combinations not in COMBINATIONS:
        raise ValueError(f"combinations must be one of {COMBINATIONS}, got {combinations!r}")
    if kind is not None and kind not in EDIT_KINDS:
        raise ValueError(f"kind must be one of {EDIT_KINDS}, got {kind!r}")
    held_out = is_held_out(scene)
    if combinations == "seen" and held_out:
        raise ValueError("the source is a held-out scene, which combinations='seen' does not allow")
    allowed = list(edit_kinds(scene, combinations))
    if combinations == "held_out" and not held_out:
        allowed = [name for name in allowed if name not in ("remove", "background")]
    if kind is not None:
        allowed = [kind] if kind in allowed else []
    while allowed:
        drawn = pick(rng, allowed)
        edit = _MAKE[drawn](scene, rng, combinations)
        if edit is not None:
            return edit
        allowed.remove(drawn)
    raise ValueError(f"the scene does not allow the edit {kind!r} with combinations={combinations!r}: {scene}")


def kind_of(objects: tuple[Object, ...]) -> str:
    """The kind of scene that objects make; "position" is never one, since it is a way of speaking."""
    if len(objects) == 1:
        return "single"
    if len({(*item.pair, item.size) for item in objects}) == 1:
        return "count"
    return "two" if len(objects) == 2 else "multi"


def _allows(pair: tuple[str, str], combinations: str) -> bool:
    return combinations == "any" or (pair in HELD_OUT_PAIRS) == (combinations == "held_out")


def _new_colors(scene: Scene, item: Object, combinations: str) -> Iterator[str]:
    present = {other.pair for other in scene.objects}
    return (c for c in COLORS if (c, item.shape) not in present and _allows((c, item.shape), combinations))


def _new_pairs(scene: Scene, item: Object, combinations: str) -> Iterator[tuple[str, str]]:
    present = {other.pair for other in scene.objects}
    pairs = ((color, shape) for shape in SHAPES if shape != item.shape for color in COLORS)
    return (pair for pair in pairs if pair not in present and _allows(pair, combinations))


def _name(item: Object) -> str:
    return f"the {item.color} {item.shape}"


def _swap(scene: Scene, old: Object, new: Object | None) -> Scene:
    objects = tuple(new if item is old else item for item in scene.objects)
    kept = tuple(item for item in objects if item is not None)
    return replace(scene, objects=kept, kind=kind_of(kept))


def _recolor(scene: Scene, rng: np.random.Generator, combinations: str) -> Edit | None:
    item = pick(rng, [item for item in unique_objects(scene) if any(_new_colors(scene, item, combinations))])
    color = pick(rng, list(_new_colors(scene, item, combinations)))
    forms = (
        f"recolor {_name(item)} to {color}",
        f"make {_name(item)} {color}",
        f"change the color of {_name(item)} to {color}",
    )
    return Edit("recolor", pick(rng, forms), _swap(scene, item, replace(item, color=color)))


def _remove(scene: Scene, rng: np.random.Generator, combinations: str) -> Edit | None:
    item = pick(rng, unique_objects(scene))
    return Edit("remove", pick(rng, (f"remove {_name(item)}", f"delete {_name(item)}")), _swap(scene, item, None))


def _replace(scene: Scene, rng: np.random.Generator, combinations: str) -> Edit | None:
    item = pick(rng, [item for item in unique_objects(scene) if any(_new_pairs(scene, item, combinations))])
    color, shape = pick(rng, list(_new_pairs(scene, item, combinations)))
    new = with_article(look_text(shape, color, None))
    forms = (f"replace {_name(item)} with {new}", f"change {_name(item)} to {new}")
    return Edit("replace", pick(rng, forms), _swap(scene, item, replace(item, shape=shape, color=color)))


def _background(scene: Scene, rng: np.random.Generator, combinations: str) -> Edit | None:
    name = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
    forms = (f"change the background to {name}", f"make the background {name}")
    return Edit("background", pick(rng, forms), replace(scene, background=name))


def _add(scene: Scene, rng: np.random.Generator, combinations: str) -> Edit | None:
    """A new object in free space; beside a named object in PLACED_SHARE of the edits that have room for it."""
    present = {item.pair for item in scene.objects}
    pairs = [(c, s) for s in SHAPES for c in COLORS if (c, s) not in present and _allows((c, s), combinations)]
    if not pairs:
        return None
    (color, shape), size = pick(rng, pairs), pick(rng, tuple(SIZES))
    tries = [place(rng, shape, color, size) for _ in range(PLACE_TRIES)]
    free = [candidate for candidate in tries if fits(candidate, scene.objects)]
    if not free:
        return None
    new, where = free[0], ""
    barred = HELD_OUT_POSITION_SHAPES if combinations == "seen" else None
    anchors = [item for item in unique_objects(scene) if {item.shape, shape} != barred]
    if anchors and rng.random() < PLACED_SHARE:
        anchor, relation = pick(rng, anchors), pick(rng, tuple(RELATIONS))
        beside = [item for item in free if is_clear(item, anchor) and main_relation(item, anchor) == relation]
        if beside:
            new, where = beside[0], f" {RELATIONS[relation]} {_name(anchor)}"
    objects = (*scene.objects, new)
    text = f"add {with_article(look_text(shape, color, size))}{where}"
    return Edit("add", text, replace(scene, objects=objects, kind=kind_of(objects)))


_MAKE = {"recolor": _recolor, "remove": _remove, "add": _add, "replace": _replace, "background": _background}
