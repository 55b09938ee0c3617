"""What the benchmarks make of a pipe that is always right, one that shows gray, and one with planted errors."""

import json
from dataclasses import asdict

import pytest

from spar.evaluation.benchmarks import BENCHMARKS
from spar.evaluation.options import EvalOptions
from spar.evaluation.results import read_result, write_result
from spar.evaluation.targets import BASELINES, main_scores

SMALL = EvalOptions(limit=4, images_per_prompt=2, batch=7)
OF_DUALTOKEN = ("shapes-zero-shot", "shapes-codes", "shapes-agreement")  # tests/evaluation/test_dualtoken_benchmarks.py
COMMON = [name for name in BENCHMARKS if name not in (*OF_DUALTOKEN, "shapes-robust")]
SHARES = {name: "survival" if name == "shapes-recon" else "overall" for name in COMMON}


@pytest.mark.parametrize("combinations", ["seen", "held_out"])
@pytest.mark.parametrize("name", COMMON)
def test_the_oracle_is_right(name, combinations, oracle, tmp_path):
    options = EvalOptions(limit=4, images_per_prompt=2, batch=7, combinations=combinations)
    steps = []
    result = BENCHMARKS[name](oracle(options), options, lambda done, total: steps.append((done, total)))
    for score in result.scores:
        if not score.name.startswith(BASELINES):
            expected = 100.0 if "psnr" in score.name else {"frechet": 0.0}.get(score.name, 1.0)
            tolerance = 0.03 if score.name == "part.fidelity" else 1e-6  # of a template at the next quarter of a pixel
            assert score.value == pytest.approx(expected, abs=tolerance), score
    assert steps[-1][0] == steps[-1][1] and len(steps) > 1 or name == "shapes-recon"
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result


@pytest.mark.parametrize("name", COMMON)
def test_gray_is_worth_nothing(name, gray):
    result = BENCHMARKS[name](gray, SMALL, None)
    assert result.score(SHARES[name]).value <= (0.1 if name in ("shapes-vqa", "shapes-chat") else 0.0)
    if name == "shapes-vqa":  # it always says gray: right about some backgrounds, and the image makes no difference
        for score in main_scores(result):
            assert score.value == result.score(f"gray.{score.name}").value


@pytest.mark.parametrize("name", COMMON)
def test_planted_errors_are_found(name, oracle):
    options = EvalOptions(limit=30, images_per_prompt=2)
    error = 0.3
    result = BENCHMARKS[name](oracle(options, error), options, None)
    if name == "shapes-paraphrase":  # a share of a score with the same errors
        assert result.score("overall").low < 1 < result.score("overall").high
        assert result.score("part.edit_canonical").value == pytest.approx(1 - error, abs=0.09)
        return
    score = result.score(SHARES[name])
    assert score.value == pytest.approx(1 - error, abs=0.16 if name == "shapes-recon" else 0.09)
    assert score.low < score.value < score.high


def test_a_refused_prompt_is_wrong_and_the_others_are_drawn(oracle):
    options = EvalOptions(limit=2, images_per_prompt=3)
    pipe = oracle(options)
    before = BENCHMARKS["shapes-gen-bind"](pipe, options, None)
    assert before.score("overall").value == 1.0
    (first, *_) = before.details["prompts"]
    pipe.refused = {first["prompt"]}
    after = BENCHMARKS["shapes-gen-bind"](pipe, options, None)
    assert [one["right"] for one in after.details["prompts"]] == [[0, 0, 0], *[[1, 1, 1]] * 5]
    assert first["prompt"] not in pipe.calls[-1][1]
    pipe.refused = {one["prompt"] for one in before.details["prompts"]}
    nothing = BENCHMARKS["shapes-gen-bind"](pipe, options, None)
    assert nothing.score("overall").value == 0.0
    assert "part.fidelity" not in {score.name for score in nothing.scores}


def test_settings_say_how_it_was_measured(gray):
    given = {"num_inference_steps": 9, "guidance_scale": 2.5, "label": "first", "seed": 3}
    options = EvalOptions(limit=2, images_per_prompt=1, **given)
    recorded = BENCHMARKS["shapes-gen"](gray, options, None).settings
    wanted = {"steps": 9, "guidance": 2.5, "seed": 3, "size": 64, "label": "first"}
    assert {name: recorded[name] for name in wanted} == wanted
    detector = recorded["detector"]
    assert detector["version"] and detector["accuracy"] >= 0.99 and detector["n"] > 0
    assert recorded["machine"]["cpu"] and recorded["machine"]["cores"] >= 1 and recorded["versions"]["torch"]
    assert recorded["seconds"] >= 0
    json.dumps(recorded, allow_nan=False)


def test_scores_and_calls_do_not_depend_on_the_batch(oracle):
    found = []
    for batch in (1, 5, 64):
        options = EvalOptions(limit=2, images_per_prompt=2, batch=batch)
        pipe = oracle(options)
        result = BENCHMARKS["shapes-gen"](pipe, options, None)
        asked = [pair for call in pipe.calls for pair in zip(call[1], call[2], strict=True)]
        found.append((asked, [asdict(score) for score in result.scores]))
        assert max(len(call[1]) for call in pipe.calls) <= batch
    assert found[0] == found[1] == found[2]


def test_sampling_options_reach_the_pipe(oracle):
    options = EvalOptions(limit=1, images_per_prompt=1, num_inference_steps=3, guidance_scale=1.5)
    pipe = oracle(options)
    for name in ("shapes-gen", "shapes-edit"):
        BENCHMARKS[name](pipe, options, None)
    assert len(pipe.calls) == 2
    assert all(call[3] == {"num_inference_steps": 3, "guidance_scale": 1.5} for call in pipe.calls)


def test_every_image_has_a_seed_of_its_own_that_the_run_seed_moves(oracle):
    def seeds(seed):
        options = EvalOptions(limit=3, images_per_prompt=4, seed=seed)
        pipe = oracle(options)
        BENCHMARKS["shapes-gen"](pipe, options, None)
        return [one for call in pipe.calls for one in call[2]]

    first, second = seeds(0), seeds(1)
    assert len(set(first)) == len(first) == 6 * 3 * 4
    assert not set(first) & set(second)
    assert first == seeds(0)
