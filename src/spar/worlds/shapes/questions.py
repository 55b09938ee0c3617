"""Questions about a scene, each with its answer of one word (except "place").

The kinds of version 2 tell objects apart by anything that does (`references`) and ask what binding needs.

No answer follows from the text alone: yes and no are sampled evenly before the text, "no" is the answer about objects
that nearly exist, and only held-out scenes have questions about held-out combinations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spar.worlds.shapes.references import any_name, named_objects, references
from spar.worlds.shapes.scene import (
    COLORS,
    HELD_OUT_PAIRS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIDE,
    Object,
    Scene,
    holds,
    is_held_out,
    main_relation,
    may_relate,
    pick,
    unique_objects,
)
from spar.worlds.shapes.tokenizer import NUMBERS, ORDINALS, PLURALS, with_article

QUESTION_KINDS = ("color", "shape", "count", "exists", "position", "background")  # of version 1's benchmark
BINDING_QUESTION_KINDS = ("exists", "position", "size", "total", "neighbor", "attribute", "count_color")  # version 2's
CURRICULUM_KINDS = ("place", "relation")  # asked in training only: the benchmark's "position" builds on them


@dataclass(frozen=True)
class Question:
    """A question about an image and its answer."""

    kind: str
    text: str
    answer: str


def questions(scene: Scene, rng: np.random.Generator, kinds: Sequence[str] | None = None) -> list[Question]:
    """One question of each kind that the scene allows, in the order of `kinds` (all of QUESTION_KINDS if None).

    A kind that the scene does not allow (for example position with one object) is skipped.

    Raises:
        ValueError: an unknown kind.
    """
    result = []
    for kind in QUESTION_KINDS if kinds is None else kinds:
        if kind not in _ASK:
            raise ValueError(f"question kind must be one of {tuple(_ASK)}, got {kind!r}")
        found = _ASK[kind](scene, rng)
        if found is not None:
            result.append(Question(kind, *found))
    return result


def _ask_color(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    shapes = [s for s in SHAPES if len({o.color for o in scene.objects if o.shape == s}) == 1]
    if not shapes:
        return None
    shape = pick(rng, shapes)
    alike = [item for item in scene.objects if item.shape == shape]
    named = f"is the {shape}" if len(alike) == 1 else f"are the {PLURALS[shape]}"
    return f"what color {named}?", alike[0].color


def _ask_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    colors = [c for c in COLORS if len({o.shape for o in scene.objects if o.color == c}) == 1]
    if not colors:
        return None
    color = pick(rng, colors)
    alike = [item for item in scene.objects if item.color == color]
    named = f"is the {color} object" if len(alike) == 1 else f"are the {color} objects"
    return f"what shape {named}?", alike[0].shape


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    counts = Counter(item.shape for item in scene.objects)
    absent = rng.random() < 0.25 or not counts
    shape = pick(rng, [shape for shape in SHAPES if (shape not in counts) == absent])
    return f"how many {PLURALS[shape]} are there?", NUMBERS[counts[shape]]


def _ask_exists(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if not scene.objects:
        return None
    yes = rng.random() < 0.5
    color, shape = pick(rng, scene.objects).pair if yes else _absent_pair(scene, rng)
    return f"is there {with_article(f'{color} {shape}')}?", "yes" if yes else "no"


def _absent_pair(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A missing pair whose colour and shape both exist (half of the time, if possible), or one of them."""
    present = {item.pair for item in scene.objects}
    barred = present if is_held_out(scene) else present | HELD_OUT_PAIRS
    colors, shapes = sorted({color for color, _ in present}), sorted({shape for _, shape in present})
    crossed = [(color, shape) for color in colors for shape in shapes if (color, shape) not in barred]
    if crossed and rng.random() < 0.5:
        return pick(rng, crossed)
    if rng.random() < 0.5:
        return pick(rng, [(color, shape) for color in colors for shape in SHAPES if (color, shape) not in barred])
    return pick(rng, [(color, shape) for color in COLORS for shape in shapes if (color, shape) not in barred])


def _ask_position(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    named = unique_objects(scene)
    true = [
        (name, a, b)
        for a in named
        for b in named
        for name in RELATIONS
        if a is not b and may_relate(scene, name, a, b)
    ]
    if not true:
        return None
    name, subject, other = pick(rng, true)
    yes = rng.random() < 0.5
    phrase = RELATIONS[name if yes else OPPOSITE[name]]
    text = f"is the {subject.color} {subject.shape} {phrase} the {other.color} {other.shape}?"
    return text, "yes" if yes else "no"


def cell_text(item: Object) -> str:
    """The cell of an object's centre, on a grid of eight columns and rows."""
    column, row = (ORDINALS[min(int(at * len(ORDINALS) / SIDE), len(ORDINALS) - 1)] for at in (item.x, item.y))
    return f"column {column} row {row}"


def _ask_cell(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask for the cell of an object."""
    named = unique_objects(scene)
    if not named:
        return None
    item = pick(rng, named)
    return f"where is the {item.color} {item.shape}?", cell_text(item)


def _ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask for the relation of one object to another, on the axis on which the two are farthest apart."""
    named = unique_objects(scene)
    pairs = [(a, b) for a in named for b in named if a is not b and may_relate(scene, main_relation(a, b), a, b)]
    if not pairs:
        return None
    subject, other = pick(rng, pairs)
    text = f"where is the {subject.color} {subject.shape} from the {other.color} {other.shape}?"
    return text, main_relation(subject, other)


def _ask_size(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask for the size of an object whose name does not tell it."""
    named = [(item, name) for item in scene.objects for name in references(scene, item) if item.size not in name]
    if not named:
        return None
    item, name = pick(rng, named)
    return f"what size is the {name}?", item.size


def _ask_total(scene: Scene, _: np.random.Generator) -> tuple[str, str] | None:
    return "how many objects are there?", NUMBERS[len(scene.objects)]


def _ask_count_color(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask how many objects have a colour, or a colour and shape that perhaps do not occur together."""
    if not scene.objects:
        return None
    if rng.random() < 0.5:
        counts = Counter(item.color for item in scene.objects)
        color = pick(rng, tuple(counts)) if rng.random() < 0.75 else pick(rng, [c for c in COLORS if c not in counts])
        return f"how many {color} objects are there?", NUMBERS[counts[color]]
    pairs = Counter(item.pair for item in scene.objects)
    color, shape = pick(rng, tuple(pairs)) if rng.random() < 0.75 else _absent_pair(scene, rng)
    return f"how many {color} {PLURALS[shape]} are there?", NUMBERS[pairs[color, shape]]


def _ask_neighbor(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask for the shape or colour of the one object that is on a side of another, along the axis on which the two are
    farthest apart; all other objects are clearly not on that side.
    """
    found = [
        (relation, other, beside[0])
        for other in named_objects(scene)
        for relation in RELATIONS
        if len(beside := [item for item in scene.objects if item is not other and holds(relation, item, other)]) == 1
        and main_relation(beside[0], other) == relation
        and may_relate(scene, relation, beside[0], other)
        and not any(_is_doubtful(relation, item, other) for item in scene.objects if item is not other)
    ]
    if not found:
        return None
    relation, other, item = pick(rng, found)
    where = f"{RELATIONS[relation]} the {any_name(scene, other, rng)}?"
    if rng.random() < 0.5:
        return f"what is {where}", item.shape
    return f"what color is the object {where}", item.color


def _is_doubtful(relation: str, subject: Object, other: Object) -> bool:
    """Whether one object is on a side of another by too little to say so."""
    return not holds(relation, subject, other) and not holds(OPPOSITE[relation], subject, other)


def _ask_attribute(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask for the colour or the shape of an object that its other attributes, or its place, single out."""
    named = [(item, name.split()) for item in scene.objects for name in references(scene, item)]
    open_ones = [
        ("color", item, name) for item, name in named if item.color not in name and item.shape in name
    ] + [("shape", item, name) for item, name in named if item.shape not in name and item.color in name]
    told = [one for one in open_ones if len(one[2]) > 2] or open_ones
    if not told:
        return None
    asked, item, name = pick(rng, told)
    return f"what {asked} is the {' '.join(name)}?", getattr(item, asked)


def _ask_background(scene: Scene, _: np.random.Generator) -> tuple[str, str] | None:
    return "what color is the background?", scene.background


_ASK = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "exists": _ask_exists,
    "position": _ask_position,
    "background": _ask_background,
    "place": _ask_cell,
    "relation": _ask_relation,
    "size": _ask_size,
    "total": _ask_total,
    "neighbor": _ask_neighbor,
    "attribute": _ask_attribute,
    "count_color": _ask_count_color,
}
