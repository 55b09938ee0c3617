"""Matching of detected and known objects: the definition of "unchanged" in Shapes-Edit and Shapes-Recon.

Also how true detected objects are to the world's shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import hypot

from spar.evaluation.results import Score, ratio_score
from spar.worlds.shapes.detector import DetectedObject, Detection
from spar.worlds.shapes.scene import Object

PLACE_TOLERANCE = 2.0  # pixels, between centres


def same_look(found: DetectedObject, item: Object) -> bool:
    """Whether a detected object has a known one's shape, colour and size."""
    return (found.shape, found.color, found.size) == (item.shape, item.color, item.size)


def same_object(found: DetectedObject, item: Object) -> bool:
    """Whether a detected object has a known one's look and its centre is within PLACE_TOLERANCE of that one's."""
    return same_look(found, item) and hypot(found.x - item.x, found.y - item.y) <= PLACE_TOLERANCE


def take_match(left: list[DetectedObject], fits: Callable[[DetectedObject], bool]) -> DetectedObject | None:
    """Remove the first object that fits from a list, so that none is counted twice."""
    for place, found in enumerate(left):
        if fits(found):
            return left.pop(place)
    return None


def fidelity_score(detections: Sequence[Detection], seed: int) -> Score:
    """The mean overlap of all detected objects with their best template, resampled by image; 0 if there is none.

    Renders and reconstructions have a value of their own below 1, which is the bar for drawn objects.
    """
    overlaps = [sum(item.overlap for item in one.objects) for one in detections]
    counts = [max(len(one.objects), 1e-9) for one in detections]
    return ratio_score("part.fidelity", overlaps, counts, seed=seed)
