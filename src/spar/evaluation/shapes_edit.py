"""Shapes-Edit, modelled on ImgEdit: five kinds of edit, 100 instructions each, one image per instruction.

An image is right only if it follows the instruction, every other object keeps shape, colour, size and place, and the
background stays. Attributes outside the instruction must stay too: a recoloured object keeps its shape, size and place,
a replaced one the size and place of the old. An added object's place is free, unless the instruction gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy import ndimage

from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.matching import PLACE_TOLERANCE, same_look, same_object, take_match
from spar.evaluation.options import (
    EvalOptions,
    PipelineLike,
    Progress,
    batches,
    image_seed,
    pixels,
    scene_seed,
    seed_block,
)
from spar.evaluation.results import Result, Score, mean_score
from spar.evaluation.shapes_recon import psnr
from spar.worlds.shapes.captions import EDIT_KINDS, Edit, edit_kinds, make_edit
from spar.worlds.shapes.detector import DetectedObject, detect
from spar.worlds.shapes.render import masks, render
from spar.worlds.shapes.scene import RELATIONS, Object, Scene, holds, make_scene

INSTRUCTIONS = 100  # per kind
REGION_MARGIN = 3  # pixels by which the edited region is wider than the objects that change
PARTS = ("instruction", "kept", "nothing_else", "background")


@dataclass(frozen=True)
class EditItem:
    """A source scene with its image, and the edit."""

    index: int
    block: int
    scene: Scene
    image: np.ndarray
    edit: Edit


@dataclass(frozen=True)
class EditVerdict:
    """Whether the image is right, which of PARTS are, and the PSNR outside the edited region (None: no outside)."""

    right: bool
    parts: dict[str, bool]
    psnr: float | None


def edit_items(options: EvalOptions) -> list[EditItem]:
    """The instructions of all kinds, in order: always the same for the same combinations; a limit takes the first.

    Held-out combinations are those of new objects (recolour, add, replace), or of the source (remove, background).
    """
    count = options.limit or INSTRUCTIONS
    return [item for part in range(len(EDIT_KINDS)) for item in _kind_items(part, count, options.combinations)]


def _kind_items(part: int, count: int, combinations: str) -> list[EditItem]:
    kind, number = EDIT_KINDS[part], seed_block("shapes-edit", part, combinations)
    shown = combinations if kind in ("remove", "background") else "seen"
    items: list[EditItem] = []
    index = 0
    while len(items) < count:
        seed = scene_seed(number, index)
        index += 1
        scene = make_scene(seed, combinations=shown)
        if kind not in edit_kinds(scene, combinations):
            continue
        try:
            edit = make_edit(scene, np.random.default_rng((seed, 1)), kind, combinations)
        except ValueError:  # no room for one more object
            continue
        items.append(EditItem(len(items), number, scene, render(scene), edit))
    return items


def shapes_edit(pipe: PipelineLike, options: EvalOptions | None = None, progress: Progress | None = None) -> Result:
    """Run Shapes-Edit on `pipe.edit`.

    Scores: "overall" (mean of the kinds), one per kind, "psnr_outside" (dB, mean over images of every kind but
    background), and "part.<name>" for each of PARTS; an image is right when its parts are.
    """
    from PIL import Image

    options, clock = options or EvalOptions(), Timer()
    items = edit_items(options)
    verdicts: list[EditVerdict] = []
    for chunk in batches(items, options.batch, progress):
        images = pipe.edit(
            [Image.fromarray(item.image) for item in chunk],
            [item.edit.instruction for item in chunk],
            seed=[image_seed(options.seed, item.block, item.index) for item in chunk],
            **options.sampling(),
        ).images
        verdicts += [check_edit(item, pixels(image)) for item, image in zip(chunk, images, strict=True)]
    records = [
        {"kind": item.edit.kind, "instruction": item.edit.instruction, "right": verdict.right, "parts": verdict.parts}
        for item, verdict in zip(items, verdicts, strict=True)
    ]
    scores = _scores(items, verdicts, options.seed)
    settings = run_settings(
        pipe, options, clock, sampled=True, prompts=len(items), place_tolerance=PLACE_TOLERANCE,
        region=f"changed objects' masks, {REGION_MARGIN} pixels wider",
    )
    return Result("shapes-edit", scores, settings, {"prompts": records})


def _scores(items: Sequence[EditItem], verdicts: Sequence[EditVerdict], seed: int) -> tuple[Score, ...]:
    pairs = list(zip(items, verdicts, strict=True))
    groups = {kind: [float(verdict.right) for item, verdict in pairs if item.edit.kind == kind] for kind in EDIT_KINDS}
    outside = [verdict.psnr for verdict in verdicts if verdict.psnr is not None]
    return (
        mean_score("overall", *groups.values(), seed=seed),
        *(mean_score(kind, group, seed=seed) for kind, group in groups.items()),
        mean_score("psnr_outside", outside, seed=seed),
        *(mean_score(f"part.{part}", [float(v.parts[part]) for v in verdicts], seed=seed) for part in PARTS),
    )


def check_edit(item: EditItem, image: np.ndarray) -> EditVerdict:
    """Run the detector on an edited image, uint8 [64, 64, 3], and compare it with the target."""
    detection = detect(image)
    source, target, kind = item.scene, item.edit.target, item.edit.kind
    gone = [old for old in source.objects if old not in target.objects]
    left = list(detection.objects)
    kept: list[DetectedObject | None] = []
    new_objects: list[DetectedObject | None] = []
    for wanted in target.objects:
        if wanted in source.objects:
            kept.append(take_match(left, partial(same_object, item=wanted)))
    for wanted in target.objects:
        if wanted not in source.objects:
            new_objects.append(take_match(left, partial(_is_new, new=wanted, item=item)))
    background = detection.background == target.background
    instruction = {
        "background": background,
        "remove": not any(same_object(found, old) for found in detection.objects for old in gone),
    }.get(kind, None not in new_objects)
    parts = {
        "instruction": instruction,
        "kept": None not in kept,
        "nothing_else": not left,
        "background": background,
    }
    return EditVerdict(all(parts.values()), parts, _psnr_outside(item, image, new_objects))


def _is_new(found: DetectedObject, new: Object, item: EditItem) -> bool:
    """Whether a detected object is the new one of the instruction."""
    if item.edit.kind != "add":
        return same_object(found, new)
    where = stated_place(item)
    return same_look(found, new) and (where is None or holds(where[0], found, where[1]))


def stated_place(item: EditItem) -> tuple[str, Object] | None:
    """The relation (a key of RELATIONS) and the anchor of an "add" instruction, if it gives a place."""
    for name, phrase in RELATIONS.items():
        _, found, rest = item.edit.instruction.partition(f" {phrase} the ")
        if found:
            color, shape = rest.split()
            return name, next(anchor for anchor in item.scene.objects if anchor.pair == (color, shape))
    return None


def _psnr_outside(item: EditItem, image: np.ndarray, new_objects: Sequence[DetectedObject | None]) -> float | None:
    """PSNR against the source outside the region to edit; an added object counts at its detected place."""
    if item.edit.kind == "background":
        return None
    source, target = item.scene.objects, item.edit.target.objects
    changed = [old for old in source if old not in target] + [new for new in target if new not in source]
    if item.edit.kind == "add" and new_objects[0] is not None:
        changed = [replace(changed[0], x=new_objects[0].x, y=new_objects[0].y)]
    region = masks(replace(item.scene, objects=tuple(changed))).any(0)
    outside = ~ndimage.binary_dilation(region, np.ones((3, 3), bool), iterations=REGION_MARGIN)
    return psnr(image[outside], item.image[outside])
