"""Two models on the same prompts: planted differences, none where there is none, and refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest

from spar.cli.main import main
from spar.common.errors import InputError
from spar.evaluation.compare import Difference, compare, holm_corrected, units
from spar.evaluation.results import Result, mean_score, write_result


def gen(rows, **settings):
    """A result of Shapes-Gen with these outcomes by task, each a list of the images of one prompt."""
    records = [
        {"task": task, "prompt": f"{task} {number}", "right": right}
        for task, prompts in rows.items() for number, right in enumerate(prompts)
    ]  # fmt: skip
    scores = (mean_score("overall", *([np.mean(one) for one in prompts] for prompts in rows.values())),)
    return Result("shapes-gen", scores, {"seed": 0, "images_per_prompt": 4, **settings}, {"prompts": records})


def vqa(answers, benchmark="shapes-vqa"):
    records = [
        {"kind": "count", "question": f"question {number}", "expected": "two", "answer": given}
        for number, given in enumerate(answers)
    ]
    return Result(benchmark, (mean_score("overall", [0.0]),), {"seed": 0}, {"questions": records})


def test_the_difference_is_that_of_the_scores_and_each_task_s_own():
    first = gen({"counting": [[1, 1, 0, 0]] * 10, "colors": [[1, 1, 1, 1]] * 10})
    second = gen({"counting": [[1, 1, 1, 0]] * 10, "colors": [[1, 1, 1, 0]] * 10})
    overall, counting, colors = compare(first, second)
    assert (overall.score, counting.score, colors.score) == ("overall", "counting", "colors")
    assert overall.value == pytest.approx(second.score("overall").value - first.score("overall").value) == 0.0
    assert (counting.first, counting.second, counting.value) == (0.5, 0.75, 0.25)
    assert colors.value == -0.25 and (counting.verdict, colors.verdict) == ("higher", "lower")
    assert overall.verdict.startswith("undecided") and overall.n == 20 and counting.n == 10


def test_a_pair_of_hard_and_easy_prompts_shows_what_two_intervals_would_hide():
    """Each prompt gains a little, though prompts differ by far more: the paired interval excludes 0."""
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 4, 80)
    first = gen({"counting": [[1] * k + [0] * (4 - k) for k in hard]})
    second = gen({"counting": [[1] * k + [0] * (4 - k) for k in hard + (np.arange(80) % 4 == 0)]})
    (difference,) = compare(first, second)
    assert difference.value == pytest.approx(20 / 80 / 4) and difference.low > 0 and difference.p < 0.01
    low, high = (np.std([np.mean(r["right"]) for r in one.details["prompts"]]) for one in (first, second))
    assert difference.high - difference.low < 0.5 * 3.92 * np.hypot(low, high) / 80**0.5


def test_the_interval_holds_the_truth_as_often_as_it_says_and_an_a_a_pair_is_undecided():
    rng, held, decided = np.random.default_rng(1), 0, 0
    for _ in range(200):
        level = rng.uniform(0.2, 0.8, 60)
        rows = [[[int(x) for x in rng.random(4) < p] for p in level] for _ in range(2)]
        (difference,) = compare(gen({"colors": rows[0]}), gen({"colors": rows[1]}))
        held += difference.low <= 0 <= difference.high
        decided += not difference.verdict.startswith("undecided")
    assert 0.9 <= held / 200 <= 0.99 and decided / 200 <= 0.1


def test_what_is_detectable_is_found_four_times_of_five():
    rng, found, detectable = np.random.default_rng(2), 0, []
    for _ in range(100):
        rows = [[[int(x)] for x in rng.random(100) < p] for p in (0.4, 0.4 + 0.194)]  # 2.8 * sqrt(2 * 0.24 / 100)
        (difference,) = compare(gen({"colors": rows[0]}), gen({"colors": rows[1]}))
        found += difference.verdict == "higher"
        detectable.append(difference.detectable)
    assert np.mean(detectable) == pytest.approx(0.194, abs=0.01) and 0.68 <= found / 100 <= 0.92


def test_a_large_effect_is_found_among_many_scores_and_no_p_is_below_what_the_prompts_allow():
    first, second = gen({"colors": [[0, 1]] * 100 + [[0, 0]] * 100}), gen({"colors": [[1, 1]] * 200})
    (one,) = compare(first, second)
    assert one.p < 1e-12 and {each.verdict for each in holm_corrected([one] * 60)} == {"higher"}
    (few,) = compare(gen({"colors": [[0]] * 11 + [[1]]}), gen({"colors": [[1]] * 11 + [[1]]}))
    assert few.p >= 2 * 0.5**12  # of all signs that eleven changes may have


def test_holm_s_correction_is_its_definition():
    def one(score, p):
        return Difference("x", score, 0.1, 0.2, 0.1, 0.05, 0.15, 9, p, 0.1)

    given = [one("overall", 0.04), one("colors", 0.04), one("overall", 0.01), one("psnr", 0.03)]
    found = holm_corrected(given)
    assert [d.p for d in found] == pytest.approx([0.06, 0.04, 0.03, 0.06])
    assert found[0].verdict.startswith("undecided") and given[0].verdict == "higher"
    assert [d.corrected for d in found] == [True, False, True, True]
    z = {0.05: 1.960, 0.05 / 3: 2.394}                                         # two-sided normal quantiles
    assert found[0].detectable == pytest.approx(0.1 * (z[0.05 / 3] + 0.842) / (z[0.05] + 0.842), rel=1e-3)
    assert found[1].detectable == 0.1 and holm_corrected([]) == []


def test_few_prompts_and_equal_models_decide_nothing():
    """Where all differences are alike the interval is the exact one, as that of a score of 0 or 1."""
    for n in (1, 3):
        (one,) = compare(gen({"colors": [[0]] * n}), gen({"colors": [[1]] * n}))
        assert one.verdict.startswith("undecided") and one.value == one.high == 1.0
        assert one.low == pytest.approx(0.025 ** (1 / n)) and one.p > 0.2
    (one,) = compare(gen({"colors": [[0]] * 12}), gen({"colors": [[1]] * 12}))
    assert one.verdict == "higher" and one.p < 0.01
    (same,) = compare(gen({"colors": [[1]] * 200}), gen({"colors": [[1]] * 200}))
    edge = 1 - 0.025 ** (1 / 200)
    assert (same.value, same.p) == (0.0, 1.0) and (-same.low, same.high) == pytest.approx((edge, edge))
    assert same.verdict == f"undecided (at least {edge:.2g} would show)"


def test_outcomes_of_every_kind_of_record_are_read():
    assert [value for _, value in units(vqa(["two", "Two.", "three"]))["count"]] == [1.0, 1.0, 0.0]
    recon = replace(vqa([]), benchmark="shapes-recon", details={"scenes": [{"psnr": 30.5}, {"psnr": 20.0}]})
    assert units(recon) == {"overall": [("0", 30.5), ("1", 20.0)]}
    labels = [{"image": "a.png", "expected": "a photo of a cat.", "answer": "a photo of a cat."}]
    shot = replace(recon, benchmark="zero-shot", details={"images": labels})
    assert units(shot) == {"overall": [("a.png | a photo of a cat.", 1.0)]}
    chat = {"questions": ["a", "b"], "expected": ["red", "two"], "answers": ["red", "three"]}
    (row,) = units(replace(recon, benchmark="shapes-chat", details={"conversations": [chat]}))["overall"]
    assert row[1] == 0.0 and "['a', 'b']" in row[0]
    (difference,) = compare(recon, replace(recon, details={"scenes": [{"psnr": 31.5}, {"psnr": 22.0}]}))
    assert (difference.score, difference.value) == ("psnr", 1.5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (vqa(["two"]), "the same benchmark, got 'shapes-gen' and 'shapes-vqa'"),
        (gen({"colors": [[1]] * 3}, seed=1), "the same seed, got 0 and 1"),
        (gen({"colors": [[1]] * 3}, combinations="held_out"), "the same combinations"),
        (gen({"colors": [[1]] * 2}), "the same prompts, got 3 and 2; the first that differ: 'colors 2' and none"),
        (gen({"counting": [[1]] * 3}), "the first that differ: 'colors 0' and 'counting 0'"),
        (replace(gen({"colors": [[1]]}), details={}), "the outcome of every prompt in the details, found none"),
        (replace(gen({"colors": [[1]]}), details={"n": 3}), "the outcome of every prompt in the details, found none"),
        (replace(gen({"colors": [[1]]}), details={"prompts": [{"answer": "x"}]}), "expected an outcome in record 0"),
        (replace(gen({"colors": [[1]]}), details={"prompts": [7]}), "expected an outcome in record 0 of the details"),
        (gen({"colors": [[1]] * 3}, detector={"version": 9}), "the same detector version, got None and 9"),
    ],
)
def test_results_that_are_no_pair_are_refused(other, message):
    with pytest.raises(InputError) as error:
        compare(gen({"colors": [[1]] * 3}), other)
    assert message in str(error.value)


def test_files_and_folders_are_compared_on_the_command_line(tmp_path, capsys):
    first, second = vqa(["two"] * 30 + ["one"] * 10), vqa(["two"] * 40)
    for folder, one in (("a", first), ("b", second)):
        write_result(tmp_path / folder / "shapes-vqa.json", one)
        write_result(tmp_path / folder / "shapes-codes.json", Result("shapes-codes", one.scores, {"seed": 0}))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    out, error = capsys.readouterr()
    (found,) = json.loads(out)
    assert found["value"] == 0.25 and found["verdict"] == "higher"
    assert "shapes-codes.json is not compared: shapes-codes: its score is no mean over prompts" in error
    write_result(tmp_path / "a" / "more.json", first)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "more.json is not compared: only one folder has it" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b" / "shapes-vqa.json")]) == 2
    assert "expected two results files or two folders of them" in capsys.readouterr().err
    files = [str(tmp_path / folder / "shapes-vqa.json") for folder in ("a", "b")]
    assert main(["compare", *files]) == 0 and "+0.25" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    assert "expected results files of the same names" in capsys.readouterr().err


def test_of_folders_what_differs_in_its_settings_is_left_out_and_said(tmp_path, capsys):
    for folder, images in (("a", 4), ("b", 1)):
        one = gen({"colors": [[1] * images] * 9}, images_per_prompt=images)
        write_result(tmp_path / folder / "shapes-gen.json", one)
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["compare", *both]) == 2
    said = "shapes-gen is not compared: expected two results of the same images_per_prompt, got 4 and 1"
    assert said in capsys.readouterr().err
    for folder in "ab":
        write_result(tmp_path / folder / "shapes-vqa.json", vqa(["two"] * 9))
    assert main(["compare", *both]) == 0
    out, error = capsys.readouterr()
    assert f"spar: note: {both[1]}: {said}" in error and "shapes-vqa" in out and "shapes-gen" not in out


@pytest.fixture
def three(tmp_path):
    """Files of three models, right in 30, 40 and 20 of 40 questions."""
    for name, right in (("a", 30), ("b", 40), ("c", 20)):
        write_result(tmp_path / f"{name}.json", vqa(["two"] * right + ["one"] * (40 - right)))
    return [str(tmp_path / f"{name}.json") for name in "abc"]


def test_several_models_are_compared_with_the_first_on_a_page(three, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare", *three, "--json", "--html", str(page)]) == 0
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert [(one["model"], one["value"]) for one in found] == [(three[1], 0.25), (three[2], -0.25)]
    assert all(one["corrected"] for one in found) and str(page) in error
    text = page.read_text()
    # Both intervals are drawn to the scale of the widest end.
    reach = max(abs(one[side]) for one in found for side in ("low", "high"))
    for one in found:
        assert f'cx="{80 * one["value"] / reach:.1f}"' in text and one["model"] in text
    assert "Drawings at equal seeds" not in text and three[0] in text
    assert main(["compare", *three, "--html", str(page)]) == 2 and "--overwrite" in capsys.readouterr().err
    assert main(["compare", *three, "--html", str(page), "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert "model" in shown and "-0.25" in shown


def test_the_page_has_what_each_model_draws(three, tmp_path, tiny_run, capsys):
    page, model = tmp_path / "page.html", str(tiny_run.path / "model")
    assert main(["compare", *three[:2], "--html", str(page), "--draw", model, "--draw", model]) == 0
    assert page.read_text().count("data:image/png") == 2 * 4
    for line, said in (
        (["--draw", model], "--draw: expected --html"),
        (["--html", str(tmp_path / "other.html"), "--draw", model], "a model for each of 2 results"),
    ):
        assert main(["compare", *three[:2], *line]) == 2 and said in capsys.readouterr().err
    assert main(["compare", three[0], three[0]]) == 2 and "results that differ" in capsys.readouterr().err
