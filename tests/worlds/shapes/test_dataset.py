"""Truths about the training data: a function of the index alone, and dense targets that agree with the image."""

from collections import Counter

import numpy as np
import pytest

from spar.worlds.shapes.dataset import (
    BACKGROUND_IDS,
    COLOR_IDS,
    SHAPE_IDS,
    SIZE_IDS,
    dense_targets,
    sample_at,
    scene_at,
    seed_at,
)
from spar.worlds.shapes.render import coverages, render
from spar.worlds.shapes.scene import KINDS, SEED_RANGES, SHAPES, Object, Scene, is_held_out, make_scene


def test_a_scene_depends_on_split_and_index_alone() -> None:
    forward = [scene_at("train", index) for index in range(50)]
    backward = [scene_at("train", index) for index in reversed(range(50))]
    assert forward == backward[::-1]
    sample = sample_at("validation", 3)
    assert sample.scene == make_scene(sample.seed) == scene_at("validation", 3)
    assert (sample.image == render(sample.scene)).all()


def test_splits_never_meet() -> None:
    scenes = {split: {scene_at(split, index) for index in range(200)} for split in SEED_RANGES}
    assert not scenes["train"] & scenes["validation"]
    assert not scenes["train"] & scenes["benchmark"]
    assert not scenes["validation"] & scenes["benchmark"]
    assert seed_at("train", SEED_RANGES["train"][1] - 1) < seed_at("validation", 0) < seed_at("benchmark", 0)


def test_kinds_come_by_weight() -> None:
    weights = {"single": 1.0, "multi": 3.0, "two": 0.0}
    kinds = Counter(scene_at("train", index, weights).kind for index in range(800))
    assert set(kinds) == {"single", "multi"}
    assert abs(kinds["multi"] / 800 - 0.75) < 0.05
    for kind in KINDS:
        assert scene_at("train", 5, {kind: 0.1}) == make_scene(5, kind=kind)


def test_combinations_are_passed_on() -> None:
    assert not any(is_held_out(scene_at("benchmark", index)) for index in range(100))
    assert all(is_held_out(scene_at("benchmark", index, combinations="held_out")) for index in range(100))


@pytest.mark.parametrize("weights", [{}, {"single": 0.0}, {"single": -1.0, "multi": 2.0}, {"many": 1.0}])
def test_bad_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="kind_weights must be"):
        scene_at("train", 0, weights)


def test_bad_splits_and_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of .*'test'"):
        scene_at("test", 0)
    for index in (-1, 10**9):
        with pytest.raises(ValueError, match="index must be in"):
            scene_at("train", index)


# ---- dense targets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [4, 8, 16])
def test_dense_targets_are_what_each_cell_shows(grid: int) -> None:
    cell = 64 // grid
    count = 0
    for seed in range(30):
        scene = make_scene(seed, combinations="any")
        targets, covered = dense_targets(scene, grid), coverages(scene)
        for at in np.ndindex(grid, grid):
            rows, columns = (slice(index * cell, (index + 1) * cell) for index in at)
            shares = [float(plane[rows, columns].mean()) for plane in covered]
            best = int(np.argmax(shares))
            expected: tuple[float, ...] = (0, 0, 0, 0.0, 0.0)
            if shares[best] >= 0.25:
                item = scene.objects[best]
                ids = SHAPE_IDS[item.shape], COLOR_IDS[item.color], SIZE_IDS[item.size]
                expected = (*ids, item.x / 64, item.y / 64)
                count += 1
            got = (*(targets[name][at] for name in ("shape", "color", "size")), *targets["center"][at])
            assert got == pytest.approx(expected)
            assert targets["coverage"][at] == pytest.approx(sum(shares), abs=1e-5)
    assert count > 20


def test_every_object_has_targets_of_its_size() -> None:
    for seed in range(300):
        scene = make_scene(seed)
        targets = dense_targets(scene)
        found = set(
            zip(*(targets[name][targets["shape"] > 0].tolist() for name in ("shape", "color", "size")), strict=True)
        )
        looks = {(SHAPE_IDS[item.shape], COLOR_IDS[item.color], SIZE_IDS[item.size]) for item in scene.objects}
        assert found <= looks
        large = {look for look in looks if look[2] == SIZE_IDS["large"]}
        assert large <= found
        assert (targets["background"] == BACKGROUND_IDS[scene.background]).all()


def test_total_coverage_is_the_objects_area() -> None:
    scene = Scene("navy", (Object("square", "red", "large", 32.0, 32.0),), "single")
    assert dense_targets(scene)["coverage"].sum() * 64 == pytest.approx((2 * 0.707 * 10.5) ** 2, rel=0.01)
    assert dense_targets(scene, 1)["coverage"][0, 0] == pytest.approx((2 * 0.707 * 10.5) ** 2 / 4096, rel=0.01)


def test_an_empty_scene_has_nothing_but_its_background() -> None:
    targets = dense_targets(Scene("white", (), "single"))
    assert (targets["background"] == BACKGROUND_IDS["white"]).all()
    assert not any(targets[name].any() for name in ("shape", "color", "size", "center", "coverage"))


def test_ids_start_at_one_and_types_are_as_said() -> None:
    assert list(SHAPE_IDS.values()) == list(range(1, len(SHAPES) + 1))
    targets = dense_targets(make_scene(0))
    assert {name: str(value.dtype) for name, value in targets.items()} == {
        "shape": "int64",
        "color": "int64",
        "size": "int64",
        "background": "int64",
        "center": "float32",
        "coverage": "float32",
    }
    with pytest.raises(ValueError, match="grid must divide 64, got 7"):
        dense_targets(make_scene(0), 7)
