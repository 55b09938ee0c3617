"""What a model of the shapes world writes before it draws: `python docs/layouts.py [MODEL [END]]` prints, for each kind
of scene, the share of layouts without fault and the share of each fault, on captions of validation scenes. With END,
the end of a stage of a run such as RUN/mllm-2/done, MODEL's LLM has the weights that it had there.

Faults: "form", a text that is no layout; "words", objects that are not those of the caption, or a relation that does
not hold between their cells; "near", two objects on top of each other: their cells' centers are nearer than the sum of
their radii less SLACK, half a cell, by which two centers may be off.

Then the same for two kinds of caption that benchmarks have not: "related", groups of objects with a relation between
them, and "divided", objects of one shape and what tells them apart.

Last, of a model that writes them, the same for each kind of edit of such scenes. "words" are objects that are not those
that go or come, "place" a cell that is not theirs or one beside it; of an added object only a relation that it was
given, and "near", count.
"""

import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from spar.inference.pipeline import SparPipeline
from spar.recipes.shapes.data import layout_order
from spar.training.checkpoint import load_group
from spar.worlds.shapes.captions import (
    Claim,
    Group,
    Relation,
    caption,
    divided_caption,
    edit_layout,
    parse,
    related_caption,
)
from spar.worlds.shapes.dataset import scene_at
from spar.worlds.shapes.detector import DetectedObject, Detection, satisfies
from spar.worlds.shapes.edits import ALL_EDIT_KINDS, BY_ANYTHING, Edit, edit_kinds, make_edit
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIDE, SIZES, Scene, holds
from spar.worlds.shapes.tokenizer import ORDINALS

KINDS = ("single", "two", "count", "position", "multi", "shared", "twins")
LESSONS = {"related": related_caption, "divided": divided_caption}
CAPTIONS = 96  # of a kind
SLACK = 4.0  # pixels
CELL = SIDE / len(ORDINALS)
Cell = tuple[int, int]
Changes = list[tuple[str, Cell]]
_ITEM = re.compile(
    rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    rf"on column ({'|'.join(ORDINALS)}) row ({'|'.join(ORDINALS)})"
)
_GROUND = re.compile(rf"(.*) on a ({'|'.join(BACKGROUNDS)}) background")


def read(text: str) -> Detection | None:
    """What a layout shows, each object in the middle of its cell; None if the text is no layout."""
    found = _GROUND.fullmatch(text)
    items = [_ITEM.fullmatch(phrase) for phrase in found.group(1).split(", ")] if found else [None]
    objects = []
    for item in items:
        if item is None:
            return None
        size, color, shape, column, row = item.groups()
        x, y = ((ORDINALS.index(word) + 0.5) * CELL for word in (column, row))
        objects.append(DetectedObject(shape, color, size, x, y, confidence=1.0))
    return Detection(found.group(2) if found else "", tuple(objects))


def fault(text: str, claims: Sequence[Claim]) -> str:
    """The first fault of a layout that is to satisfy all of some claims; "" if it has none."""
    seen = read(text)
    if seen is None:
        return "form"
    if not all(satisfies(seen, claim)[0] for claim in claims):
        return "words"
    for one, other in combinations(seen.objects, 2):
        if np.hypot(one.x - other.x, one.y - other.y) < SIZES[one.size] + SIZES[other.size] - SLACK:
            return "near"
    return ""


def shares(pipe: SparPipeline, kind: str, count: int) -> dict[str, float]:
    """The share of each fault among the layouts of `count` captions of a kind; "" is none."""
    scenes = [scene_at("validation", index, {kind: 1.0}) for index in range(count)]
    prompts = [caption(scene, np.random.default_rng(index)) for index, scene in enumerate(scenes)]
    claims = [[parse(prompt)] for prompt in prompts]
    faults = Counter(map(fault, pipe.write_layouts(prompts, seed=0), claims))
    return {name: number / count for name, number in faults.items()}


def related_claims(text: str) -> list[Claim]:
    """What a caption of `related_caption` says: of each group before the relation that it is so of each one behind."""
    name, phrase = next(item for item in RELATIONS.items() if f" {item[1]} " in text)
    one, two = (parse(side) for side in text.split(f" {phrase} "))
    groups, first = (*one.groups, *two.groups), len(one.groups)
    pairs = product(range(first), range(first, len(groups)))
    return [Claim(two.background, groups, Relation(name, a, b)) for a, b in pairs]


def divided_claims(text: str) -> list[Claim]:
    """What a caption of `divided_caption` says: "two circles, one red and one blue, a star" is three groups."""
    found = _GROUND.fullmatch(text)
    background, text = (found[2], found[1]) if found else (None, text)
    groups = list[Group]()
    for phrase in re.split(r", (?!one )", text.replace(":", ",")):
        whole, *ones = re.split(r", one | and one ", phrase)
        (group,) = parse(whole).groups
        each = [{"color" if one in COLORS else "size": one, "count": 1} for one in ones]
        groups += [replace(group, **values) for values in each] or [group]
    return [Claim(background, tuple(groups))]


def lesson_shares(pipe: SparPipeline, kind: str, count: int) -> dict[str, float]:
    """`shares` of captions of one of LESSONS."""
    prompts, read_claims = list[str](), {"related": related_claims, "divided": divided_claims}[kind]
    for index in itertools.count():
        if len(prompts) == count:
            break
        scene, rng = scene_at("validation", index, {"shared": 1.0, "twins": 1.0}), np.random.default_rng(index)
        text = LESSONS[kind](scene, rng, order=layout_order(scene, rng))
        prompts += [text] if text else []
    faults = Counter(map(fault, pipe.write_layouts(prompts, seed=0), map(read_claims, prompts)))
    return {name: number / count for name, number in faults.items()}


def edit_fault(text: str, scene: Scene, edit: Edit) -> str:
    """The first fault of the layout of an edit; "" if it has none."""
    found, wanted = (_changes(one) for one in (text, edit_layout(scene, edit.target)))
    if found is None or wanted is None:
        return "form"
    if [words for words, _ in found] != [words for words, _ in wanted]:
        return "words"
    if edit.kind != "add":
        far = (max(abs(a - b) for a, b in zip(*at, strict=True)) > 1 for (_, *at) in _pairs(found, wanted))
        return "place" if any(far) else ""
    ((_, (x, y)),), new = found, edit.target.objects[-1]
    placed = replace(new, x=(x + 0.5) * CELL, y=(y + 0.5) * CELL)
    if edit.place and not holds(edit.place[0], placed, edit.place[1]):
        return "place"
    least = (SIZES[new.size] + SIZES[other.size] - SLACK for other in scene.objects)
    apart = (np.hypot(placed.x - other.x, placed.y - other.y) for other in scene.objects)
    return "near" if any(a < b for a, b in zip(apart, least, strict=True)) else ""


def _pairs(found: Changes, wanted: Changes) -> Iterator[tuple[str, Cell, Cell]]:
    return ((words, a, b) for (words, a), (_, b) in zip(found, wanted, strict=True))


def _changes(text: str) -> Changes | None:
    """What a layout of an edit says goes or comes, with its cell (column, row); None if the text is none."""
    changes: Changes = []
    for phrase in text.split(", "):
        if re.fullmatch(rf"an? ({'|'.join(BACKGROUNDS)}) background", phrase):
            changes.append((phrase, (0, 0)))
        elif item := re.fullmatch(r"((?:no|an?) .*) on column (\w+) row (\w+)", phrase):
            if not {item[2], item[3]} <= {*ORDINALS}:
                return None
            changes.append((item[1], (ORDINALS.index(item[2]), ORDINALS.index(item[3]))))
        else:
            return None
    return changes


def edit_shares(pipe: SparPipeline, kind: str, count: int) -> dict[str, float]:
    """The share of each fault among the layouts of `count` edits of a kind; "" is none."""
    edits: list[tuple[Scene, Edit]] = []
    for index in itertools.count():
        if len(edits) == count:
            break
        scene, rng = scene_at("validation", index, dict.fromkeys(KINDS, 1.0)), np.random.default_rng(index)
        if kind in edit_kinds(scene, naming=BY_ANYTHING):
            edits.append((scene, make_edit(scene, rng, kind, naming=BY_ANYTHING)))
    images = [Image.fromarray(render(scene)) for scene, _ in edits]
    texts = pipe.write_layouts([edit.instruction for _, edit in edits], image=images, seed=0)
    faults = Counter(edit_fault(text, *edit) for text, edit in zip(texts, edits, strict=True))
    return {name: number / count for name, number in faults.items()}


def show(kind: str, found: dict[str, float]) -> None:
    rest = ", ".join(f"{name} {share:.2f}" for name, share in sorted(found.items()) if name)
    print(f"{kind}: sound {found.get('', 0.0):.2f}{'; ' + rest if rest else ''}", flush=True)


def main() -> None:
    pipe = SparPipeline.from_pretrained(*sys.argv[1:2], dtype=torch.float32, device="cpu")
    if sys.argv[2:]:
        prefix, weights = "model.language.", load_group(Path(sys.argv[2]), "modules")
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        pipe.model.language.load_state_dict(own)
    for kind in KINDS:
        show(kind, shares(pipe, kind, CAPTIONS))
    for kind in LESSONS:
        show(kind, lesson_shares(pipe, kind, CAPTIONS))
    if pipe.bundle.sampling.edit_layout or sys.argv[2:]:
        for kind in ALL_EDIT_KINDS:
            show(f"edit, {kind}", edit_shares(pipe, kind, CAPTIONS))


if __name__ == "__main__":
    main()
