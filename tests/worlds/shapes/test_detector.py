"""Truths about the detector: it reads real and degraded renders right, and accepts only images of the claim."""

from dataclasses import replace

import numpy as np
import pytest

from spar.worlds.shapes.captions import EDIT_KINDS, caption, describe, edit_kinds, make_edit, parse
from spar.worlds.shapes.detector import (
    PARTS,
    UNKNOWN,
    DetectedObject,
    Detection,
    agrees,
    degrade_image,
    detect,
    detector_accuracy,
    satisfies,
)
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, KINDS, SHAPES, SIZES, Object, Scene, make_scene

CIRCLE = Object("circle", "red", "large", 18.0, 30.0)
STAR = Object("star", "blue", "small", 45.0, 32.0)
PAIR = Scene("gray", (CIRCLE, STAR), "two")


def test_real_renders_are_read_right() -> None:
    assert detector_accuracy(500, degrade=False, seed=1) >= 0.999


def test_degraded_renders_are_read_right() -> None:
    assert detector_accuracy(500, degrade=True, seed=2) >= 0.99


def test_every_look_is_read_right_on_every_background() -> None:
    for background in BACKGROUNDS:
        for color in COLORS:
            for index, shape in enumerate(SHAPES):
                size = tuple(SIZES)[index % 2]
                scene = Scene(background, (Object(shape, color, size, 31.4, 33.7),), "single")
                assert agrees(detect(render(scene)), scene), scene


def test_centres_are_found_to_a_quarter_of_a_pixel() -> None:
    for seed in range(100):
        scene = make_scene(seed, kind="single")
        (found,) = detect(render(scene)).objects
        assert max(abs(found.x - scene.objects[0].x), abs(found.y - scene.objects[0].y)) < 0.25
        assert 0.9 < found.confidence <= 1


def test_a_degraded_image_is_really_degraded() -> None:
    image = render(PAIR)
    worse = degrade_image(image, np.random.default_rng(0))
    assert 14 < (worse[:10].astype(float) - image[:10]).std() < 18
    assert detect(worse).objects[0].confidence < detect(image).objects[0].confidence


# ---- what is wrong is seen to be wrong -------------------------------------------------------------------------------


def test_agreement_sees_each_change_of_a_scene() -> None:
    detection = detect(render(PAIR))
    assert agrees(detection, PAIR)
    wrong = [
        replace(PAIR, background="white"),
        replace(PAIR, objects=(CIRCLE,)),
        replace(PAIR, objects=(CIRCLE, STAR, replace(STAR, y=55.0))),
        *(
            replace(PAIR, objects=(replace(CIRCLE, **change), STAR))
            for change in ({"shape": "ring"}, {"color": "pink"}, {"size": "small"}, {"x": 20.0})
        ),
    ]
    assert not any(agrees(detection, scene) for scene in wrong)


def test_empty_and_flat_images_have_no_objects() -> None:
    for name, rgb in BACKGROUNDS.items():
        assert detect(np.full((64, 64, 3), rgb, np.uint8)) == Detection(name, ())
    assert detect(np.full((64, 64, 3), COLORS["red"], np.uint8)) == Detection(UNKNOWN, ())
    assert detect(np.full((64, 64, 3), (255, 0, 255), np.uint8)).background == UNKNOWN


def test_specks_are_ignored_and_patches_are_not() -> None:
    image = render(PAIR)
    image[5:8, 50:53] = COLORS["green"]
    assert agrees(detect(image), PAIR)
    image[5:9, 50:58] = COLORS["green"]
    assert len(detect(image).objects) == 3


def test_what_is_no_shape_or_no_color_of_this_world_is_unknown() -> None:
    image = np.full((64, 64, 3), BACKGROUNDS["gray"], np.uint8)
    image[30:34, 5:59] = COLORS["red"]
    (bar,) = detect(image).objects
    assert (bar.shape, bar.color) == (UNKNOWN, "red")
    odd = render(replace(PAIR, objects=(CIRCLE,)))
    odd[(odd == COLORS["red"]).all(-1)] = (0, 0, 0)
    (found,) = detect(odd).objects
    assert found.color == UNKNOWN


def test_objects_that_touch_are_not_passed() -> None:
    touching = Scene("gray", (CIRCLE, replace(CIRCLE, x=CIRCLE.x + 17)), "count")
    right, parts = satisfies(detect(render(touching)), parse("two red circles"))
    assert not right and not parts["count"]


def test_noise_is_no_scene() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert all(found.shape == UNKNOWN for found in detect(noise).objects)


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3)), np.zeros((32, 32, 3), np.uint8)]
)
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected a uint8 image"):
        detect(image)


# ---- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_satisfies_all_its_captions(kind: str) -> None:
    rng = np.random.default_rng(0)
    for seed in range(30):
        scene = make_scene(seed, kind=kind, combinations="any")
        detection = detect(render(scene))
        for text in (caption(scene, rng), caption(scene, rng, color=False), describe(scene)):
            assert satisfies(detection, parse(text)) == (True, dict.fromkeys(PARTS, True)), text


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_an_edited_scene_no_longer_satisfies_its_description(kind: str) -> None:
    rng = np.random.default_rng(0)
    for seed in range(40):
        scene = make_scene(seed, kind="multi")
        if kind in edit_kinds(scene):
            target = make_edit(scene, rng, kind).target
            assert satisfies(detect(render(target)), parse(describe(target)))[0]
            assert not satisfies(detect(render(target)), parse(describe(scene)))[0]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("a red circle and a blue star", set()),
        ("a large red circle and a small blue star on a gray background", set()),
        ("a red circle to the left of a blue star", set()),
        ("a blue star to the right of a red circle", set()),
        ("a circle and a star", set()),
        ("a red circle and a blue star on a white background", {"background"}),
        ("a red circle", {"count"}),
        ("a red circle, a blue star and a green ring", {"count", "shape", "color", "size"}),
        ("two red circles", {"shape", "color", "size"}),
        ("a red ring and a blue star", {"shape", "color", "size"}),
        ("a blue circle and a red star", {"color"}),
        ("a small red circle and a large blue star", {"size"}),
        ("a blue star to the left of a red circle", {"position"}),
        ("a red circle above a blue star", {"position"}),
    ],
)
def test_the_parts_that_are_wrong_are_named(text: str, wrong: set[str]) -> None:
    right, parts = satisfies(detect(render(PAIR)), parse(text))
    assert {name for name, value in parts.items() if not value} == wrong
    assert right == (not wrong)


def test_parts_that_hold_apart_may_fail_together() -> None:
    """A large red and a small blue circle are no large blue and small red one, though each part is there."""
    objects = (
        DetectedObject("circle", "red", "large", 15, 32, 1.0),
        DetectedObject("circle", "blue", "small", 45, 32, 1.0),
    )
    right, parts = satisfies(Detection("gray", objects), parse("a large blue circle and a small red circle"))
    assert all(parts.values()) and not right
    assert satisfies(Detection("gray", objects), parse("a small blue circle and a large red circle"))[0]
    assert not satisfies(Detection("gray", objects), parse("a blue circle to the left of a red circle"))[0]


def test_the_relation_must_hold_for_all_of_a_group() -> None:
    rings = tuple(DetectedObject("ring", "red", "small", x, 50, 1.0) for x in (10, 30, 50))
    cross = DetectedObject("cross", "blue", "small", 30, 15, 1.0)
    assert satisfies(Detection("gray", (*rings, cross)), parse("a cross above three rings"))[0]
    low = replace(rings[0], y=17)
    assert not satisfies(Detection("gray", (low, *rings[1:], cross)), parse("a cross above three rings"))[0]


def test_unknown_objects_satisfy_nothing() -> None:
    objects = (DetectedObject(UNKNOWN, "red", "large", 30, 30, 0.4),)
    assert not satisfies(Detection("gray", objects), parse("a circle"))[0]
    assert not satisfies(
        Detection(UNKNOWN, (DetectedObject("ring", "red", "large", 30, 30, 1.0),)), parse("a ring on a gray background")
    )[0]
