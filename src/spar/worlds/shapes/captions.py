"""Captions of a scene, and the claims that they express.

A caption is the text of a `Claim`, and `parse` is the inverse: parse(to_text(claim)) == claim for every claim.
Questions, edits, the vocabulary and the tokenizer are in their own modules and reexported here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product

import numpy as np

from spar.common.errors import InputError
from spar.worlds.shapes.edits import EDIT_KINDS, Edit, edit_kinds, make_edit
from spar.worlds.shapes.questions import QUESTION_KINDS, Question, cell_text, questions
from spar.worlds.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIDE,
    SIZES,
    Object,
    Scene,
    main_relation,
    may_relate,
    pick,
)
from spar.worlds.shapes.tokenizer import (
    MAX_WORDS,
    NUMBERS,
    PLURALS,
    SINGULARS,
    VOCABULARY,
    build_tokenizer,
    check_words,
    look_text,
    split_words,
    with_article,
)

__all__ = [
    "DESCRIBE",
    "EDIT_KINDS",
    "MAX_WORDS",
    "QUESTION_KINDS",
    "VOCABULARY",
    "Claim",
    "Edit",
    "Group",
    "Question",
    "Relation",
    "build_tokenizer",
    "caption",
    "check_words",
    "describe",
    "edit_kinds",
    "group_objects",
    "half_of_image_text",
    "layout",
    "make_edit",
    "parse",
    "position_caption",
    "questions",
    "split_words",
    "to_text",
]

DESCRIBE = "describe the image"
SOME = 0
MIDDLE = 9.0  # pixels from the image's middle, along each axis, within which an object is in the middle
OPEN_SHARE = 0.3  # of an open caption's attributes, each left out on its own


@dataclass(frozen=True)
class Group:
    """`count` objects with the same named attributes; None for an attribute that is not named.

    A count of SOME means two or more; of a claim at most one group may have it.
    """

    shape: str | None
    color: str | None
    size: str | None
    count: int


@dataclass(frozen=True)
class Relation:
    """Group `subject` is `name` (a key of RELATIONS) of group `object`; both are indices into the claim's groups."""

    name: str
    subject: int
    object: int


@dataclass(frozen=True)
class Claim:
    """The content of a caption."""

    background: str | None
    groups: tuple[Group, ...]
    relation: Relation | None = None


def group_objects(
    objects: Sequence[Object], *, shape: bool = True, color: bool = True, size: bool = True
) -> tuple[Group, ...]:
    """Group objects by their named attributes, in order of first appearance."""
    looks = Counter(
        (item.shape if shape else None, item.color if color else None, item.size if size else None) for item in objects
    )
    return tuple(Group(*look, count) for look, count in looks.items())


def to_text(claim: Claim) -> str:
    """The caption of a claim; a claim with a relation has two groups, its subject first."""
    if claim.relation is None:
        text = _enumerate([_group_text(group) for group in claim.groups])
    elif len(claim.groups) != 2 or claim.relation.subject != 0:
        raise ValueError(f"a relation needs two groups, its subject first, got {claim}")
    else:
        subject, other = map(_group_text, claim.groups)
        text = f"{subject} {RELATIONS[claim.relation.name]} {other}"
    return text if claim.background is None else f"{text} on a {claim.background} background"


def _enumerate(phrases: Sequence[str]) -> str:
    return ", ".join(phrases[:-1]) + (" and " if len(phrases) > 1 else "") + phrases[-1]


def _group_text(group: Group) -> str:
    if group.count == 1:
        return with_article(look_text(group.shape or "object", group.color, group.size))
    number = "some" if group.count == SOME else NUMBERS[group.count]
    return f"{number} {look_text(PLURALS[group.shape] if group.shape else 'objects', group.color, group.size)}"


def caption(
    scene: Scene,
    rng: np.random.Generator,
    *,
    background: bool | None = None,
    size: bool | None = None,
    color: bool = True,
    order: Sequence[int] | None = None,
) -> str:
    """A caption of a scene with at least one object, in random order; for position scenes with their relation.

    Args:
        scene: the scene to describe.
        rng: source of the choices.
        background: whether to mention it; in half of the captions if None.
        size: whether to mention it; in half of the captions, independently of the background, if None.
        color: whether to mention the objects' colours.
        order: of the objects, in place of a random one.
    """
    background = rng.random() < 0.5 if background is None else background
    size = rng.random() < 0.5 if size is None else size
    objects = _ordered(scene, rng, order)
    relation = Relation(main_relation(objects[0], objects[1]), 0, 1) if scene.kind == "position" else None
    groups = group_objects(objects, color=color, size=size)
    return to_text(Claim(scene.background if background else None, groups, relation))


def _ordered(scene: Scene, rng: np.random.Generator, order: Sequence[int] | None) -> list[Object]:
    """The objects of a scene in an order, by default a random one."""
    return [scene.objects[index] for index in (rng.permutation(len(scene.objects)) if order is None else order)]


def open_caption(scene: Scene, rng: np.random.Generator, *, order: Sequence[int] | None = None) -> str:
    """A caption that leaves attributes open: "a circle", "two stars", "a red object", "some small stars".

    Colours, sizes and, of objects with a colour, shapes are left out, each in OPEN_SHARE of the captions or more; the
    number of two to four objects alike in every tenth. Every image that fits is right.
    """
    color, size = bool(rng.random() >= 2 * OPEN_SHARE), bool(rng.random() < OPEN_SHARE)
    shape = not color or bool(rng.random() >= OPEN_SHARE)
    objects = _ordered(scene, rng, order)
    groups = group_objects(objects, shape=shape, color=color, size=size)
    if len(groups) == 1 and groups[0].count > 1 and rng.random() < OPEN_SHARE:
        groups = (replace(groups[0], count=SOME),)
    return to_text(Claim(scene.background if rng.random() < OPEN_SHARE else None, groups))


def related_caption(scene: Scene, rng: np.random.Generator, *, order: Sequence[int] | None = None) -> str | None:
    """A caption in which all that is named before a relation has it to all that is named behind: "two blue stars above
    a red circle", "a red circle to the left of a blue square and a green star". None where no relation holds so;
    `parse` supports two groups.
    """
    objects = _ordered(scene, rng, order)
    color, size = bool(rng.random() >= OPEN_SHARE), bool(rng.random() < 0.5)
    groups = group_objects(objects, color=color, size=size)
    found = [
        (split, name)
        for split in range(1, len(groups))
        for name in RELATIONS
        if all(may_relate(scene, name, *pair) for pair in product(*_split(objects, groups[:split])))
    ]
    if not found:
        return None
    split, name = pick(rng, found)
    subjects, others = (_enumerate([_group_text(group) for group in part]) for part in (groups[:split], groups[split:]))
    return _on_ground(f"{subjects} {RELATIONS[name]} {others}", scene, rng)


def divided_caption(scene: Scene, rng: np.random.Generator, *, order: Sequence[int] | None = None) -> str | None:
    """A caption that counts objects of one shape and then says what tells them apart: "two circles, one red and one
    blue, a green star", "two red stars: one large, one small". None where the order does not name the objects of each
    shape together, or neither colours nor sizes tell them apart. `parse` does not support it.
    """
    objects, phrases = _ordered(scene, rng, order), list[str]()
    alike = [(shape, list(items)) for shape, items in groupby(objects, lambda item: item.shape)]
    if len({shape for shape, _ in alike}) < len(alike) or len(alike) == len(objects):
        return None
    for shape, items in alike:
        first, colors, sizes = items[0], {item.color for item in items}, {item.size for item in items}
        if len(items) == 1:
            phrases.append(with_article(look_text(shape, first.color, None)))
        elif len(colors) == len(items):
            phrases.append(_divided(shape, None, [item.color for item in items], rng))
        elif len(colors) == 1 and len(sizes) == len(items):
            phrases.append(_divided(shape, first.color, [item.size for item in items], rng))
        else:
            return None
    return _on_ground(", ".join(phrases), scene, rng)


def _divided(shape: str, color: str | None, values: Sequence[str], rng: np.random.Generator) -> str:
    ones = [f"one {value}" for value in values]
    counted = f"{NUMBERS[len(values)]} {look_text(PLURALS[shape], color, None)}"
    return f"{counted}: {', '.join(ones)}" if rng.random() < 0.5 else f"{counted}, {_enumerate(ones)}"


def _split(objects: Sequence[Object], groups: Sequence[Group]) -> tuple[list[Object], list[Object]]:
    """The objects of some groups, and the others."""
    inside = [any(_is_of(item, group) for group in groups) for item in objects]
    one = [item for item, is_in in zip(objects, inside, strict=True) if is_in]
    return one, [item for item, is_in in zip(objects, inside, strict=True) if not is_in]


def _is_of(item: Object, group: Group) -> bool:
    """Whether an object has all that a group names."""
    named = ((group.shape, item.shape), (group.color, item.color), (group.size, item.size))
    return all(wanted in (None, own) for wanted, own in named)


def _on_ground(text: str, scene: Scene, rng: np.random.Generator) -> str:
    """A text with the scene's background in half of the cases."""
    return text if rng.random() < 0.5 else f"{text} on a {scene.background} background"


def position_caption(scene: Scene, rng: np.random.Generator, *, order: Sequence[int] | None = None) -> str:
    """A caption with the places of objects, for the training curriculum; `parse` does not support it.

    In half of the captions every group of objects has its place, in the others half of the groups have. The place is
    the cells of the group's members, "a red circle on column two row three", or for a single object in two of three
    captions the half of the image in the relations' own words, "a red circle to the left", or the part of it in those
    that people use, "a red circle in the top left corner". Two objects whose relation
    is allowed (`may_relate`) are joined by it in two captions of three, then only with cells: "a red circle on column
    two row three to the left of a blue star". The words of relations thus occur first with one object, then together
    with a known place.
    """
    objects = _ordered(scene, rng, order)
    share, size = pick(rng, (0.5, 1.0)), bool(rng.random() < 0.5)
    groups = group_objects(objects, size=size)
    relation = main_relation(*objects) if len(objects) == len(groups) == 2 else ""
    joined = bool(relation) and may_relate(scene, relation, *objects) and rng.random() < 2 / 3
    phrases = []
    for group in groups:
        members = [item for item in objects if _is_of(item, group)]
        place = "on " + " and ".join(cell_text(item) for item in members)
        if len(members) == 1 and not joined and rng.random() < 2 / 3:
            place = half_of_image_text(members[0]) if rng.random() < 0.5 else part_of_image_text(members[0], rng)
        phrases.append(f"{_group_text(group)} {place}" if rng.random() < share else _group_text(group))
    return _on_ground(f" {RELATIONS[relation]} ".join(phrases) if joined else ", ".join(phrases), scene, rng)


def layout(scene: Scene, order: Sequence[int]) -> str:
    """A scene in words with the cell of every object: "a large red circle on column two row three, a small blue star on
    column six row five on a gray background"; `parse` does not support it.
    """
    phrases = [_placed(scene.objects[index]) for index in order]
    return f"{', '.join(phrases)} on a {scene.background} background"


def edit_layout(source: Scene, target: Scene) -> str:
    """What an edit changes, with the cell of every object: what is gone, then what is new, then a new background: "no
    small red circle on column two row three, a small blue star on column two row three".
    """
    gone = [f"no {look_text(o.shape, o.color, o.size)} on {cell_text(o)}" for o in _only(source, target)]
    new = [_placed(o) for o in _only(target, source)]
    changed = target.background != source.background
    return ", ".join([*gone, *new, *([with_article(f"{target.background} background")] if changed else [])])


def _placed(item: Object) -> str:
    """An object with its cell."""
    return f"{with_article(look_text(item.shape, item.color, item.size))} on {cell_text(item)}"


def _only(scene: Scene, other: Scene) -> list[Object]:
    """The objects that only the first of two scenes has."""
    return [item for item in scene.objects if item not in other.objects]


def half_of_image_text(item: Object) -> str:
    """The half of the image in which an object is, on the axis on which it is farthest from the middle."""
    middle = replace(item, x=SIDE / 2, y=SIDE / 2)
    return RELATIONS[main_relation(item, middle)].removesuffix(" of")


def part_of_image_text(item: Object, rng: np.random.Generator) -> str:
    """The part of the image in which an object is, in everyday words: middle, corner or side."""
    dx, dy = item.x - SIDE / 2, item.y - SIDE / 2
    across, down = "left" if dx < 0 else "right", "top" if dy < 0 else "bottom"
    if max(abs(dx), abs(dy)) <= MIDDLE:
        return pick(rng, ("in the middle", "in the center"))
    if min(abs(dx), abs(dy)) > MIDDLE:
        down = pick(rng, (down, "upper" if dy < 0 else "lower"))
        corner = pick(rng, ("", " corner")) if abs(dx) + abs(dy) >= SIDE / 2 else ""  # nearer to it than to the middle
        return f"in the {down} {across}{corner}"
    if abs(dx) >= abs(dy):
        return pick(rng, (f"on the {across}", f"on the {across} side"))
    return f"at the {down}"


def describe(scene: Scene) -> str:
    """The answer to DESCRIBE: everything except the places, sorted by shape, colour and size in the tables' order."""
    shapes, colors, sizes = SHAPES, tuple(COLORS), tuple(SIZES)
    ordered = sorted(scene.objects, key=lambda o: (shapes.index(o.shape), colors.index(o.color), sizes.index(o.size)))
    return to_text(Claim(scene.background, group_objects(ordered)))


def parse(text: str) -> Claim:
    """The claim of a caption; the inverse of `to_text`.

    Raises:
        InputError: words outside the vocabulary, or a sentence that is not a caption.
    """
    words = check_words(text)
    while len(words) > 1 and words[-1] in (".", "!", "?"):
        words = words[:-1]
    background = None
    if len(words) > 4 and words[-4:-2] == ["on", "a"] and words[-1] == "background" and words[-2] in BACKGROUNDS:
        background, words = words[-2], words[:-4]
    for name, phrase in RELATIONS.items():
        sides = f" {' '.join(words)} ".split(f" {phrase} ")
        if len(sides) == 2:
            groups = tuple(_parse_group(side.split(), text) for side in sides)
            return Claim(background, groups, Relation(name, 0, 1))
    phrases = re.split(r" , | and ", " ".join(words))
    groups = tuple(_parse_group(phrase.split(), text) for phrase in phrases)
    if sum(group.count == SOME for group in groups) > 1:
        raise InputError(f"expected a number for all groups of objects but one, got {text!r}")
    return Claim(background, groups)


def _parse_group(words: list[str], text: str) -> Group:
    numbers = {"a": 1, "an": 1, "some": SOME, **{word: count for count, word in enumerate(NUMBERS) if count}}
    rest = ["a", *words[1:], "object"] if words[:1] == ["something"] else list(words)
    count = numbers.get(rest.pop(0)) if rest else None
    size = rest.pop(0) if rest and rest[0] in SIZES else None
    color = rest.pop(0) if rest and rest[0] in COLORS else None
    word = rest.pop(0) if rest else ""
    shape = None if word in ("object", "objects") else SINGULARS.get(word, word)
    if count is None or shape not in (None, *SHAPES) or rest:
        raise InputError(
            "expected a caption such as 'a large red circle and two blue stars on a gray background', "
            f"got {text!r}: {' '.join(words)!r} names no object"
        )
    return Group(shape, color, size, count)
