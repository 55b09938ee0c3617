"""Edits of a scene: an instruction and the target scene, which differs only as instructed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from spar.worlds.shapes.references import Name, any_name, full_name, named_objects, short_name
from spar.worlds.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    COMBINATIONS,
    GAP,
    HELD_OUT_PAIRS,
    HELD_OUT_POSITION_SHAPES,
    MARGIN,
    MAX_OBJECTS,
    POSITION_ACROSS,
    POSITION_ALONG,
    RELATIONS,
    SHAPES,
    SIDE,
    SIZES,
    Object,
    Scene,
    fits,
    is_clear,
    is_held_out,
    main_relation,
    pick,
    unique_objects,
)
from spar.worlds.shapes.tokenizer import look_text, with_article

EDIT_KINDS = ("recolor", "remove", "add", "replace", "background")  # of version 1
ALL_EDIT_KINDS = (*EDIT_KINDS, "resize", "move")
PLACED_SHARE = 0.5  # share of added objects with a place relative to another object, if there is room
MOVE, LEAST_MOVE = 16.0, 8.0  # pixels by which an object is moved, less where the image ends, and at least
OTHER_SIZE = {"small": "large", "large": "small"}
DIRECTIONS = {"left": "to the left", "right": "to the right", "above": "up", "below": "down"}


@dataclass(frozen=True)
class Edit:
    """An instruction and its target scene; unchanged objects are the source's own, in their order.

    `place`: the relation (a key of RELATIONS) that the instruction states of an added object, and to which other one;
    of a moved object its direction (a key of DIRECTIONS) and the object before.
    """

    kind: str
    instruction: str
    target: Scene
    place: tuple[str, Object] | None = None


@dataclass(frozen=True)
class Naming:
    """How instructions name objects: which objects have a name, and the name of one."""

    objects: Callable[[Scene], list[Object]]
    name: Name

    def the(self, scene: Scene, item: Object, rng: np.random.Generator) -> str:
        return f"the {self.name(scene, item, rng)}"


BY_PAIR = Naming(unique_objects, full_name)  # by colour and shape, as in version 1
BY_NEED = Naming(named_objects, short_name)
BY_ANYTHING = Naming(named_objects, any_name)


def edit_kinds(scene: Scene, combinations: str = "seen", naming: Naming = BY_PAIR) -> tuple[str, ...]:
    """The kinds of edit that a scene allows, in the order of ALL_EDIT_KINDS.

    Removing needs a second object; all kinds but adding and the background need an object with a name; adding,
    enlarging and moving need room. With combinations="held_out", the kinds that bring no new pair of colour and shape
    need a held-out scene.
    """
    named = naming.objects(scene)
    allowed = {
        "recolor": any(True for item in named for _ in _new_colors(scene, item, combinations)),
        "remove": bool(named) and len(scene.objects) > 1,
        "add": len(scene.objects) < MAX_OBJECTS
        and bool(_absent_pairs(scene, combinations))
        and len(_free_centers(scene, "small")) > 0,
        "replace": any(True for item in named for _ in _new_pairs(scene, item, combinations)),
        "background": True,
        "resize": any(_resized(scene, item) for item in named),
        "move": any(_moves(scene, item) for item in named),
    }
    if combinations == "held_out" and not is_held_out(scene):
        allowed.update(remove=False, background=False, resize=False, move=False)
    return tuple(kind for kind in ALL_EDIT_KINDS if allowed[kind])


def make_edit(
    scene: Scene,
    rng: np.random.Generator,
    kind: str | None = None,
    combinations: str = "seen",
    naming: Naming = BY_PAIR,
) -> Edit:
    """A random edit of a scene.

    Args:
        scene: the source.
        rng: source of the choices.
        kind: one of ALL_EDIT_KINDS; if None, any of EDIT_KINDS that the scene allows.
        combinations: the (colour, shape) pairs of new objects: "seen" no held-out one, "held_out" only held-out ones
            (kinds that bring no new object have none, so that their source must be held out), "any" all.
        naming: how the instruction names objects.

    Raises:
        ValueError: an unknown kind, one that the scene does not allow (see `edit_kinds`), or a source that does not
            fit the combinations.
    """
    if combinations not in COMBINATIONS:
        raise ValueError(f"combinations must be one of {COMBINATIONS}, got {combinations!r}")
    if kind is not None and kind not in ALL_EDIT_KINDS:
        raise ValueError(f"kind must be one of {ALL_EDIT_KINDS}, got {kind!r}")
    if combinations == "seen" and is_held_out(scene):
        raise ValueError("the source is a held-out scene, which combinations='seen' does not allow")
    allowed = edit_kinds(scene, combinations, naming)
    drawn = [name for name in allowed if name in EDIT_KINDS]
    if kind not in (None, *allowed) or not (kind or drawn):
        raise ValueError(f"the scene allows the edits {allowed} with {combinations=}, got {kind!r}: {scene}")
    return _MAKE[kind or pick(rng, drawn)](scene, rng, combinations, naming)


def kind_of(objects: tuple[Object, ...]) -> str:
    """The kind of scene of some objects; never "position", which depends on the caption."""
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


def _swap(scene: Scene, old: Object, new: Object | None) -> Scene:
    objects = tuple(new if item is old else item for item in scene.objects)
    kept = tuple(item for item in objects if item is not None)
    return replace(scene, objects=kept, kind=kind_of(kept))


def _recolor(scene: Scene, rng: np.random.Generator, combinations: str, naming: Naming) -> Edit:
    item = pick(rng, [item for item in naming.objects(scene) if any(_new_colors(scene, item, combinations))])
    color = pick(rng, list(_new_colors(scene, item, combinations)))
    name = naming.the(scene, item, rng)
    forms = (f"recolor {name} to {color}", f"make {name} {color}", f"change the color of {name} to {color}")
    return Edit("recolor", pick(rng, forms), _swap(scene, item, replace(item, color=color)))


def _remove(scene: Scene, rng: np.random.Generator, _: str, naming: Naming) -> Edit:
    item = pick(rng, naming.objects(scene))
    name = naming.the(scene, item, rng)
    return Edit("remove", pick(rng, (f"remove {name}", f"delete {name}")), _swap(scene, item, None))


def _replace(scene: Scene, rng: np.random.Generator, combinations: str, naming: Naming) -> Edit:
    item = pick(rng, [item for item in naming.objects(scene) if any(_new_pairs(scene, item, combinations))])
    color, shape = pick(rng, list(_new_pairs(scene, item, combinations)))
    new, name = with_article(look_text(shape, color, None)), naming.the(scene, item, rng)
    forms = (f"replace {name} with {new}", f"change {name} to {new}")
    return Edit("replace", pick(rng, forms), _swap(scene, item, replace(item, shape=shape, color=color)))


def _background(scene: Scene, rng: np.random.Generator, _: str, __: Naming) -> Edit:
    name = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
    forms = (f"change the background to {name}", f"make the background {name}")
    return Edit("background", pick(rng, forms), replace(scene, background=name))


def _add(scene: Scene, rng: np.random.Generator, combinations: str, naming: Naming) -> Edit:
    """Add an object in free space; relative to a named object in PLACED_SHARE of the edits with room for it."""
    color, shape = pick(rng, _absent_pairs(scene, combinations))
    size = pick(rng, tuple(SIZES))
    centers = _free_centers(scene, size)
    if not len(centers):
        size, centers = "small", _free_centers(scene, "small")
    barred = HELD_OUT_POSITION_SHAPES if combinations == "seen" else None
    anchors = [item for item in naming.objects(scene) if {item.shape, shape} != barred]
    where, place = "", None
    if anchors and rng.random() < PLACED_SHARE:
        anchor, relation = pick(rng, anchors), pick(rng, tuple(RELATIONS))
        beside = _beside(centers, anchor, relation)
        if len(beside):
            centers, place = beside, (relation, anchor)
            where = f" {RELATIONS[relation]} {naming.the(scene, anchor, rng)}"
    x, y = centers[int(rng.random() * len(centers))].tolist()
    new = Object(shape, color, size, x, y)
    moved = replace(new, x=x + rng.random() - 0.5, y=y + rng.random() - 0.5)
    keeps = not where or (is_clear(moved, anchor) and main_relation(moved, anchor) == relation)
    objects = (*scene.objects, moved if keeps and fits(moved, scene.objects) else new)
    text = f"add {with_article(look_text(shape, color, size))}{where}"
    return Edit("add", text, replace(scene, objects=objects, kind=kind_of(objects)), place)


def _resize(scene: Scene, rng: np.random.Generator, _: str, naming: Naming) -> Edit:
    item = pick(rng, [item for item in naming.objects(scene) if _resized(scene, item)])
    name, new = naming.the(scene, item, rng), _resized(scene, item)
    word = {"large": "larger", "small": "smaller"}[OTHER_SIZE[item.size]]
    return Edit("resize", f"make {name} {word}", _swap(scene, item, new))


def _move(scene: Scene, rng: np.random.Generator, _: str, naming: Naming) -> Edit:
    item = pick(rng, [item for item in naming.objects(scene) if _moves(scene, item)])
    name, moves = naming.the(scene, item, rng), _moves(scene, item)
    direction = pick(rng, list(moves))
    target = _swap(scene, item, moves[direction])
    return Edit("move", f"move {name} {DIRECTIONS[direction]}", target, (direction, item))


def _resized(scene: Scene, item: Object) -> Object | None:
    """The object in the other size, if it has room."""
    new = replace(item, size=OTHER_SIZE[item.size])
    return new if fits(new, [other for other in scene.objects if other is not item]) else None


def _moves(scene: Scene, item: Object) -> dict[str, Object]:
    """The object moved in each direction that has room: by MOVE, or as far as the image reaches from LEAST_MOVE on."""
    low = SIZES[item.size] + MARGIN
    high, others = SIDE - low, [other for other in scene.objects if other is not item]
    moved = {
        "left": replace(item, x=max(low, item.x - MOVE)),
        "right": replace(item, x=min(high, item.x + MOVE)),
        "above": replace(item, y=max(low, item.y - MOVE)),
        "below": replace(item, y=min(high, item.y + MOVE)),
    }
    return {
        direction: new
        for direction, new in moved.items()
        if abs(new.x - item.x) + abs(new.y - item.y) >= LEAST_MOVE and fits(new, others)
    }


def _absent_pairs(scene: Scene, combinations: str) -> list[tuple[str, str]]:
    present = {item.pair for item in scene.objects}
    pairs = ((color, shape) for shape in SHAPES for color in COLORS)
    return [pair for pair in pairs if pair not in present and _allows(pair, combinations)]


def _free_centers(scene: Scene, size: str) -> np.ndarray:
    """Centres at whole pixels, float [n, 2] of (x, y), at which an object of a size fits into the scene."""
    radius = SIZES[size]
    line = np.arange(ceil(radius + MARGIN), SIDE - ceil(radius + MARGIN) + 1, dtype=np.float64)
    x, y = line[None, :], line[:, None]
    free = np.ones((len(line), len(line)), dtype=bool)
    for item in scene.objects:
        free &= (x - item.x) ** 2 + (y - item.y) ** 2 >= (radius + SIZES[item.size] + GAP) ** 2
    rows, columns = np.nonzero(free)
    return np.stack([line[columns], line[rows]], axis=1)


def _beside(centers: np.ndarray, anchor: Object, relation: str) -> np.ndarray:
    """The centres that are clearly `relation` of an object: `is_clear` and `main_relation`, vectorized."""
    offset = centers - (anchor.x, anchor.y)
    axis = 0 if relation in ("left", "right") else 1
    along = offset[:, axis] * (-1 if relation in ("left", "above") else 1)
    return centers[(along >= POSITION_ALONG) & (np.abs(offset[:, 1 - axis]) <= POSITION_ACROSS)]


_MAKE = {
    "recolor": _recolor,
    "remove": _remove,
    "add": _add,
    "replace": _replace,
    "background": _background,
    "resize": _resize,
    "move": _move,
}
