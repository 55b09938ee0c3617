"""Scenes of the shapes world, and the scene of each integer seed.

Coordinates are continuous pixels: x to the right, y down, pixel (row i, column j) covers [j, j+1) x [i, i+1). Every
shape is inside the circle of its size's radius, so that two objects cannot touch if their circles do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

T = TypeVar("T")

SIDE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (220, 40, 40),
    "green": (50, 180, 70),
    "blue": (50, 90, 225),
    "yellow": (245, 220, 50),
    "purple": (140, 55, 185),
    "orange": (245, 140, 30),
    "cyan": (60, 205, 215),
    "pink": (250, 130, 190),
}
SIZES = {"small": 6.5, "large": 10.5}  # radius in pixels
BACKGROUNDS = {
    "gray": (128, 128, 128),
    "black": (16, 16, 16),
    "white": (242, 242, 242),
    "beige": (205, 190, 155),
    "navy": (22, 28, 80),
    "brown": (95, 62, 42),
}
KINDS = ("single", "two", "count", "position", "multi")  # of version 1: what a seed alone draws from
BINDING_KINDS = ("shared", "twins")  # of version 2: one attribute is not enough to tell an object
ALL_KINDS = (*KINDS, *BINDING_KINDS)
COMBINATIONS = ("seen", "held_out", "any")
SEED_RANGES = {
    "train": (0, 10**9),
    "validation": (10**9, 2 * 10**9),
    "benchmark": (2 * 10**9, 3 * 10**9),
}

# Each shape is held out in one colour, six of the eight colours in one shape: every word stays common in training.
HELD_OUT_PAIRS = frozenset(
    {
        ("purple", "circle"),
        ("cyan", "square"),
        ("red", "triangle"),
        ("orange", "star"),
        ("blue", "cross"),
        ("pink", "ring"),
    }
)
HELD_OUT_POSITION_SHAPES = frozenset({"triangle", "cross"})

RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

MAX_OBJECTS = 4
MARGIN = 1.0  # least distance of an object's circle to the image's edge, pixels
GAP = 3.0  # least distance between two objects' circles, pixels
RELATION_OFFSET = 6.0  # a relation holds if the centres are this far apart along its axis, pixels
POSITION_ALONG, POSITION_ACROSS = 16.0, 8.0  # definition of "clearly separated along one axis", pixels


@dataclass(frozen=True)
class Object:
    """One solid shape; x and y are its centre in pixels."""

    shape: str
    color: str
    size: str
    x: float
    y: float

    @property
    def pair(self) -> tuple[str, str]:
        """(color, shape), which a phrase names."""
        return self.color, self.shape


@dataclass(frozen=True)
class Scene:
    """A background, the objects on it, and the kind of the scene."""

    background: str
    objects: tuple[Object, ...]
    kind: str


class Placed(Protocol):
    """Anything with a centre in pixels: an `Object`, or one that the detector found."""

    @property
    def x(self) -> float: ...

    @property
    def y(self) -> float: ...


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of `items`, uniformly (several times faster than `Generator.choice`)."""
    return items[int(rng.random() * len(items))]


def holds(relation: str, subject: Placed, other: Placed) -> bool:
    """Whether `subject` is `relation` (a key of RELATIONS) of `other`, by at least RELATION_OFFSET pixels."""
    offset = {
        "left": other.x - subject.x,
        "right": subject.x - other.x,
        "above": other.y - subject.y,
        "below": subject.y - other.y,
    }[relation]
    return offset >= RELATION_OFFSET


def main_relation(subject: Object, other: Object) -> str:
    """The relation of `subject` to `other` along the axis on which their centres are farthest apart."""
    dx, dy = subject.x - other.x, subject.y - other.y
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def is_clear(subject: Object, other: Object) -> bool:
    """Whether two objects are clearly separated along one axis and close along the other."""
    near, far = sorted((abs(subject.x - other.x), abs(subject.y - other.y)))
    return far >= POSITION_ALONG and near <= POSITION_ACROSS


def are_apart(subject: Object, other: Object) -> bool:
    """Whether two objects are far enough apart along one axis to be told apart by their places."""
    return max(abs(subject.x - other.x), abs(subject.y - other.y)) >= POSITION_ALONG


def unique_objects(scene: Scene) -> list[Object]:
    """The objects with a unique "the <color> <shape>"."""
    counts = Counter(item.pair for item in scene.objects)
    return [item for item in scene.objects if counts[item.pair] == 1]


def fits(candidate: Object, others: Sequence[Object]) -> bool:
    """Whether `candidate` is inside the image and keeps the gap to every one of `others`."""
    radius = SIZES[candidate.size]
    low, high = radius + MARGIN, SIDE - radius - MARGIN
    if not (low <= candidate.x <= high and low <= candidate.y <= high):
        return False
    for other in others:
        apart = radius + SIZES[other.size] + GAP
        if (candidate.x - other.x) ** 2 + (candidate.y - other.y) ** 2 < apart * apart:
            return False
    return True


def place(rng: np.random.Generator, shape: str, color: str, size: str) -> Object:
    """Place an object at a random centre inside the image."""
    low = SIZES[size] + MARGIN
    span = SIDE - 2 * low
    return Object(shape, color, size, low + span * rng.random(), low + span * rng.random())


def is_held_out(scene: Scene) -> bool:
    """Whether a scene has a combination that is not in training."""
    if any(item.pair in HELD_OUT_PAIRS for item in scene.objects):
        return True
    return scene.kind == "position" and {item.shape for item in scene.objects} == HELD_OUT_POSITION_SHAPES


def may_relate(scene: Scene, relation: str, subject: Object, other: Object) -> bool:
    """Whether a text may state a relation: it holds, and the held-out shapes occur only in held-out scenes."""
    barred = None if is_held_out(scene) else HELD_OUT_POSITION_SHAPES
    return {subject.shape, other.shape} != barred and holds(relation, subject, other)


def make_scene(seed: int, *, kind: str | None = None, combinations: str = "seen") -> Scene:
    """The scene of an integer seed: the same arguments always give the same scene.

    Of a scene "shared", with three or four objects, some pair shares its shape, some pair its colour, and no two share
    both. Of a scene "twins" the first two objects have the same shape and colour, and differ in size or are clearly
    apart (`are_apart`); none to two others stand beside them.

    Args:
        seed: any integer >= 0; SEED_RANGES has the ranges of each split.
        kind: one of ALL_KINDS; sampled from the seed, of KINDS, if None.
        combinations: "seen" never has a held-out combination, "held_out" always has (a held-out pair of colour and
            shape; for position scenes the held-out pair of shapes, in seen colours), "any" has no restriction.

    Raises:
        ValueError: an unknown kind or unknown combinations.
    """
    if kind is not None and kind not in ALL_KINDS:
        raise ValueError(f"kind must be one of {ALL_KINDS}, got {kind!r}")
    if combinations not in COMBINATIONS:
        raise ValueError(f"combinations must be one of {COMBINATIONS}, got {combinations!r}")
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = pick(rng, KINDS)
    kind = drawn if kind is None else kind
    background = pick(rng, tuple(BACKGROUNDS))
    looks = _draw_looks(rng, kind, combinations)
    return Scene(background, _lay_out(rng, looks, _FIRST_TWO.get(kind, _anywhere)), kind)


def _draw_looks(rng: np.random.Generator, kind: str, combinations: str) -> list[tuple[str, str, str]]:
    """(shape, color, size) of each object, resampled until the combinations are as requested."""
    while True:
        looks = _propose_looks(rng, kind, combinations)
        held_out_pair = any((color, shape) in HELD_OUT_PAIRS for shape, color, _ in looks)
        held_out_position = kind == "position" and {look[0] for look in looks} == HELD_OUT_POSITION_SHAPES
        suits = {
            "any": True,
            "seen": not held_out_pair and not held_out_position,
            "held_out": held_out_position and not held_out_pair if kind == "position" else held_out_pair,
        }
        if suits[combinations]:
            return looks


def _propose_looks(rng: np.random.Generator, kind: str, combinations: str) -> list[tuple[str, str, str]]:
    colors, sizes = tuple(COLORS), tuple(SIZES)
    if kind in BINDING_KINDS:
        pairs = _shared_pairs(rng) if kind == "shared" else _twin_pairs(rng)
        looks = [(shape, color, pick(rng, sizes)) for shape, color in pairs]
        if kind == "twins" and rng.random() < 0.5:
            looks[:2] = [(*pairs[0], size) for size in _distinct(rng, sizes, 2)]
        return looks
    if kind in ("single", "count"):
        look = (pick(rng, SHAPES), pick(rng, colors), pick(rng, sizes))
        return [look] * (1 if kind == "single" else 2 + int(rng.random() * 3))
    number = 3 + int(rng.random() * 2) if kind == "multi" else 2
    pool: tuple[str, ...] = SHAPES
    if kind == "position" and combinations == "held_out":
        pool = tuple(sorted(HELD_OUT_POSITION_SHAPES))
    shapes = _distinct(rng, pool, number)
    hues = [pick(rng, colors) for _ in shapes] if kind == "two" else _distinct(rng, colors, number)
    return [(shape, color, pick(rng, sizes)) for shape, color in zip(shapes, hues, strict=True)]


def _shared_pairs(rng: np.random.Generator) -> list[tuple[str, str]]:
    """(shape, color) of three or four objects, all different; some two share the shape, some two the colour."""
    shapes, colors = _distinct(rng, SHAPES, 3), _distinct(rng, tuple(COLORS), 3)
    pairs = [(shapes[0], colors[0]), (shapes[0], colors[1]), (shapes[1], pick(rng, colors[:2]))]
    if rng.random() < 0.5:
        pairs.append(pick(rng, [(s, c) for s in shapes for c in colors if (s, c) not in pairs]))
    return pairs


def _twin_pairs(rng: np.random.Generator) -> list[tuple[str, str]]:
    """(shape, color) of two objects alike and of up to two others, each like the twins in shape, in colour or not."""
    shapes, colors = _distinct(rng, SHAPES, 2), _distinct(rng, tuple(COLORS), 2)
    others = [(s, c) for s in shapes for c in colors][1:]
    beside = [others.pop(int(rng.random() * len(others))) for _ in range(pick(rng, range(3)))]
    return [(shapes[0], colors[0])] * 2 + beside


def _distinct(rng: np.random.Generator, items: Sequence[str], number: int) -> list[str]:
    pool = list(items)
    return [pool.pop(int(rng.random() * len(pool))) for _ in range(number)]


def _lay_out(
    rng: np.random.Generator, looks: Sequence[tuple[str, str, str]], suits: Callable[[list[Object]], bool]
) -> tuple[Object, ...]:
    """Rejection sampling of centres; a layout that gets stuck, or does not suit, is restarted."""
    while True:
        objects: list[Object] = []
        for look in looks:
            for _ in range(12):
                candidate = place(rng, *look)
                if fits(candidate, objects):
                    objects.append(candidate)
                    break
            else:
                break
        if len(objects) == len(looks) and suits(objects):
            return tuple(objects)


def _anywhere(_: list[Object]) -> bool:
    return True


_FIRST_TWO: dict[str, Callable[[list[Object]], bool]] = {
    "position": lambda objects: is_clear(objects[0], objects[1]),
    "twins": lambda objects: objects[0].size != objects[1].size or are_apart(objects[0], objects[1]),
}
