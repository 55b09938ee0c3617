"""GenEval's rules on boxes, worked out by hand, and on the shapes world with its own detector in place of COCO's."""

import json

import numpy as np
import pytest
from PIL import Image

from spar.common.errors import InputError
from spar.evaluation.geneval import Box, judge, relations, score, summary
from spar.inference.image_files import save_images
from spar.worlds.shapes.dataset import scene_at
from spar.worlds.shapes.detector import detect
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import SIZES


def box(x: float, y: float, side: float = 10, confidence: float = 0.95) -> Box:
    return Box(x - side / 2, y - side / 2, x + side / 2, y + side / 2, confidence)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (30, 0, {"right of"}), (-30, 0, {"left of"}), (0, 30, {"below"}), (0, -30, {"above"}),
        (30, 30, {"right of", "below"}),  # shrunk by 2: 28 / 42.4 = 0.66 on both axes
        (30, 16, {"right of"}),  # 14 / 34 = 0.41
        (30, 21, {"right of", "below"}),  # 19 / 36.6 = 0.519
        (2, 0, set()), (2.5, 0, set()),  # 0, and 0.5 / 2.5 = 0.2
        (4.1, 0, {"right of"}),  # 2.1 / 4.1 = 0.512
        (0, 0, set()),
    ],
)  # fmt: skip
def test_a_relation_is_an_offset_less_a_tenth_of_both_sides(x, y, expected):
    assert relations(box(50 + x, 50 + y), box(50, 50)) == expected


def entry(tag: str = "single_object", exclude: list | None = None, **wanted) -> dict:
    more = {} if exclude is None else {"exclude": exclude}
    return {"tag": tag, "include": [{"class": "dog", "count": 1, **wanted}], "prompt": "a dog", **more}


def red(_name: str, _box: Box) -> str:
    return "red"


def verdict(one: dict, found: dict, color_of=red) -> tuple[bool, str]:
    seen = judge(one, found, color_of)
    return seen.correct, "; ".join(seen.reasons)


def test_objects_are_counted_above_a_confidence():
    assert verdict(entry(), {"dog": [box(0, 0, confidence=0.31)]}) == (True, "")
    assert verdict(entry(), {"dog": [box(0, 0, confidence=0.3)]}) == (False, "expected dog>=1, found 0")
    assert verdict(entry(), {"cat": [box(0, 0)]}) == (False, "expected dog>=1, found 0")
    assert verdict(entry(count=2), {"dog": [box(0, 0)]}) == (False, "expected dog>=2, found 1")
    assert verdict(entry(), {"dog": [box(0, 0)] * 5})[0]  # more is no fault by itself


def test_counting_wants_the_exact_number_of_sure_objects():
    counting = entry("counting", [{"class": "dog", "count": 3}], count=2)
    sure, unsure = box(0, 0, confidence=0.91), box(0, 0, confidence=0.9)
    assert verdict(counting, {"dog": [sure] * 2 + [unsure] * 4})[0]
    assert verdict(counting, {"dog": [sure] * 3}) == (False, "expected dog<3, found 3")
    assert verdict(counting, {"dog": [sure, unsure]}) == (False, "expected dog>=2, found 1")
    many = entry("single_object", [{"class": "dog", "count": 17}])
    assert verdict(many, {"dog": [sure] * 40})[0]  # sixteen are looked at


def test_the_surest_objects_have_the_colour():
    def by_place(_name: str, one: Box) -> str:
        return "red" if one.left < 0 else "blue"

    boxes = [box(50, 0, confidence=0.6), box(-50, 0, confidence=0.9)]
    assert verdict(entry("colors", color="red"), {"dog": boxes}, by_place) == (True, "")
    assert verdict(entry("colors", color="blue"), {"dog": boxes}, by_place) == (False, "expected blue dog>=1, found 0")
    assert not verdict(entry("colors", color="red", count=2), {"dog": boxes}, by_place)[0]


def test_a_position_holds_between_all_pairs_and_wants_a_matched_target():
    both = {
        "tag": "position", "prompt": "a dog right of a cat",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
    }  # fmt: skip
    cat, dog = box(20, 50), box(80, 50)
    assert verdict(both, {"cat": [cat], "dog": [dog]}) == (True, "")
    assert verdict(both, {"cat": [dog], "dog": [cat]}) == (False, "expected dog right of target")
    assert verdict(both, {"dog": [dog]}) == (False, "expected cat>=1, found 0; no target for dog to be right of")
    both["include"][1]["count"] = 2
    assert not verdict(both, {"cat": [cat], "dog": [dog, box(20, 90)]})[0]  # one of the two is below the cat


def test_the_summary_is_the_mean_of_the_tasks():
    rows = [("a", 1), ("a", 0), ("a", 0), ("a", 0), ("b", 1)]
    results = [{"tag": tag, "correct": bool(correct)} for tag, correct in rows]
    assert summary(results) == {"a": 0.25, "b": 1.0, "overall": 0.625}


def test_a_folder_is_scored_with_a_detector_of_the_callers(tmp_path):
    """The shapes world's own detector and renders, whose contents are known."""

    def found(image) -> dict[str, list[Box]]:
        boxes: dict[str, list[Box]] = {}
        for one in detect(np.asarray(image)).objects:
            side = SIZES[one.size]
            boxes.setdefault(one.shape, []).append(Box(one.x - side, one.y - side, one.x + side, one.y + side, 0.99))
        return boxes

    def color_of(image, name, one) -> str:
        objects = detect(np.asarray(image)).objects
        return next(o.color for o in objects if o.shape == name and abs(o.x - one.left - SIZES[o.size]) < 1e-6)

    expected = []
    for number in range(6):
        scene = scene_at("validation", number, {"single": 1.0})
        (item,) = scene.objects
        color = item.color if number % 2 else next(c for c in ("red", "blue") if c != item.color)
        place = tmp_path / f"{number:05}"
        (place / "samples").mkdir(parents=True)
        line = {"tag": "colors", "prompt": "", "include": [{"class": item.shape, "count": 1, "color": color}]}
        (place / "metadata.jsonl").write_text(json.dumps(line) + "\n")
        save_images([Image.fromarray(render(scene))], [place / "samples" / "00000.png"])
        expected.append(bool(number % 2))
    results = score(tmp_path, found, color_of)
    assert [one["correct"] for one in results] == expected
    assert summary(results) == {"colors": 0.5, "overall": 0.5}
    assert results[0]["reason"].startswith("expected ") and json.loads(results[0]["metadata"])["tag"] == "colors"
    (tmp_path / "00003" / "samples" / "00000.png").unlink()
    with pytest.raises(InputError, match="samples: expected images"):
        score(tmp_path, found, color_of)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="expected folders of prompts"):
        score(tmp_path / "none", found, color_of)
