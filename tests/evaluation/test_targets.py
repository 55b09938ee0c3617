"""The table of scores and its verdicts."""

import pytest

from spar.evaluation.options import BEFORE_SWAP
from spar.evaluation.results import Result, Score
from spar.evaluation.targets import (
    RECIPE_TARGETS,
    TARGETS,
    Target,
    find_target,
    main_scores,
    scores_table,
    show,
    swap_change,
    targets_of,
    verdict,
)


def result(benchmark, *scores, **settings):
    made = tuple(Score(name, value, value - 0.02, value + 0.02, 50) for name, value in scores)
    return Result(benchmark, made, settings)


@pytest.mark.parametrize(
    ("low", "value", "high", "expected"),
    [
        (0.91, 0.95, 0.97, "reached"),
        (0.88, 0.91, 0.93, "reached, not certain"),
        (0.85, 0.89, 0.92, "short, not certain"),
        (0.70, 0.75, 0.80, "short"),
        (0.90, 0.90, 0.90, "reached"),
    ],
)
def test_the_verdict_follows_from_the_interval(low, value, high, expected):
    assert verdict(Score("overall", value, low, high, 9), Target("x", "overall", 0.9)) == expected


def test_targets_depend_on_the_combinations():
    seen = result("shapes-gen", ("overall", 0.8))
    held_out = result("shapes-gen", ("overall", 0.8), combinations="held_out")
    assert find_target(seen, seen.scores[0]).at_least == 0.95
    assert find_target(held_out, held_out.scores[0]).at_least == 0.94
    assert find_target(result("shapes-gen", ("colors", 1.0)), Score("colors", 1, 1, 1, 1)) is None


def test_a_model_of_dualtoken_has_targets_of_its_own():
    own = result("shapes-gen", ("overall", 0.8), model={"recipe": "dualtoken-shapes"})
    assert find_target(own, own.scores[0]).at_least == 0.8
    assert find_target(own, own.scores[0], TARGETS).at_least == 0.95
    codes = result("shapes-codes", ("semantic.perplexity.4", 0.6), model={"recipe": "dualtoken-shapes"})
    assert find_target(codes, codes.scores[0]).at_least == 0.5
    assert targets_of(result("shapes-gen")) == targets_of(result("shapes-gen", model={"recipe": "shapes"})) == TARGETS


def test_the_targets_are_the_issue_s():
    """The bundle's at least as high as the recipe's, each score once."""
    both = [{(t.benchmark, t.score, t.combinations): t.at_least for t in given} for given in (TARGETS, RECIPE_TARGETS)]
    bundle, recipe = both
    assert len(bundle) == len(TARGETS) == 15 and len(recipe) == len(RECIPE_TARGETS) == 11
    assert all(bundle[key] > value for key, value in recipe.items())
    assert bundle["shapes-edit", "replace", "seen"] == 0.9 and bundle["shapes-recon", "psnr", "seen"] == 33.5


def test_the_table_shows_main_scores_with_their_baselines():
    vqa = result("shapes-vqa", ("overall", 0.98), ("blind.overall", 0.3), ("gray.overall", 0.2), ("part.x", 0.1))
    recon = result("shapes-recon", ("psnr", 34.56), ("frechet", 0.01234))
    text = scores_table([vqa, recon])
    lines = text.splitlines()
    assert len(lines) == 5 and text.endswith("|\n")
    assert all(line.count("|") == 7 for line in lines)
    assert "overall (blind 0.300, gray 0.200)" in lines[2] and "0.960 to 1.000" in lines[2]
    assert "≥ 0.99: short, not certain" in lines[2]
    assert "34.6 dB" in lines[3] and "34.5 to 34.6 dB" in lines[3] and "≥ 33.5: reached" in lines[3]
    assert "0.0123" in lines[4]
    assert [score.name for score in main_scores(vqa)] == ["overall"]


def test_a_label_cannot_break_the_table():
    line = scores_table([result("shapes-gen", ("overall", 1.0), label="a|b")]).splitlines()[2]
    assert "a\\|b" in line


@pytest.mark.parametrize(("after", "expected"), [(0.965, "reached"), (0.95, "short")])
def test_the_swap_is_reported_when_both_are_there(after, expected):
    before = result("shapes-vqa", ("overall", 0.97), label=BEFORE_SWAP)
    own = result("shapes-vqa", ("overall", after))
    assert swap_change([own]) is None and swap_change([before]) is None
    assert [score.value for score in swap_change([own, before])] == [0.97, after]
    last = scores_table([own, before]).splitlines()[-1]
    assert f"{100 * (after - 0.97):+.1f} points" in last and f"within 1 point: {expected}" in last


def test_values_are_shown_in_their_own_units():
    assert show("psnr_outside", 31.26) == "31.3 dB"
    assert show("gray.overall", 0.12345) == "0.123"
    assert show("frechet", 0.000012345) == "1.23e-05"
