"""Training data by index: scene i of a split is always the same, on any machine and in any order.

Also the dense targets of the encoder's pre-training: the exact contents of each cell of a coarse grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from spar.worlds.shapes.render import coverages, render
from spar.worlds.shapes.scene import ALL_KINDS, BACKGROUNDS, COLORS, SEED_RANGES, SHAPES, SIDE, SIZES, Scene, make_scene

GRID = 8
CELL_SHARE = 0.25  # a cell belongs to an object that covers this share of the cell's pixels
SHAPE_IDS = {name: index for index, name in enumerate(SHAPES, start=1)}  # 0 is "none", as in the next two
COLOR_IDS = {name: index for index, name in enumerate(COLORS, start=1)}
SIZE_IDS = {name: index for index, name in enumerate(SIZES, start=1)}
BACKGROUND_IDS = {name: index for index, name in enumerate(BACKGROUNDS)}


@dataclass(frozen=True)
class SceneSample:
    """A scene, its image (uint8 [64, 64, 3]) and the seed of both."""

    scene: Scene
    image: np.ndarray
    seed: int


def seed_at(split: str, index: int) -> int:
    """Seed of scene `index` of a split; ValueError on an unknown split or an index outside its range."""
    if split not in SEED_RANGES:
        raise ValueError(f"split must be one of {tuple(SEED_RANGES)}, got {split!r}")
    start, stop = SEED_RANGES[split]
    if not 0 <= index < stop - start:
        raise ValueError(f"index must be in [0, {stop - start}), got {index}")
    return start + index


def scene_at(
    split: str, index: int, kind_weights: Mapping[str, float] | None = None, *, combinations: str = "seen"
) -> Scene:
    """Scene `index` of a split.

    Args:
        split: a key of SEED_RANGES.
        index: from 0; its seed is the split's first seed plus index.
        kind_weights: relative frequency of each kind of scene (a missing kind never occurs); uniform if None.
        combinations: as in `make_scene`.

    Raises:
        ValueError: an unknown split or kind, an index out of range, or weights that are negative or all zero.
    """
    seed = seed_at(split, index)
    kind = None if kind_weights is None else _draw_kind(seed, kind_weights)
    return make_scene(seed, kind=kind, combinations=combinations)


def sample_at(
    split: str, index: int, kind_weights: Mapping[str, float] | None = None, *, combinations: str = "seen"
) -> SceneSample:
    """Scene `index` of a split with its image; arguments and errors as in `scene_at`."""
    scene = scene_at(split, index, kind_weights, combinations=combinations)
    return SceneSample(scene, render(scene), seed_at(split, index))


def _draw_kind(seed: int, kind_weights: Mapping[str, float]) -> str:
    unknown = set(kind_weights) - set(ALL_KINDS)
    total = sum(kind_weights.values())
    if unknown or total <= 0 or min(kind_weights.values()) < 0:
        raise ValueError(f"kind_weights must be non-negative, not all zero, and of {ALL_KINDS}, got {kind_weights}")
    # A separate stream, so that the scene does not depend on the choice of its kind.
    mark = np.random.Generator(np.random.PCG64((seed, 1))).random() * total
    named = [(kind, kind_weights[kind]) for kind in ALL_KINDS if kind_weights.get(kind, 0) > 0]
    for kind, weight in named:
        mark -= weight
        if mark < 0:
            return kind
    return named[-1][0]


def dense_targets(scene: Scene, grid: int = GRID) -> dict[str, np.ndarray]:
    """Contents of each cell of a grid over the scene's image.

    A cell belongs to an object that covers at least CELL_SHARE of it; of several, to the one that covers most.

    Args:
        scene: the scene.
        grid: cells per side; must divide 64.

    Returns:
        "shape" in 0..6, "color" in 0..8, "size" in 0..2: int64 [grid, grid], 0 if the cell has no object.
        "background" in 0..5: int64 [grid, grid], the same in all cells.
        "center": float32 [grid, grid, 2], (x, y) / 64 of the cell's object, zeros if none.
        "coverage" in [0, 1]: float32 [grid, grid], the share of the cell covered by any object.

    Raises:
        ValueError: the grid does not divide the image's side.
    """
    if grid < 1 or SIDE % grid:
        raise ValueError(f"grid must divide {SIDE}, got {grid}")
    cell = SIDE // grid
    if scene.objects:
        shares = coverages(scene).reshape(-1, grid, cell, grid, cell).mean(axis=(2, 4))
    else:
        shares = np.zeros((1, grid, grid), dtype=np.float32)
    owner = np.where(shares.max(axis=0) >= CELL_SHARE, shares.argmax(axis=0) + 1, 0)  # 0: none

    def ids(values: list[int]) -> np.ndarray:
        return np.array([0, *values], dtype=np.int64)[owner]

    centers = np.array([(0.0, 0.0)] + [(item.x / SIDE, item.y / SIDE) for item in scene.objects], dtype=np.float32)
    return {
        "shape": ids([SHAPE_IDS[item.shape] for item in scene.objects]),
        "color": ids([COLOR_IDS[item.color] for item in scene.objects]),
        "size": ids([SIZE_IDS[item.size] for item in scene.objects]),
        "background": np.full((grid, grid), BACKGROUND_IDS[scene.background], dtype=np.int64),
        "center": centers[owner],
        "coverage": shares.sum(axis=0).clip(0, 1),
    }
