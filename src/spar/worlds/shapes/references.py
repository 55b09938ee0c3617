"""Phrases that single out one object of a scene: "red circle", "large circle", "red object", "red circle at the top".

Version 1 names an object by its colour and shape. Where that is not enough (twins), or where less is enough, an object
has other names too; every name that is returned fits exactly one object of its scene.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np

from spar.worlds.shapes.scene import (
    HELD_OUT_POSITION_SHAPES,
    Object,
    Scene,
    are_apart,
    is_held_out,
    main_relation,
    pick,
)
from spar.worlds.shapes.tokenizer import look_text

Name = Callable[[Scene, Object, np.random.Generator], str]

PLACES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
FULL_NAME_SHARE = 0.5  # of names by colour and shape, where these are enough


def full_name(_: Scene, item: Object, __: np.random.Generator) -> str:
    """The colour and shape, as in version 1."""
    return f"{item.color} {item.shape}"


def references(scene: Scene, item: Object) -> list[str]:
    """All names of an object, without its article, that fit no other object of the scene; the shortest first.

    A name has the size or not, the colour or not, and the shape or "object"; among two objects that such a name fits
    and that are clearly apart, it may end with the place of the one; of the shapes whose relations are held out only in
    held-out scenes. Empty if no name is enough.
    """
    barred = None if is_held_out(scene) else HELD_OUT_POSITION_SHAPES
    plain: list[str] = []
    placed: list[str] = []
    for with_size, with_color, with_shape in product((False, True), repeat=3):
        if not with_color and not with_shape:
            continue
        alike = [
            other
            for other in scene.objects
            if (not with_size or other.size == item.size)
            and (not with_color or other.color == item.color)
            and (not with_shape or other.shape == item.shape)
        ]
        phrase = look_text(
            item.shape if with_shape else "object", item.color if with_color else None, item.size if with_size else None
        )
        if len(alike) == 1:
            plain.append(phrase)
        elif len(alike) == 2 and are_apart(*alike) and {other.shape for other in alike} != barred:
            other = next(twin for twin in alike if twin is not item)
            placed.append(f"{phrase} {PLACES[main_relation(item, other)]}")
    return sorted(plain, key=len) + sorted(placed, key=len)


def named_objects(scene: Scene) -> list[Object]:
    """The objects that have a name of their own."""
    return [item for item in scene.objects if references(scene, item)]


def short_name(scene: Scene, item: Object, rng: np.random.Generator) -> str:
    """The colour and shape, with the size or the place only where it is needed."""
    full = f"{item.color} {item.shape}"
    names = references(scene, item)
    return full if full in names else pick(rng, [name for name in names if full in name] or names)


def any_name(scene: Scene, item: Object, rng: np.random.Generator) -> str:
    """A name of an object that has one: by colour and shape in FULL_NAME_SHARE, if these are enough, else any.

    Raises:
        ValueError: an object that no name singles out.
    """
    names = references(scene, item)
    if not names:
        raise ValueError(f"no name singles out {item} in {scene}")
    full = f"{item.color} {item.shape}"
    return full if full in names and rng.random() < FULL_NAME_SHARE else pick(rng, names)
