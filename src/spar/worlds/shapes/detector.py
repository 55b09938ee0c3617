"""The detector of the shapes world: finds the background and the objects of an image, by rules, without training.

1. Smooth by [1 2 1] x [1 2 1] / 16, against pixel noise; the templates are smoothed in the same way.
2. The background is the palette colour that most pixels are nearest to; from then on its measured mean is used.
3. Every pixel is explained as a blend of the background and one object colour; foreground is where the blend is more
   than half object, or where no blend explains it. Objects are the 8-connected components of the foreground.
4. Colour by vote of the component's inner pixels; shape and size by the greatest overlap (sum of minima over sum of
   maxima, the intersection over union of soft masks) with templates of all twelve looks, around the component's
   centroid: every shape of this world has its centre there.

UNKNOWN, which no claim accepts, is a background or colour far from the palette, or a shape whose best overlap is below
MIN_OVERLAP. Components of fewer than MIN_PIXELS pixels are specks and are ignored (the smallest object
has about 55).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import ndimage

from spar.worlds.shapes.captions import SOME, Claim, Group
from spar.worlds.shapes.render import render, signed_distance
from spar.worlds.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    SEED_RANGES,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    holds,
    make_scene,
)

DETECTOR_VERSION = "1"
UNKNOWN = "unknown"
MIN_PIXELS = 12
MIN_OVERLAP = 0.6
MAX_COLOR_DISTANCE = 60.0  # RGB units, between a pixel and the nearest palette colour or blend
CENTER_TOLERANCE = 1.0  # pixels, for `agrees`
PARTS = ("background", "count", "shape", "color", "size", "position")

_REACH = 13  # half width of a template, pixels
_STEPS = 4  # template positions in a pixel
_SHIFTS = (-1, 0, 1)  # searched around the centroid, in steps
_EVERYWHERE = np.ones((3, 3), dtype=bool)
_LOOKS = tuple((shape, size) for shape in SHAPES for size in SIZES)
_BACKGROUND_RGB = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
_COLOR_RGB = np.array(list(COLORS.values()), dtype=np.float32)


@dataclass(frozen=True)
class DetectedObject:
    """A detected object: its look, its centre in pixels, and overlap times share of colour votes, in [0, 1].

    `overlap` is that with the best template, in [0, 1]: how true the object is to one of the world's shapes.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    confidence: float
    overlap: float = 0.0


@dataclass(frozen=True)
class Detection:
    """The detected contents of an image; objects in order of their first row."""

    background: str
    objects: tuple[DetectedObject, ...]


def detect(image: np.ndarray) -> Detection:
    """Detect the background and the objects of an image.

    Args:
        image: uint8 [64, 64, 3], RGB.

    Raises:
        ValueError: another shape or type.
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 image of shape ({SIDE}, {SIDE}, 3), got {image.dtype} {image.shape}")
    seen = _smooth(image.astype(np.float32))
    background, ground = _find_background(seen)
    color_map, alphas, residual = _explain(seen - ground, _COLOR_RGB - ground)
    alpha = np.take_along_axis(alphas, color_map[None], axis=0)[0]
    labels, number = ndimage.label((alpha > 0.5) | (residual > MAX_COLOR_DISTANCE), structure=_EVERYWHERE)
    areas = np.bincount(labels.ravel(), minlength=number + 1)
    objects = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        if areas[index] >= MIN_PIXELS:
            objects.append(_find_object(labels, index, box, color_map, alphas, residual))
    return Detection(background, tuple(objects))


def _smooth(image: np.ndarray) -> np.ndarray:
    """[H, W, ...] blurred by [1 2 1] / 4 along both of the first axes, edges repeated."""
    for axis in (0, 1):
        padded = np.concatenate([image.take([0], axis), image, image.take([-1], axis)], axis)
        low, high = (np.moveaxis(padded, axis, 0)[part] for part in (slice(None, -2), slice(2, None)))
        image = image * 0.5 + np.moveaxis(low + high, 0, axis) * 0.25
    return image


def _find_background(seen: np.ndarray) -> tuple[str, np.ndarray]:
    """The background's name and its measured colour, float32 [3]."""
    palette = np.concatenate([_BACKGROUND_RGB, _COLOR_RGB])
    pixels = seen.reshape(-1, 3)
    nearest = ((palette**2).sum(1) - 2 * pixels @ palette.T).argmin(1)
    index = int(np.bincount(nearest, minlength=len(palette)).argmax())
    ground = pixels[nearest == index].mean(0)
    known = index < len(BACKGROUNDS) and np.linalg.norm(ground - palette[index]) <= MAX_COLOR_DISTANCE
    return (tuple(BACKGROUNDS)[index] if known else UNKNOWN), ground


def _explain(offset: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit each pixel as background + alpha * (color - background).

    Args:
        offset: [64, 64, 3] from the background's colour.
        axes: [8, 3] from the background's to each object colour.

    Returns:
        The best colour's index [64, 64], alpha for each colour [8, 64, 64] in [0, 1], and the best colour's residual
        [64, 64] in RGB units.
    """
    norms = (axes**2).sum(1).clip(1)
    dots = (offset.reshape(-1, 3) @ axes.T).T  # [8, 4096]
    alphas = np.clip(dots / norms[:, None], 0, 1)
    squares = (offset.reshape(-1, 3) ** 2).sum(1) + alphas * (alphas * norms[:, None] - 2 * dots)
    best = squares.argmin(0)
    residual = np.sqrt(squares.min(0).clip(0))
    return best.reshape(SIDE, SIDE), alphas.reshape(-1, SIDE, SIDE), residual.reshape(SIDE, SIDE)


def _find_object(
    labels: np.ndarray,
    index: int,
    box: tuple[slice, slice],
    color_map: np.ndarray,
    alphas: np.ndarray,
    residual: np.ndarray,
) -> DetectedObject:
    grown = tuple(slice(max(0, part.start - 2), part.stop + 2) for part in box)
    mask = labels[grown] == index
    inner = ndimage.binary_erosion(mask, _EVERYWHERE)
    inner = inner if inner.sum() >= 4 else mask
    votes = np.bincount(color_map[grown][inner], minlength=len(COLORS))
    color = int(votes.argmax())
    known = residual[grown][inner].mean() <= MAX_COLOR_DISTANCE
    # The soft mask: blends next to the component belong to it, unless they belong to another one.
    near = ndimage.binary_dilation(mask, _EVERYWHERE, iterations=2) & (mask | (labels[grown] == 0))
    soft = np.zeros((SIDE + 4 * _REACH, SIDE + 4 * _REACH), dtype=np.float32)
    weights = alphas[color][grown] * near
    soft[2 * _REACH : -2 * _REACH, 2 * _REACH : -2 * _REACH][grown] = weights
    weights = weights + 1e-9  # an unknown colour may have no weight
    y = grown[0].start + 0.5 + float(weights.sum(1) @ np.arange(mask.shape[0]) / weights.sum())
    x = grown[1].start + 0.5 + float(weights.sum(0) @ np.arange(mask.shape[1]) / weights.sum())
    look, overlap = _best_look(soft, x, y)
    shape, size = _LOOKS[look]
    confidence = overlap * float(votes[color] / votes.sum())
    shape, name = shape if overlap >= MIN_OVERLAP else UNKNOWN, tuple(COLORS)[color] if known else UNKNOWN
    return DetectedObject(shape, name, size, x, y, confidence, overlap)


def _best_look(soft: np.ndarray, x: float, y: float) -> tuple[int, float]:
    """Index into _LOOKS and overlap of the best template around (x, y) of a soft mask padded by 2 * _REACH."""
    templates, sums = _templates()
    best_look, best_overlap = 0, -1.0
    width = 2 * _REACH + 1
    total = soft.sum()
    for row_step in _SHIFTS:
        row, row_part = divmod(round(y * _STEPS) + row_step, _STEPS)
        for column_step in _SHIFTS:
            column, column_part = divmod(round(x * _STEPS) + column_step, _STEPS)
            window = soft[row + _REACH : row + _REACH + width, column + _REACH : column + _REACH + width].ravel()
            shared = np.minimum(window, templates[row_part, column_part]).sum(1)
            overlaps = shared / (total + sums[row_part, column_part] - shared)
            look = int(overlaps.argmax())
            if overlaps[look] > best_overlap:
                best_look, best_overlap = look, float(overlaps[look])
    return best_look, best_overlap


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Smoothed masks float32 [steps, steps, 12, window], centred step / _STEPS into the middle pixel; their sums."""
    offsets = np.arange(-_REACH, _REACH + 1, dtype=np.float32) + 0.5
    planes = []
    for row in range(_STEPS):
        for column in range(_STEPS):
            dy, dx = offsets[:, None] - row / _STEPS, offsets[None, :] - column / _STEPS
            covered = [np.clip(0.5 - signed_distance(shape, SIZES[size], dx, dy), 0, 1) for shape, size in _LOOKS]
            planes.append([_smooth(plane).ravel() for plane in covered])
    templates = np.array(planes, dtype=np.float32).reshape(_STEPS, _STEPS, len(_LOOKS), -1)
    return templates, templates.sum(-1)


# ---- comparison with a claim ---------------------------------------------------------------------------------------


def satisfies(detection: Detection, claim: Claim) -> tuple[bool, dict[str, bool]]:
    """Whether an image shows exactly the contents of a claim, and which of PARTS are right.

    The verdict needs the background, the exact number of objects, and one assignment of objects to the claim for which
    every shape, colour, size and relation holds. Of the parts, "count" is the exact number; "shape" that objects have
    the claimed shapes; "color" and "size" that they also have the claimed colours, or sizes; "position" that the
    relation holds between objects of the claimed shapes. A part that is not claimed is right. A group of SOME objects
    has all that the other groups leave, two at least.
    """
    claim = _counted(claim, len(detection.objects))

    def found(fits: Callable[[DetectedObject, Group], bool], related: bool = False) -> bool:
        return any(not related or _related(chosen, claim) for chosen in _assignments(detection.objects, claim, fits))

    parts = {
        "background": claim.background in (None, detection.background),
        "count": len(detection.objects) == sum(group.count for group in claim.groups),
        "shape": found(_same_shape),
        "color": found(lambda item, group: _same_shape(item, group) and group.color in (None, item.color)),
        "size": found(lambda item, group: _same_shape(item, group) and group.size in (None, item.size)),
        "position": claim.relation is None or found(_same_shape, related=True),
    }
    right = all(parts.values()) and found(
        lambda item, group: (
            _same_shape(item, group) and group.color in (None, item.color) and group.size in (None, item.size)
        ),
        related=True,
    )
    return right, parts


def _counted(claim: Claim, found: int) -> Claim:
    """The claim with a number for SOME: what the other groups leave of the objects found, two at least."""
    rest = found - sum(group.count for group in claim.groups)
    groups = tuple(replace(g, count=max(2, rest)) if g.count == SOME else g for g in claim.groups)
    return replace(claim, groups=groups)


def _same_shape(item: DetectedObject, group: Group) -> bool:
    return group.shape in (None, item.shape)


def _related(chosen: Sequence[tuple[int, DetectedObject]], claim: Claim) -> bool:
    relation = claim.relation
    if relation is None:
        return True
    subjects = [item for index, item in chosen if index == relation.subject]
    others = [item for index, item in chosen if index == relation.object]
    return all(holds(relation.name, subject, other) for subject in subjects for other in others)


def _assignments(
    objects: Sequence[DetectedObject], claim: Claim, fits: Callable[[DetectedObject, Group], bool]
) -> Iterator[list[tuple[int, DetectedObject]]]:
    """All ways to assign a different object to each claimed one, as (index of the group, object)."""
    slots = [index for index, group in enumerate(claim.groups) for _ in range(group.count)]

    def fill(
        chosen: list[tuple[int, DetectedObject]], places: tuple[int, ...]
    ) -> Iterator[list[tuple[int, DetectedObject]]]:
        if len(chosen) == len(slots):
            yield chosen
            return
        slot = slots[len(chosen)]
        # Within a group the order of objects is irrelevant: use only the rising order.
        first = places[-1] + 1 if chosen and chosen[-1][0] == slot else 0
        for place in range(first, len(objects)):
            if place not in places and fits(objects[place], claim.groups[slot]):
                yield from fill([*chosen, (slot, objects[place])], (*places, place))

    return fill([], ())


# ---- accuracy of the detector ---------------------------------------------------------------------------------------


def agrees(detection: Detection, scene: Scene) -> bool:
    """Whether a detection is fully right: background, each object's look, centres within CENTER_TOLERANCE."""
    left = list(detection.objects)
    for item in scene.objects:
        same = [
            found
            for found in left
            if (found.shape, found.color, found.size) == (item.shape, item.color, item.size)
            and max(abs(found.x - item.x), abs(found.y - item.y)) <= CENTER_TOLERANCE
        ]
        if not same:
            return False
        left.remove(same[0])
    return not left and detection.background == scene.background


def degrade_image(image: np.ndarray, rng: np.random.Generator, *, blur: float = 0.7, noise: float = 16.0) -> np.ndarray:
    """Degrade an image like a good decoder: Gaussian blur (sigma in pixels), noise (sigma in RGB units)."""
    blurred = ndimage.gaussian_filter(image.astype(np.float32), (blur, blur, 0))
    noisy = blurred + rng.normal(0, noise, image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def detector_accuracy(
    n: int = 2000, degrade: bool = False, seed: int = 0, kinds: Sequence[str] = KINDS
) -> float:
    """Share of n benchmark scenes (kinds in turn, any combinations) that the detector gets fully right (`agrees`).

    Args:
        n: number of scenes, >= 1.
        degrade: whether to apply `degrade_image` first.
        seed: of the scenes and the noise.
        kinds: of scenes, of ALL_KINDS.
    """
    rng = np.random.default_rng(seed)
    start, stop = SEED_RANGES["benchmark"]
    right = 0
    for index, scene_seed in enumerate(rng.integers(start, stop, n)):
        scene = make_scene(int(scene_seed), kind=kinds[index % len(kinds)], combinations="any")
        image = render(scene)
        right += agrees(detect(degrade_image(image, rng) if degrade else image), scene)
    return right / n
