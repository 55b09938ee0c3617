"""Truths about renders: areas and centroids as geometry has them, colours as the tables have them."""

from dataclasses import replace
from math import pi, sin, sqrt

import numpy as np
import pytest

from spar.worlds.shapes.render import (
    CROSS_ARM,
    CROSS_HALF,
    RING_INNER,
    SQUARE_HALF,
    STAR_INNER,
    coverages,
    masks,
    render,
)
from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, GAP, KINDS, SHAPES, SIZES, Object, Scene, make_scene

AREAS = {  # of a shape of radius 1
    "circle": pi,
    "ring": pi * (1 - RING_INNER**2),
    "square": 4 * SQUARE_HALF**2,
    "triangle": 3 * sqrt(3) / 4,
    "cross": 8 * CROSS_ARM * CROSS_HALF - 4 * CROSS_HALF**2,
    "star": 5 * STAR_INNER * sin(pi / 5),
}
ROWS, COLUMNS = np.mgrid[0:64, 0:64] + 0.5


def one(shape: str, size: str = "large", x: float = 31.3, y: float = 33.8) -> Scene:
    return Scene("gray", (Object(shape, "red", size, x, y),), "single")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_area_centroid_and_reach_are_the_shapes_own(shape: str, size: str) -> None:
    radius = SIZES[size]
    for x, y in ((31.3, 33.8), (20.0, 40.5), (30.75, 30.25)):
        covered = coverages(one(shape, size, x, y))[0]
        area = covered.sum()
        assert area == pytest.approx(AREAS[shape] * radius**2, rel=0.03)
        assert (covered * COLUMNS).sum() / area == pytest.approx(x, abs=0.08)
        assert (covered * ROWS).sum() / area == pytest.approx(y, abs=0.08)
        far = np.hypot(COLUMNS - x, ROWS - y)  # a sharp corner's soft edge reaches a little farther than a round one's
        assert covered[far > radius + 0.75].max() < 0.15 and covered[far > radius + GAP / 2].max() == 0


def test_triangle_points_up_and_star_has_five_points() -> None:
    widths = masks(one("triangle"))[0].sum(1)
    widths = widths[widths > 0]
    assert widths[0] <= 2 and (np.diff(widths) >= 0).all() and widths[-1] > 15
    turns = np.linspace(
        0, 2 * pi, 720, endpoint=False
    )  # clockwise from straight up, between the inner and outer radius
    x, y = 31.3 + 8.5 * np.sin(turns), 33.8 - 8.5 * np.cos(turns)
    inside = masks(one("star"))[0][y.astype(int), x.astype(int)]
    assert inside[0]
    assert (np.diff(np.append(inside, inside[0]).astype(int)) == 1).sum() == 5


def test_ring_has_a_hole_and_cross_has_none() -> None:
    assert masks(one("cross"))[0][33, 31]
    assert not masks(one("ring"))[0][31:36, 29:34].any()


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("color", COLORS)
def test_colors_are_exact_away_from_edges(background: str, color: str) -> None:
    scene = Scene(background, (Object("square", color, "large", 30.0, 30.0),), "single")
    image = render(scene)
    assert (image[25:35, 25:35] == COLORS[color]).all()
    outside = np.hypot(COLUMNS - 30, ROWS - 30) > SIZES["large"] + 1
    assert (image[outside] == BACKGROUNDS[background]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_moving_an_object_by_whole_pixels_moves_its_image(shape: str) -> None:
    scene = one(shape)
    moved = replace(scene, objects=(replace(scene.objects[0], x=31.3 + 5, y=33.8 - 7),))
    difference = np.roll(render(scene), (-7, 5), axis=(0, 1)).astype(int) - render(moved)
    assert np.abs(difference).max() <= 1


def test_edges_are_blends_between_the_two_colors() -> None:
    image = render(one("circle")).astype(float)
    covered = coverages(one("circle"))[0][..., None]
    expected = np.array(BACKGROUNDS["gray"]) * (1 - covered) + np.array(COLORS["red"]) * covered
    assert np.abs(image - expected).max() <= 0.51
    assert ((covered > 0.05) & (covered < 0.95)).sum() > 40


@pytest.mark.parametrize("kind", KINDS)
def test_objects_never_share_a_pixel(kind: str) -> None:
    for seed in range(100):
        scene = make_scene(seed, kind=kind, combinations="any")
        assert masks(scene).shape == (len(scene.objects), 64, 64)
        assert ((coverages(scene) > 0).sum(0) <= 1).all()
