"""GenEval's rules on detected boxes (Ghosh et al., arXiv 2310.11513; djghosh13/geneval af4902f), in NumPy.

The detector and the classifier of colours are the caller's: a score is only "GenEval" with the benchmark's own
(Mask2Former Swin-S on COCO, CLIP ViT-L/14). `score` reads the layout that `spar generate --format geneval` writes.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar.common.config import read_json
from spar.common.errors import InputError

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # least confidence of an object; where the task is counting
MAX_OBJECTS = 16  # of a class, the surest ones
POSITION_THRESHOLD = 0.1  # of both boxes' sides together, by which an offset is shrunk
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis (x, y) and its sign


@dataclass(frozen=True)
class Box:
    """A detected object: its corners in pixels and the detector's confidence."""

    left: float
    top: float
    right: float
    bottom: float
    confidence: float


@dataclass(frozen=True)
class Verdict:
    """Whether an image is right, and what is not."""

    correct: bool
    reasons: tuple[str, ...] = ()


Found = Mapping[str, Sequence[Box]]  # boxes by class, in any order, of any confidence
Detector = Callable[[Image.Image], Found]
ColorOf = Callable[[Image.Image, str, Box], str]  # the colour of a class's object in an image


def relations(a: Box, b: Box) -> set[str]:
    """The relations of `a` to `b`: the offset of the centres, on each axis less a tenth of both sides, against its
    length before that.
    """
    corners = np.array([[[one.left, one.top], [one.right, one.bottom]] for one in (a, b)], dtype=np.float64)
    offset = np.subtract(*corners.mean(axis=1))                                             # (x, y)
    sides = np.abs(corners[:, 1] - corners[:, 0]).sum(axis=0)
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_THRESHOLD * sides, 0)
    if np.all(np.abs(shrunk) < 1e-3):
        return set()
    direction = shrunk / np.linalg.norm(offset)
    return {name for name, (axis, sign) in RELATIONS.items() if sign * direction[axis] > 0.5}


def judge(entry: Mapping[str, Any], found: Found, color_of: Callable[[str, Box], str]) -> Verdict:
    """Whether the boxes of an image fulfil a line of GenEval's prompts.

    Args:
        entry: the line, with `tag`, `include` and, of counting, `exclude`.
        found: the boxes of each class.
        color_of: the colour of a class's object; it is asked where a colour is required.
    """
    least = COUNTING_THRESHOLD if entry["tag"] == "counting" else THRESHOLD
    objects = {
        name: sorted((box for box in boxes if box.confidence > least), key=lambda box: -box.confidence)[:MAX_OBJECTS]
        for name, boxes in found.items()
    }
    reasons: list[str] = []
    matched: list[Sequence[Box] | None] = []
    for wanted in entry["include"]:
        group = objects.get(wanted["class"], [])[: wanted["count"]]
        fault = next(_faults(wanted, group, matched, color_of), None)
        matched.append(group if fault is None else None)
        reasons += [] if fault is None else [fault]
    for unwanted in entry.get("exclude", ()):
        count = len(objects.get(unwanted["class"], []))
        if count >= unwanted["count"]:
            reasons.append(f"expected {unwanted['class']}<{unwanted['count']}, found {count}")
    return Verdict(not reasons, tuple(reasons))


def _faults(
    wanted: Mapping[str, Any], group: Sequence[Box], matched: Sequence[Sequence[Box] | None],
    color_of: Callable[[str, Box], str],
) -> Iterator[str]:  # fmt: skip
    """What is wrong with the boxes of one required group, the first fault first."""
    name, count = wanted["class"], wanted["count"]
    if len(group) < count:
        yield f"expected {name}>={count}, found {len(group)}"
    if "color" in wanted:
        colors = [color_of(name, box) for box in group]
        if colors.count(wanted["color"]) < count:
            yield f"expected {wanted['color']} {name}>={count}, found {colors.count(wanted['color'])}"
    if "position" in wanted:
        relation, number = wanted["position"]
        target = matched[number]
        if target is None:
            yield f"no target for {name} to be {relation}"
        elif not all(relation in relations(box, other) for box in group for other in target):
            yield f"expected {name} {relation} target"


def score(folder: Path, detect: Detector, color_of: ColorOf) -> list[dict[str, Any]]:
    """The results of all images of a folder in GenEval's layout, in the form of its own results file.

    Raises:
        InputError: a folder without prompts, or a prompt without images.
    """
    results = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()):
        entry = read_json(place / "metadata.jsonl")
        samples = sorted(path for path in (place / "samples").glob("*.png") if path.stem.isdigit())
        if not samples:
            raise InputError(f"{place / 'samples'}: expected images (00000.png), found none")
        for path in samples:
            with Image.open(path, formats=("PNG",)) as opened:
                image = opened.convert("RGB")
            verdict = judge(entry, detect(image), partial(color_of, image))
            results.append(
                {
                    "filename": str(path), "tag": entry["tag"], "prompt": entry["prompt"],
                    "correct": verdict.correct, "reason": "\n".join(verdict.reasons), "metadata": json.dumps(entry),
                }
            )  # fmt: skip
    if not results:
        raise InputError(f"{folder}: expected folders of prompts (00000), found none")
    return results


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The share of right images of each task, and `overall`, the mean of the tasks."""
    tags = sorted({result["tag"] for result in results})
    scores = {tag: float(np.mean([bool(one["correct"]) for one in results if one["tag"] == tag])) for tag in tags}
    return {**scores, "overall": float(np.mean(list(scores.values())))}
