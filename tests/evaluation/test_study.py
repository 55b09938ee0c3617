"""`spar study`: variants on seeds, resumed, compared with an A/A arm; its statistics on planted differences."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spar.checkpoints.bundled import bundled_folder
from spar.cli.main import main
from spar.common.errors import InputError
from spar.evaluation import study_run
from spar.evaluation.results import Result, Score, read_result
from spar.evaluation.study import (
    AGAIN,
    Study,
    arm_recipe,
    base_recipe,
    bundled_studies,
    own_stages,
    read_study,
    trainings,
)
from spar.evaluation.study_results import mean_curve, share_until
from spar.evaluation.study_run import StudyRun, run_study
from spar.evaluation.study_sharing import Training, take_over, training_keys
from spar.evaluation.study_statistics import difference, study_differences
from spar.recipes import REGISTRY, recipe
from spar.training.changes import changed_recipe
from spar.training.checkpoint import load_group
from spar.training.config import matches
from spar.training.initial_weights import load_initial_weights, random_modules
from spar.training.plan import read_run, resolve
from spar.training.stage_model import load_stage_model
from spar.training.trainer import check_patterns

# ---- statistics ------------------------------------------------------------------------------------------------------


def result(outcomes: np.ndarray, names: str = "prompt") -> Result:
    records = [{"prompt": f"{names} {i}", "right": [float(value)]} for i, value in enumerate(outcomes)]
    score = Score("overall", float(outcomes.mean()), 0.0, 1.0, len(outcomes))
    return Result("shapes-gen", (score,), {}, {"prompts": records})


def planted(effect: float, *, seeds: int = 3, prompts: int = 200, spread: float = 0.0, seed: int = 0) -> list[Result]:
    """Results of one prompt's difficulty each, moved by `effect` and by each seed's own luck."""
    hard = np.random.default_rng(9).random(prompts)
    rng = np.random.default_rng(seed)
    luck = spread * np.linspace(-1, 1, seeds)
    return [result((rng.random(prompts) < np.clip(hard + effect + luck[i], 0, 1)).astype(float)) for i in range(seeds)]


def test_a_planted_difference_is_found_and_none_is_not():
    base, better, same = planted(0.0), planted(0.2, seed=1), planted(0.0, seed=2)
    found = difference("better", base, better)
    assert found.verdict == "higher: better" and found.low > 0 and 0.05 < found.value < 0.25 and found.p < 0.05
    none = difference("same", base, same)
    assert none.low < 0 < none.high and none.verdict.startswith("undecided (at least 0.")
    assert len(found.by_seed) == 3 and found.value == pytest.approx(np.mean(found.by_seed))


def test_nothing_is_found_where_only_seeds_differ():
    """At most about one in twenty, though each seed's luck is larger than the prompts' noise."""
    rng, wrong = np.random.default_rng(3), 0
    for number in range(120):
        pair = [
            [result((rng.random(40) < np.clip(0.5 + luck, 0, 1)).astype(float)) for luck in rng.normal(0, 0.15, 3)]
            for _ in range(2)
        ]
        wrong += not difference("x", *pair, seed=number).verdict.startswith("undecided")
    assert wrong <= 12


def test_one_seed_decides_nothing_and_equal_results_are_no_difference():
    one = difference("x", planted(0.0, seeds=1), planted(0.5, seeds=1, seed=1))
    assert one.value > 0.2 and one.verdict == "undecided (one seed)"
    same = difference("x", planted(0.0), planted(0.0))
    assert (same.value, same.p) == (0, 1) and same.low < 0 < same.high and "at least 0.0" in same.verdict
    lower = difference("x", [loss(2.0), loss(2.1)], [loss(1.0), loss(1.1)])
    assert lower.verdict == "lower: better" and lower.n == 30


def loss(mean: float) -> Result:
    values = mean + np.random.default_rng(0).normal(0, 0.01, 30)
    records = [{"prompt": str(i), "loss": float(value)} for i, value in enumerate(values)]
    return Result("shapes-loss", (Score("overall", mean, 0.0, 1.0, 30),), {}, {"scenes": records})


def test_the_luck_of_seeds_widens_the_interval():
    steady, lucky = (difference("x", planted(0.0), planted(0.1, spread=s, seed=1)) for s in (0.0, 0.2))
    assert lucky.high - lucky.low > 1.5 * (steady.high - steady.low)


def test_holms_correction_leaves_the_aa_arm_out():
    arms = {"base": planted(0.0), AGAIN: planted(0.0, seed=5), "a": planted(0.06, seed=1), "b": planted(0.2, seed=2)}
    found = {one.arm: one for one in study_differences("base", {arm: {"gen": rows} for arm, rows in arms.items()})}
    strict = difference("a", arms["base"], arms["a"], comparisons=2)
    assert found["a"].main and found["a"].detectable == strict.detectable
    alone = {arm: difference(arm, arms["base"], arms[arm]) for arm in (AGAIN, "a", "b")}
    assert found[AGAIN] == alone[AGAIN]
    least, most = sorted(("a", "b"), key=lambda arm: alone[arm].p)
    assert found[least].p == pytest.approx(min(1, 2 * alone[least].p))
    assert found[most].p == pytest.approx(max(found[least].p, alone[most].p))
    assert found["a"].detectable > alone["a"].detectable


def test_other_prompts_or_seeds_are_not_compared():
    with pytest.raises(InputError, match="expected results of 3 seeds, got 2"):
        difference("x", planted(0.0), planted(0.0)[:2])
    with pytest.raises(InputError, match="the same prompts for every seed"):
        difference("x", [result(np.ones(3))], [result(np.ones(3), "other")])


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bundled_studies())
def test_bundled_studies_are_of_recipes_and_stages_that_there_are(name):
    one = read_study(Path(name))
    assert one.name == name and one.question.endswith("?") and len(one.variants) >= 2
    made = [arm_recipe(one, arm, 0, REGISTRY, recipe) for arm in one.arms]
    pairs = zip(one.arms, made, strict=True)
    differ = {(repr(replace(each, name="", seed=0)), one.skipped(arm)) for arm, each in pairs}
    assert len(differ) == len(one.variants)  # again is the reference
    if name == "routing":  # another kind of router keeps the other fields
        assert {each.model.router.count for each in made} == {4}
    for arm in one.arms:
        assert own_stages(one, base_recipe(one, arm, recipe), arm)


WRONG = [
    ({"variants": {"a": {}}}, "variants: expected 2 to 64, got 1"),
    ({"variants": {"a": {}, "../b": {}}}, "expected names of letters"),
    ({"variants": {"a": {}, "again": {}}}, "expected names of letters"),
    ({"seeds": [1, 1]}, "seeds: expected 1 to 64 that differ"),
    ({"endpoints": ["speed"]}, "endpoints: expected some of shapes-loss, .*got speed"),
    ({"endpoints": []}, "endpoints: expected some of .*got none"),
    ({"endpoints": ["shapes-paraphrase"]}, "got shapes-paraphrase"),
    ({"seeds": [0, 1000]}, "and not by 1000"),
    ({"settings": {"seed": 3}}, "settings: expected fields of a recipe that differ, got seed"),
    ({"settings": [1]}, "settings: expected an object"),
    ({"variants": ["a", "b"]}, "variants: expected an object"),
    ({"variants": {"a": {}, "b": 3}}, "b: expected fields of a recipe that differ, got 3"),
    ({"variants": {"a": {}, "cache": {}}}, "expected names of letters"),
    ({"limit": 0}, "limit: expected a whole number from 1"),
    ({"colour": 1}, "unknown field colour"),
    ({"variants": {"a": {}, "b": {"skip": "dit"}}}, "b.skip: expected a list of stages, got 'dit'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_study_without_sense_is_refused(tmp_path, change, message):
    values = {"question": "?", "recipe": "tiny", "variants": {"a": {}, "b": {"name": "c"}}}
    (tmp_path / "s.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(InputError, match=message):
        read_study(tmp_path / "s.json")


def test_stages_that_there_are_not_and_fields_that_there_are_not(tmp_path):
    one = Study("s", "?", "tiny", {"a": {}, "b": {}}, stages=("nap",))
    with pytest.raises(InputError, match="study s: expected stages of tiny .*got 'nap'"):
        run_study(one, tmp_path / "s", REGISTRY, recipe)
    with pytest.raises(InputError, match="study s: expected stages after unified-1, got mllm"):
        run_study(replace(one, shared=("unified-1",), stages=("mllm",)), tmp_path / "s", REGISTRY, recipe)
    for own, skip, message in (
        (("unified-1",), ["nap"], "s, b.skip: expected some of unified-1, got 'nap'"),
        (("unified-1",), ["unified-1"], "expected stages after .*got none"),
        (("unified-2",), ["unified-1"], "s, b.skip: expected some of unified-2, got 'unified-1'"),
        (("unified-1", "unified-2"), ["unified-1"], "an arm that skips the first stage needs what it starts from"),
    ):
        with pytest.raises(InputError, match=message):
            skipping = {"a": {}, "b": {"skip": skip}}
            run_study(replace(one, stages=own, variants=skipping), tmp_path / "s", REGISTRY, recipe)
    wrong = replace(one, stages=(), variants={"a": {}, "b": {"model": {"router": {"speed": 1}}}})
    with pytest.raises(InputError, match="study s, b.model.router: unknown field speed"):
        run_study(wrong, tmp_path / "s", REGISTRY, recipe)
    assert not (tmp_path / "s").exists()


def test_a_recipe_with_changes_is_that_of_a_file():
    made = changed_recipe(recipe("tiny"), {"seed": 3, "stages": {"dit": {"steps": 2}}}, "x", REGISTRY)
    assert (made.seed, made.stage("dit").steps) == (3, 2)
    assert replace(made, seed=0, stages=recipe("tiny").stages) == recipe("tiny")


def test_the_share_of_steps_until_anothers_end_is_planted():
    """A curve that falls by 1 a step: at the height where another stayed, after the steps that lead there."""
    falling = np.arange(100.0, 0.0, -1.0)
    assert share_until(falling, np.full(100, 60.5)) == pytest.approx(0.51, abs=0.02)  # the mean of 20 lags by ten
    assert share_until(falling, falling + 0.01) == 1.0 and share_until(falling, falling - 50) is None
    assert share_until(np.zeros(100), np.ones(100)) == 0.2  # from the first mean on
    again = np.r_[np.zeros(50), np.full(50, 9.0)]
    assert share_until(again, np.ones(100)) is None  # it was there, and left


def test_only_flow_losses_of_the_same_steps_are_curves(tmp_path):
    def run(name, rows):
        (tmp_path / name / "unified-2" / "done").mkdir(parents=True)
        (tmp_path / name / "recipe.json").write_text('{"stages": [{"name": "unified-2"}]}')
        lines = [json.dumps({"stage": "unified-2", **row}) for row in rows]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, '{"stage": "unif']))
        return tmp_path / name

    two = [run(f"a{i}", [{"step": 1, "loss": 9.0, "flow": 3.0 + i}, {"step": 2, "flow": 1.0 + i}]) for i in range(2)]
    assert mean_curve(two) == {1: 3.5, 2: 1.5}
    assert mean_curve([two[0], run("late", [{"step": 1, "flow": 1.0}, {"step": 3, "flow": 1.0}])]) == {}
    assert mean_curve([run("other", [{"step": 1, "loss": 1.0}])]) == {}  # a loss of several terms


# ---- a whole one -----------------------------------------------------------------------------------------------------

FILE = """
question: Does anything matter in three steps?
recipe: tiny
stages: [unified-1, unified-2]
settings: {stages: {unified-2: {steps: 2}}}
variants:
  dtr: {}
  last: {model: {router: {kind: last}}, stages: {unified-2: {objective: {balance: 0.0}}}}
seeds: [0, 1]
endpoints: [shapes-loss, shapes-gen]
limit: 2
"""


def test_a_study_runs_resumes_and_ends_in_one_table_and_one_page(tiny_run, tmp_path, capsys, monkeypatch):
    (tmp_path / "s.yaml").write_text(FILE)
    start, folder = tiny_run.path / "tokenizer-3" / "done", tmp_path / "out"
    line = ["study", str(tmp_path / "s.yaml"), "-o", str(folder), "--init-from", str(start), "--device", "cpu"]
    assert main([*line, "--seeds", "1"]) == 0
    assert main([*line[:4], "--init-from", str(start.parent), "--device", "cpu"]) == 2  # from another start
    assert "holds another study: start differ" in capsys.readouterr().err
    (tmp_path / "s.yaml").write_text(FILE.replace("limit: 2", "limit: 3"))
    assert main([*line, "--seeds", "1"]) == 2 and "holds another study: limit differ" in capsys.readouterr().err
    (tmp_path / "s.yaml").write_text(FILE)
    run = folder / "last" / "seed-0" / "recipe.json"
    kept = run.read_text()
    run.write_text(kept.replace('"balance": 0.0', '"balance": 0.5'))  # as an earlier installation had it
    assert main([*line, "--seeds", "1"]) == 2
    assert "last/seed-0 has trained unified-1 by another form of the recipe" in capsys.readouterr().err
    run.write_text(kept)
    text = (folder / "results.json").read_text()
    assert "Infinity" not in text
    found = json.loads(text)
    assert {one["detectable"] for one in found["differences"]} == {None}
    assert {(one["arm"], one["endpoint"]) for one in found["differences"]} == {
        (arm, name) for arm in ("again", "last") for name in ("shapes-loss", "shapes-loss, margin", "shapes-gen")
    }
    assert found["parameters"]["last"] < found["parameters"]["dtr"] and found["seconds"]["dtr"] > 0
    assert set(found["reached"]) == {"again", "last"}
    assert found["memory"] == dict.fromkeys(("dtr", "again", "last"), 0)  # of a GPU, and there is none
    page = (folder / "report.html").read_text()
    assert "Does anything matter" in page and page.count("data:image/png") == 3 * 4
    assert "unified-2, routing_entropy" in page and "dtr was there after" in page
    trained = []
    monkeypatch.setattr(study_run, "train_run", lambda *given: trained.append(given))
    assert main([*line, "--seeds", "1"]) == 0 and not trained  # all is there
    loss = folder / "last" / "seed-0" / "results" / "shapes-loss.json"
    before = read_result(loss)
    loss.unlink()
    assert main([*line, "--seeds", "1"]) == 0 and read_result(loss).scores == before.scores


def test_shared_stages_are_trained_once_a_seed_and_a_stop_is_no_end(tiny_run, tmp_path, monkeypatch):
    calls = []
    real = study_run.train_run

    def counted(training, device, start, *begin):
        calls.append((training.run.relative_to(tmp_path / "out").as_posix(), training.stages, start))
        return real(training, device, start, *begin) if len(calls) < 3 else False

    monkeypatch.setattr(study_run, "train_run", counted)
    one = Study(
        "s", "?", "tiny", {"a": {}, "b": {"stages": {"unified-2": {"lr": 4e-4}}}}, shared=("unified-1",),
        stages=("unified-2",), seeds=(4,), endpoints=("shapes-loss",), limit=1,
    )  # fmt: skip
    start = tiny_run.path / "tokenizer-3" / "done"
    assert run_study(one, tmp_path / "out", REGISTRY, recipe, device="cpu", init_from=start) is None
    shared = tmp_path / "out" / "shared" / "seed-4" / "unified-1" / "done"
    assert calls == [
        ("shared/seed-4", ("unified-1",), start), ("a/seed-4", ("unified-2",), shared),
        ("again/seed-4", ("unified-2",), shared),
    ]  # fmt: skip
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(study_run, "train_run", real)
    (tmp_path / "out" / "a" / "seed-4" / "arm.json").unlink()  # as if stopped before it was written
    found = run_study(one, tmp_path / "out", REGISTRY, recipe, device="cpu", init_from=start)
    assert found is not None and [one.arm for one in found.differences] == ["again", "again", "b", "b"]


def test_what_arms_and_studies_train_alike_is_trained_once(tiny_run, tmp_path):
    """The second arm takes the reference's unified-1, another study both stages, and they are what training gives."""
    short = {"stages": {"unified-1": {"steps": 2}, "unified-2": {"steps": 2}}}
    other = {"stages": {"unified-2": {"lr": 4e-4}}}
    one = Study(
        "s", "?", "tiny", {"a": {}, "b": other}, stages=("unified-1", "unified-2"), seeds=(4,), settings=short,
        endpoints=("shapes-loss",), limit=1,
    )  # fmt: skip
    start, said = tiny_run.path / "model", []
    given = dict(device="cpu", init_from=start, say=said.append)
    run_study(one, tmp_path / "s", REGISTRY, recipe, **given)
    assert [line for line in said if " as in " in line] == ["b, seed 4: unified-1 as in s/a/seed-4"]
    lines = (tmp_path / "s/b/seed-4/metrics.jsonl").read_text().splitlines()
    stages = [json.loads(line)["stage"] for line in lines]
    assert stages == sorted(stages) and len(set(stages)) == 2  # the curves of both stages, once

    said.clear()
    swapped = replace(one, name="t", variants={"b": other, "c": {"stages": {"unified-1": {"steps": 1}}}})
    found = run_study(swapped, tmp_path / "t", REGISTRY, recipe, reuse=[tmp_path / "s"], **given)
    taken = [line.partition(" as in ")[0] for line in said if " as in " in line]
    assert taken == ["b, seed 4: unified-1", "b, seed 4: unified-2", "again, seed 4: unified-1"]
    assert found.taken["b/seed-4"] == {"unified-1": "s/a/seed-4", "unified-2": "s/b/seed-4"}
    assert set(found.taken) == {"b/seed-4", "again/seed-4"} and "3 stages are trained alike in" in said[0]
    alone = replace(one, name="u", variants={"b": other, "z": {"stages": {"unified-1": {"steps": 1}}}})
    run_study(alone, tmp_path / "u", REGISTRY, recipe, **given)
    for folder in ("s", "t"):
        for stage in ("unified-1", "unified-2"):
            own, wanted = (
                load_group(tmp_path / place / "b/seed-4" / stage / "done", "modules") for place in (folder, "u")
            )
            assert all(torch.equal(own[name], wanted[name]) for name in wanted), (folder, stage)
    with pytest.raises(InputError, match="study.json"):
        run_study(alone, tmp_path / "v", REGISTRY, recipe, reuse=[tmp_path / "nothing"], **given)
    assert not (tmp_path / "v").exists()


def test_damaged_ends_and_those_of_an_earlier_recipe_are_not_taken(tiny_run, tmp_path):
    """The keys are those of what the folder was trained by, not of what its study would train today."""
    made, start = tiny_run.recipe, "start"
    stages = ("unified-1", "unified-2")
    source = Training("s/a/seed-0", tmp_path / "a", stages, start, made)
    shutil.copytree(tiny_run.path / "unified-1", tmp_path / "a" / "unified-1")
    shutil.copy(tiny_run.path / "recipe.json", tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text('{"stage": "unified-1", "step": 1, "flow": 1.0}\n{"stage": "uni')

    def taken(name):
        training = Training(f"s/{name}/seed-0", tmp_path / name, stages, start, made)
        return [*take_over(training, [source, training], REGISTRY)]

    assert taken("b") == ["unified-1"]  # the source has no end of unified-2
    assert (tmp_path / "b/metrics.jsonl").read_text() == '{"stage": "unified-1", "step": 1, "flow": 1.0}\n'
    assert json.loads((tmp_path / "b/taken.json").read_text()) == {"unified-1": "s/a/seed-0"}
    assert taken("b") == []  # it is there
    (tmp_path / "c" / "unified-1" / "state").mkdir(parents=True)
    assert taken("c") == []  # begun by itself
    whole = (tmp_path / "a" / "recipe.json").read_text()
    earlier = json.loads(whole)
    earlier["stages"][[one["name"] for one in earlier["stages"]].index("unified-1")]["lr"] *= 2
    (tmp_path / "a" / "recipe.json").write_text(json.dumps(earlier))
    assert taken("d") == []
    (tmp_path / "a" / "recipe.json").write_text(whole)
    weights = tmp_path / "a/unified-1/done/modules.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert taken("e") == []


def test_stages_are_alike_only_if_all_that_they_follow_from_is():
    tiny = recipe("tiny")
    base = training_keys(tiny, ("unified-1", "unified-2"), "start")

    def same(changes, stages=("unified-1", "unified-2"), start="start"):
        keys = training_keys(changed_recipe(tiny, changes, "x", REGISTRY), stages, start)
        return [name for name in keys if keys[name] == base.get(name)]

    assert same({}) == same({"stages": {"mllm": {"steps": 3}}}) == ["unified-1", "unified-2"]
    assert same({"stages": {"unified-2": {"lr": 1e-3}}}) == ["unified-1"]
    for changes in ({"seed": 1}, {"model": {"router": {"kind": "last"}}}, {"stages": {"unified-1": {"steps": 1}}}):
        assert same(changes) == []
    assert same({"stages": {"tokenizer-3": {"objective": {"semantic": 0.0}}}}) == []  # no teacher among the modules
    assert same({}, ("unified-2",)) == [] and same({}, start="another") == []


def test_what_the_arms_of_the_tokenizer_study_share_fits_them():
    """What one takes over from another has its modules: an arm without the semantic loss has no teacher."""
    one, found = replace(read_study(Path("tokenizer")), seeds=(0,)), {}
    for (arm, _), training in trainings(one, Path("s"), REGISTRY, recipe, None).items():
        shapes = {name: value.shape for name, value in random_modules(training.recipe, "cpu", {}).state_dict().items()}
        for stage, key in training.keys().items():
            assert found.setdefault(key, shapes) == shapes, (arm, stage)
    assert len(found) < 2 + 3 * len(one.arms)  # and something is shared


def test_an_arm_may_leave_a_stage_out(tmp_path, monkeypatch):
    calls = {}

    def trained(training, *rest):
        calls[training.run.parent.name] = training.stages
        for name in training.stages:
            (training.run / name / "done").mkdir(parents=True)
        (training.run / "arm.json").write_text("{}")
        return True

    measured = {}

    class Measured(Exception):
        """As far as there is something to open."""

    def opened(run, stage, *rest):
        measured[run.parent.name] = stage
        raise Measured

    def measure(runner, arm, seed, real=StudyRun._measure):
        with suppress(Measured):
            real(runner, arm, seed)

    monkeypatch.setattr(study_run, "train_run", trained)
    monkeypatch.setattr(study_run, "arm_pipeline", opened)
    monkeypatch.setattr(StudyRun, "_measure", measure)
    monkeypatch.setattr(study_run, "collect", lambda *given: None)
    one = Study(
        "s", "?", "tiny", {"a": {}, "b": {"skip": ["tokenizer-3"]}, "c": {"skip": ["tokenizer-2"]}}, seeds=(0,),
        stages=("tokenizer-2", "tokenizer-3"), endpoints=("shapes-recon",),
    )  # fmt: skip
    with pytest.raises(AttributeError):  # there is nothing to collect
        run_study(one, tmp_path / "out", REGISTRY, recipe, init_from=tmp_path)
    both = ("tokenizer-2", "tokenizer-3")
    assert calls == {"a": both, "again": both, "b": ("tokenizer-2",), "c": ("tokenizer-3",)}
    assert measured == {"a": both[1], "again": both[1], "b": "tokenizer-2", "c": "tokenizer-3"}


def test_every_measure_of_an_endpoint_is_compared():
    def losses(mean, margin):
        rows = np.random.default_rng(0).normal(0, 0.01, (30, 2)) + (mean, margin)
        records = [{"prompt": str(i), "loss": a, "other": a + b, "margin": b} for i, (a, b) in enumerate(rows.tolist())]
        return Result("shapes-loss", (Score("overall", mean, 0.0, 1.0, 30),), {}, {"scenes": records})

    arms = {"base": [losses(2.0, 0.1), losses(2.1, 0.11)], "b": [losses(1.0, 0.5), losses(1.1, 0.51)]}
    loss, margin = study_differences("base", {arm: {"shapes-loss": rows} for arm, rows in arms.items()})
    assert (loss.endpoint, margin.endpoint) == ("shapes-loss", "shapes-loss, margin")
    assert (loss.verdict, margin.verdict) == ("lower: better", "higher: better")
    assert margin.value == pytest.approx(0.4)
    assert (loss.main, margin.main) == (True, False)


def test_what_would_show_is_by_students_quantiles_at_the_corrected_level():
    base, other = planted(0.0), planted(0.1, spread=0.3, seed=1)
    one, seven = (difference("x", base, other, comparisons=count) for count in (1, 7))
    error = np.std(one.by_seed, ddof=1) / 3**0.5
    assert one.detectable == pytest.approx((4.302653 + 1.060660) * error, rel=1e-5)  # two degrees of freedom
    assert seven.detectable == pytest.approx((11.769 + 1.060660) * error, rel=1e-3)
    assert one.p == seven.p


def test_a_study_may_start_from_a_bundled_model_some_parts_of_it_anew(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(study_run, "train_run", lambda *all_of_it: given.append(all_of_it[-3:-1]))
    one = read_study(Path("routing"))
    assert run_study(one, tmp_path / "out", REGISTRY, recipe, device="cpu") is None
    assert given == [(bundled_folder("spar"), ("model.router.*", "model.connector.*", "model.denoiser.*"))]
    kept = json.loads((tmp_path / "out" / "study.json").read_text())
    assert (kept["start"], kept["init_from"]) == ("spar", "spar")  # no path: an installation may be moved
    with pytest.raises(InputError, match="holds another study: start differ"):
        run_study(one, tmp_path / "out", REGISTRY, recipe, device="cpu", init_from=tmp_path)
    with pytest.raises(InputError, match="init_from: expected one of spar, dualtoken, got 'mine'"):
        replace(one, init_from="mine")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["routing", "routing-form", "alignment", "alignment-form", "alignment-stages", "dualtoken-reading"]
)
def test_every_arm_takes_of_the_bundled_model_what_does_not_start_anew(name):
    one = read_study(Path(name))
    folder = bundled_folder(one.init_from)
    for arm in one.arms:
        made = arm_recipe(one, arm, 0, REGISTRY, recipe)
        status = read_run(made, Path("nowhere"), folder)
        plan = resolve(made, status, stages=one.stages, reinitialize=one.reinitialize)
        anew = "random weights for " + ", ".join(one.reinitialize)
        assert plan.stages[0].prepares[0] == anew
        assert ("connector from LLM" in plan.stages[0].prepares) == (one.init_from == "spar")
        modules = random_modules(made, "cpu", {})
        check_patterns(modules, plan)
        random = {key: value.clone() for key, value in modules.state_dict().items()}
        load_initial_weights(modules, folder, plan.stages[0].config, made, one.reinitialize)
        source = made.open_model(folder)
        for key in source.shapes:
            own = modules.state_dict().get(key)
            if own is not None:
                wanted = random[key] if matches(key, one.reinitialize) else source.read(key)
                assert torch.equal(own, wanted.to(own.dtype)), (arm, key)


def test_a_study_of_dualtokens_tokenizer_ends_with_it(tmp_path):
    one = Study(
        "codes", "?", "dualtoken-tiny", {"a": {}, "b": {"model": {"shortcut": 0.0}}}, shared=("towers",),
        stages=("tokenizer",), seeds=(0,), endpoints=("shapes-recon", "shapes-zero-shot"), limit=4,
    )  # fmt: skip
    found = run_study(one, tmp_path / "out", REGISTRY, recipe, device="cpu")
    assert [*found.results["b"]] == ["shapes-recon", "shapes-zero-shot"]
    assert not (tmp_path / "out/b/seed-0/model").exists()
    run = tmp_path / "out" / "a" / "seed-0"
    loaded = load_stage_model(run, REGISTRY, "tokenizer")
    assert [*loaded.manifest["stages"]] == ["tokenizer"] and loaded.model.config == recipe("dualtoken-tiny").model
    saved = load_group(run / "tokenizer" / "done", "modules")
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in loaded.model.state_dict().items())


@pytest.mark.slow
def test_eight_variants_of_tiny(tiny_run, tmp_path):
    variants = {f"v{i}": {"stages": {"unified-2": {"lr": 4e-4 * (i + 1)}}} for i in range(8)}
    one = Study(
        "eight", "?", "tiny", variants, stages=("unified-1", "unified-2"), seeds=(0,), endpoints=("shapes-loss",),
        limit=4,
    )  # fmt: skip
    start = tiny_run.path / "tokenizer-3" / "done"
    found = run_study(one, tmp_path / "out", REGISTRY, recipe, device="cpu", init_from=start)
    assert found is not None and len(found.differences) == 2 * 8  # loss and margin
