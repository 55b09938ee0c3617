"""Truths about scenes: what the world allows, what it holds out, and that a seed always gives the same scene."""

from collections import Counter

import pytest

from spar.worlds.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_PAIRS,
    HELD_OUT_POSITION_SHAPES,
    KINDS,
    OPPOSITE,
    SEED_RANGES,
    SHAPES,
    SIDE,
    SIZES,
    holds,
    is_clear,
    is_held_out,
    main_relation,
    make_scene,
)

SEEDS = range(300)


def test_a_seed_is_a_scene_for_ever() -> None:
    scene = make_scene(7)
    assert scene == make_scene(7)
    assert scene.kind == "position" and scene.background == "brown"
    looks = [(item.size, item.color, item.shape, round(item.x, 3), round(item.y, 3)) for item in scene.objects]
    assert looks == [("large", "pink", "star", 51.153, 38.468), ("large", "orange", "triangle", 26.072, 32.783)]
    assert len({make_scene(seed) for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("combinations", ["seen", "held_out", "any"])
def test_objects_lie_inside_and_apart(kind: str, combinations: str) -> None:
    for seed in SEEDS:
        objects = make_scene(seed, kind=kind, combinations=combinations).objects
        for index, item in enumerate(objects):
            radius = SIZES[item.size]
            assert radius <= item.x <= SIDE - radius and radius <= item.y <= SIDE - radius
            for other in objects[:index]:
                distance = ((item.x - other.x) ** 2 + (item.y - other.y) ** 2) ** 0.5
                assert distance >= radius + SIZES[other.size] + 2


def test_a_kind_is_what_it_says() -> None:
    counts = Counter()
    for seed in SEEDS:
        for kind in KINDS:
            scene = make_scene(seed, kind=kind)
            objects = scene.objects
            shapes, colors = {item.shape for item in objects}, {item.color for item in objects}
            looks = {(*item.pair, item.size) for item in objects}
            counts[kind, len(objects)] += 1
            assert scene.kind == kind
            if kind in ("single", "count"):
                assert len(looks) == 1
            elif kind == "two":
                assert len(shapes) == 2
            else:
                assert len(shapes) == len(colors) == len(objects)
            if kind == "position":
                assert is_clear(*objects)
    assert {kind: sorted(n for k, n in counts if k == kind) for kind in KINDS} == {
        "single": [1],
        "two": [2],
        "count": [2, 3, 4],
        "position": [2],
        "multi": [3, 4],
    }
    assert min(counts["count", n] for n in (2, 3, 4)) > 0.25 * len(SEEDS)


def test_training_never_shows_what_is_held_out() -> None:
    for seed in range(2000):
        scene = make_scene(seed)
        assert not is_held_out(scene)
        assert not HELD_OUT_PAIRS & {item.pair for item in scene.objects}
        if scene.kind == "position":
            assert {item.shape for item in scene.objects} != HELD_OUT_POSITION_SHAPES


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_scenes_always_need_something_new(kind: str) -> None:
    for seed in SEEDS:
        scene = make_scene(seed, kind=kind, combinations="held_out")
        pairs = {item.pair for item in scene.objects}
        assert is_held_out(scene)
        if kind == "position":  # only the pair of shapes is new, so that it is measured alone
            assert {item.shape for item in scene.objects} == HELD_OUT_POSITION_SHAPES
            assert not pairs & HELD_OUT_PAIRS
        else:
            assert pairs & HELD_OUT_PAIRS


def test_every_word_stays_common_in_training() -> None:
    seen: Counter[str] = Counter()
    scenes = [make_scene(seed) for seed in range(3000)]
    for item in (item for scene in scenes for item in scene.objects):
        seen.update([item.shape, item.color, item.size])
    objects = sum(len(scene.objects) for scene in scenes)
    assert min(seen[shape] for shape in SHAPES) > 0.8 * objects / len(SHAPES)
    assert min(seen[color] for color in COLORS) > 0.8 * objects / len(COLORS)
    assert min(seen[size] for size in SIZES) > 0.45 * objects
    backgrounds = Counter(scene.background for scene in scenes)
    assert min(backgrounds[name] for name in BACKGROUNDS) > 0.8 * len(scenes) / len(BACKGROUNDS)
    assert Counter(shape for _, shape in HELD_OUT_PAIRS) == Counter(SHAPES)


def test_seed_ranges_are_disjoint() -> None:
    ranges = sorted(SEED_RANGES.values())
    assert all(first[1] <= second[0] for first, second in zip(ranges, ranges[1:], strict=False))


def test_relations_are_antisymmetric_and_agree() -> None:
    for seed in SEEDS:
        first, second = make_scene(seed, kind="position").objects
        name = main_relation(first, second)
        assert holds(name, first, second) and holds(OPPOSITE[name], second, first)
        assert not holds(OPPOSITE[name], first, second) and not holds(name, second, first)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of .*'three'"):
        make_scene(0, kind="three")
    with pytest.raises(ValueError, match="combinations must be one of .*'new'"):
        make_scene(0, combinations="new")
