"""Rendering of scenes: solid fills with edges anti-aliased by signed distance, coverage = clip(0.5 - distance, 0, 1).

Distances are in pixels and negative inside. The polygons use the distance to their edges' lines, which is the true
distance everywhere but outside a corner.
"""

from __future__ import annotations

from math import ceil, cos, floor, pi, sin, sqrt

import numpy as np

from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, SIDE, SIZES, Object, Scene

RING_INNER = 0.55  # inner radius of a ring, as a share of the outer
STAR_INNER = 0.45  # radius of a star's inner corners, as a share of the outer
SQUARE_HALF = 0.707  # half a square's side, as a share of its radius: the corners lie on the circle
CROSS_ARM, CROSS_HALF = 0.95, 0.3  # length and half width of a cross's arms, as shares of its radius


def signed_distance(shape: str, radius: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Distance in pixels to the edge of a shape, negative inside.

    Args:
        shape: one of SHAPES.
        radius: of the circle around the shape, pixels.
        dx: [1, W] offsets to the right of the shape's centre, pixels.
        dy: [H, 1] offsets below the shape's centre, pixels.

    Returns:
        [H, W].
    """
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - radius
    if shape == "ring":
        middle, half = radius * (1 + RING_INNER) / 2, radius * (1 - RING_INNER) / 2
        return np.abs(np.sqrt(dx * dx + dy * dy) - middle) - half
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - radius * SQUARE_HALF
    if shape == "triangle":
        sides = np.abs(dx) * (sqrt(3) / 2) - dy * 0.5
        return np.maximum(sides, dy) - radius / 2
    if shape == "cross":
        ax, ay = np.abs(dx), np.abs(dy)
        arm, half = radius * CROSS_ARM, radius * CROSS_HALF
        return np.minimum(np.maximum(ax - arm, ay - half), np.maximum(ax - half, ay - arm))
    if shape == "star":
        return _star_distance(radius, dx, dy)
    raise ValueError(f"unknown shape {shape!r}")


def _star_distance(radius: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """All ten edges are one edge after folding the plane to the 36 degrees beside the upper point."""
    turn = np.abs(np.arctan2(dx, -dy)) * (1 / (0.4 * pi))  # in fifths of a turn
    angle = np.abs(turn - np.rint(turn)) * (0.4 * pi)
    length = np.sqrt(dx * dx + dy * dy)
    inner_x, inner_y = radius * STAR_INNER * cos(pi / 5), radius * STAR_INNER * sin(pi / 5)
    edge_x, edge_y = inner_x - radius, inner_y
    norm = sqrt(edge_x**2 + edge_y**2)
    outward_x, outward_y = edge_y / norm, -edge_x / norm
    return length * (np.cos(angle) * outward_x + np.sin(angle) * outward_y) - radius * outward_x


def coverage(item: Object) -> tuple[tuple[slice, slice], np.ndarray]:
    """Coverage of each pixel by an object: (rows, columns) of its bounding box, and float [H, W] in [0, 1]."""
    radius = SIZES[item.size]
    top, left = max(0, floor(item.y - radius - 0.5)), max(0, floor(item.x - radius - 0.5))
    bottom, right = min(SIDE, ceil(item.y + radius + 0.5)), min(SIDE, ceil(item.x + radius + 0.5))
    dx = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - item.x))[None, :]
    dy = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - item.y))[:, None]
    covered = 0.5 - signed_distance(item.shape, radius, dx, dy)
    np.minimum(np.maximum(covered, 0, out=covered), 1, out=covered)
    return (slice(top, bottom), slice(left, right)), covered


def render(scene: Scene) -> np.ndarray:
    """The scene's image: uint8 [64, 64, 3], RGB."""
    image = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        box, covered = coverage(item)
        below = image[box].astype(np.float32)
        color = np.array(COLORS[item.color], dtype=np.float32)
        image[box] = below + covered[..., None] * (color - below) + 0.5
    return image


def coverages(scene: Scene) -> np.ndarray:
    """Coverage of each pixel by each object: float32 [n, 64, 64] in [0, 1], in the order of `scene.objects`."""
    covered = np.zeros((len(scene.objects), SIDE, SIDE), dtype=np.float32)
    for plane, item in zip(covered, scene.objects, strict=True):
        box, values = coverage(item)
        plane[box] = values
    return covered


def masks(scene: Scene) -> np.ndarray:
    """Mask of each object (pixels at least half covered): bool [n, 64, 64], in the objects' order."""
    return coverages(scene) >= 0.5
