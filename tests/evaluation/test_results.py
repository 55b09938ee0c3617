"""Scores, intervals and results files."""

import json

import numpy as np
import pytest

from spar.common.errors import InputError
from spar.evaluation.results import Result, Score, bootstrap, mean_score, ratio_score, read_result, write_result

RESULT = Result(
    "shapes-gen",
    (Score("overall", 0.5, 0.4, 0.6, 100), Score("part.color", 1, 0.9, 1.0, 3)),
    {"seed": 0, "detector": {"version": "1", "accuracy": 0.999}, "limit": None},
    {"prompts": [{"prompt": "a red circle", "right": [1, 0]}]},
)


def test_a_result_comes_back_from_its_file(tmp_path):
    path = tmp_path / "new" / "scores.json"
    write_result(path, RESULT)
    assert read_result(path) == RESULT
    assert [file.name for file in path.parent.iterdir()] == ["scores.json"]


def test_a_result_that_is_not_finite_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError):
        write_result(tmp_path / "scores.json", Result("x", (Score("a", float("nan"), 0, 1, 1),)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", '{"benchmark": "x"}', '{"benchmark": "x", "scores": [{"nam": 1}]}'])
def test_a_foreign_file_is_refused(tmp_path, text):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(InputError):
        read_result(path)


def test_an_unwritable_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_result(tmp_path / "file" / "scores.json", RESULT)


def test_the_file_is_plain_json(tmp_path):
    write_result(tmp_path / "scores.json", RESULT)
    assert json.loads((tmp_path / "scores.json").read_text())["scores"][0]["high"] == 0.6


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    score = mean_score("x", values)
    half = 1.96 * values.std() / 20
    assert score.value == pytest.approx(values.mean())
    assert (score.low, score.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert score == mean_score("x", values)
    assert score != mean_score("x", values, seed=1)


def test_the_interval_covers_the_truth_in_about_95_of_100_samples():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(150):
        values = rng.random(60) < 0.7
        low, high = bootstrap(lambda index, values=values: values[index].mean(), 60, draws=200)
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 150 <= 1.0


def test_groups_weigh_alike_and_are_resampled_apart():
    score = mean_score("x", np.ones(10), np.zeros(1000))
    assert (score.value, score.low, score.high, score.n) == (0.5, 0.5, 0.5, 1010)


def test_where_all_are_right_the_interval_is_exact():
    score = mean_score("x", np.ones(100))
    assert score.value == score.high == 1.0
    assert score.low == pytest.approx(0.025 ** (1 / 100))
    none = ratio_score("x", [0, 0], [3, 1])
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.025**0.5)


def test_a_ratio_weighs_things_not_their_holders():
    assert ratio_score("x", [1, 0, 4], [1, 1, 4]).value == pytest.approx(5 / 6)


def test_a_name_that_is_not_there_lists_those_that_are():
    assert RESULT.score("overall").value == 0.5
    with pytest.raises(KeyError, match="part.color"):
        RESULT.score("color")


def test_a_score_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        mean_score("x", [])
