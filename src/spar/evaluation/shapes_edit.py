"""Shapes-Edit, modelled on ImgEdit: five kinds of edit, 100 instructions each, one image per instruction.

An image is right only if it follows the instruction, every other object keeps shape, colour, size and place, and the
background stays. Attributes outside the instruction must stay too: a recoloured object keeps its shape, size and place,
a replaced one the size and place of the old. An added object's place is free, unless the instruction gives it; a moved
one must be RELATION_OFFSET pixels farther in its direction, and at most DRIFT to the side.

Shapes-Edit-Bind has the same form on scenes in which another object has the shape or the colour of the object that the
instruction names, or both: two kinds more, and one less, since a background is no object. Additions have a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy import ndimage

from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.matching import PLACE_TOLERANCE, same_look, same_object, take_match
from spar.evaluation.options import (
    EvalOptions,
    PipelineLike,
    ask_known,
    batches,
    draws_layouts,
    image_seed,
    pixels,
    scene_kind,
    scene_seed,
    seed_block,
)
from spar.evaluation.pixel_metrics import psnr
from spar.evaluation.results import Result, Score, mean_score
from spar.worlds.shapes.captions import EDIT_KINDS, Edit, edit_kinds, make_edit
from spar.worlds.shapes.detector import DetectedObject, detect
from spar.worlds.shapes.edits import ALL_EDIT_KINDS, BY_NEED, BY_PAIR
from spar.worlds.shapes.render import masks, render
from spar.worlds.shapes.scene import Object, Scene, holds, make_scene

INSTRUCTIONS = 100  # per kind
REGION_MARGIN = 3  # pixels by which the edited region is wider than the objects that change
DRIFT = 4.0  # pixels
PARTS = ("instruction", "kept", "nothing_else", "background")
_KINDS = {
    "shapes-edit": EDIT_KINDS,
    "shapes-edit-bind": tuple(kind for kind in ALL_EDIT_KINDS if kind != "background"),
}


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


def edit_items(options: EvalOptions, benchmark: str = "shapes-edit") -> list[EditItem]:
    """The instructions of all kinds, in order: always the same for the same combinations; a limit takes the first.

    Held-out combinations are those of new objects (recolour, add, replace), or of the source (other kinds).
    """
    count = options.limit or INSTRUCTIONS
    return [
        item
        for part in range(len(_KINDS[benchmark]))
        for item in _kind_items(benchmark, part, count, options.combinations)
    ]


def _kind_items(benchmark: str, part: int, count: int, combinations: str) -> list[EditItem]:
    kind, number = _KINDS[benchmark][part], seed_block(benchmark, part, combinations)
    binding = benchmark == "shapes-edit-bind"
    naming = BY_NEED if binding else BY_PAIR
    shown = "seen" if kind in ("recolor", "add", "replace") else combinations
    items: list[EditItem] = []
    index = 0
    while len(items) < count:
        seed = scene_seed(number, index)
        index += 1
        scene = make_scene(seed, kind=scene_kind(benchmark, index), combinations=shown)
        if kind not in edit_kinds(scene, combinations, naming):
            continue
        try:
            edit = make_edit(scene, np.random.default_rng((seed, 1)), kind, combinations, naming)
        except ValueError:  # no room for one more object
            continue
        if binding and not needs_binding(scene, edit):
            continue
        items.append(EditItem(len(items), number, scene, render(scene), edit))
    return items


def needs_binding(scene: Scene, edit: Edit) -> bool:
    """Whether the object that an instruction names shares its shape or its colour with another one."""
    named = [item for item in scene.objects if item not in edit.target.objects]
    if edit.kind == "add" and edit.place is not None:
        named = [edit.place[1]]
    return any(
        other is not item and (other.shape == item.shape or other.color == item.color)
        for item in named
        for other in scene.objects
    )


def shapes_edit(pipe: PipelineLike, options: EvalOptions | None = None, progress: Advance | None = None) -> Result:
    """Run Shapes-Edit on `pipe.edit`.

    Scores: "overall" (mean of the kinds), one per kind, "psnr_outside" (dB, mean over images of every kind but
    background), and "part.<name>" for each of PARTS; an image is right when its parts are.
    """
    return _run("shapes-edit", pipe, options or EvalOptions(), progress)


def shapes_edit_bind(
    pipe: PipelineLike, options: EvalOptions | None = None, progress: Advance | None = None
) -> Result:
    """Run Shapes-Edit-Bind on `pipe.edit`; scores as in `shapes_edit`."""
    return _run("shapes-edit-bind", pipe, options or EvalOptions(), progress)


def run_edits(
    pipe: PipelineLike,
    items: Sequence[EditItem],
    instructions: Sequence[str],
    options: EvalOptions,
    progress: Advance | None = None,
) -> list[EditVerdict]:
    """Edit each item's image by its instruction and check it; an instruction that is refused is wrong in all parts."""
    from PIL import Image

    refused = EditVerdict(False, dict.fromkeys(PARTS, False), None)
    verdicts: list[EditVerdict] = []
    own = {} if options.layout is None else {"layout": options.layout}

    def edit(jobs: Sequence[tuple[EditItem, str]]) -> list[Image.Image]:
        return pipe.edit(
            [Image.fromarray(item.image) for item, _ in jobs],
            [text for _, text in jobs],
            seed=[image_seed(options.seed, item.block, item.index) for item, _ in jobs],
            **options.sampling(),
            **own,
        ).images

    for chunk in batches(list(zip(items, instructions, strict=True)), options.batch, progress):
        images = ask_known(pipe, chunk, lambda job: job[1], edit)
        verdicts += [
            refused if image is None else check_edit(item, pixels(image))
            for (item, _), image in zip(chunk, images, strict=True)
        ]
    return verdicts


def _run(benchmark: str, pipe: PipelineLike, options: EvalOptions, progress: Advance | None) -> Result:
    clock = Timer()
    items = edit_items(options, benchmark)
    verdicts = run_edits(pipe, items, [item.edit.instruction for item in items], options, progress)
    records = [
        {"kind": item.edit.kind, "instruction": item.edit.instruction, "right": verdict.right, "parts": verdict.parts}
        for item, verdict in zip(items, verdicts, strict=True)
    ]
    scores = _scores(items, verdicts, options.seed)
    settings = run_settings(
        pipe, options, clock, sampled=True, edits=True, prompts=len(items), place_tolerance=PLACE_TOLERANCE,
        edit_layout=draws_layouts(pipe, options, edits=True),
        region=f"changed objects' masks, {REGION_MARGIN} pixels wider",
    )
    return Result(benchmark, scores, settings, {"prompts": records})


def _scores(items: Sequence[EditItem], verdicts: Sequence[EditVerdict], seed: int) -> tuple[Score, ...]:
    pairs = list(zip(items, verdicts, strict=True))
    kinds = dict.fromkeys(item.edit.kind for item in items)
    groups = {kind: [float(verdict.right) for item, verdict in pairs if item.edit.kind == kind] for kind in kinds}
    outside = [verdict.psnr for verdict in verdicts if verdict.psnr is not None]
    return (
        mean_score("overall", *groups.values(), seed=seed),
        *(mean_score(kind, group, seed=seed) for kind, group in groups.items()),
        *((mean_score("psnr_outside", outside, seed=seed),) if outside else ()),
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
    if item.edit.kind not in ("add", "move"):
        return same_object(found, new)
    if not same_look(found, new) or item.edit.place is None:
        return same_look(found, new)
    direction, anchor = item.edit.place
    if item.edit.kind == "add":
        return holds(direction, found, anchor)
    aside = abs(found.y - anchor.y) if direction in ("left", "right") else abs(found.x - anchor.x)
    return holds(direction, found, anchor) and aside <= DRIFT


def _psnr_outside(item: EditItem, image: np.ndarray, new_objects: Sequence[DetectedObject | None]) -> float | None:
    """PSNR against the source outside the region to edit; an added or moved object counts at its detected place."""
    if item.edit.kind == "background":
        return None
    source, target = item.scene.objects, item.edit.target.objects
    changed = [old for old in source if old not in target] + [new for new in target if new not in source]
    if item.edit.kind in ("add", "move") and new_objects[0] is not None:
        *before, new = changed
        changed = [*before, replace(new, x=new_objects[0].x, y=new_objects[0].y)]
    region = masks(replace(item.scene, objects=tuple(changed))).any(0)
    outside = ~ndimage.binary_dilation(region, np.ones((3, 3), bool), iterations=REGION_MARGIN)
    return psnr(image[outside], item.image[outside])
