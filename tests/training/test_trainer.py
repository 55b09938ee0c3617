"""A run: one folder, one recipe, stage behind stage, resumable anywhere; starting from weights is not resuming."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
from dataclasses import replace

import pytest
import torch

from spar.checkpoints.spar_format import load_model
from spar.common.config import from_dict, read_json, to_dict, write_json
from spar.common.errors import InputError
from spar.processing.prompts import PromptEncoder
from spar.recipes import REGISTRY, recipe
from spar.recipes.shapes.dense_tagging import TAG_NAMES
from spar.training import bundle, checkpoint
from spar.training import trainer as module
from spar.training.checkpoint import checksum, load_group, save_folder, write_meta
from spar.training.config import Recipe, matches
from spar.training.files_data import FilesData
from spar.training.initial_weights import load_initial_weights, random_modules
from spar.training.objectives.next_token import NextTokenObjective
from spar.training.objectives.tokenizer import TokenizerObjective
from spar.training.objectives.unified import UnifiedObjective
from spar.training.plan import read_run, resolve
from spar.training.run_folder import invalidate_later_stages, open_run, read_recipe
from spar.training.stage_model import load_stage_model
from spar.training.systems.spar import AlignmentConfig
from spar.training.trainer import execute, train
from spar.worlds.shapes.tokenizer import PLURALS, build_tokenizer

TINY = recipe("tiny")
ENCODER_ONLY = ("encoder",)
ORDER = [stage.name for stage in TINY.stages]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def weights(run, stage):
    return load_group(run / stage / "done", "modules")


@pytest.fixture
def half(tiny_run, tmp_path):
    """A copy of the finished run with only its foundations in it."""
    run = tmp_path / "half"
    later = ORDER[ORDER.index("tokenizer-1") :]
    shutil.copytree(tiny_run.path, run, ignore=shutil.ignore_patterns(*later, "model", "tensorboard"))
    return run


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_the_folder_says_which_recipe_it_holds(tiny_run):
    assert from_dict(Recipe, read_json(tiny_run.path / "recipe.json"), complete=True, registry=REGISTRY) == TINY
    assert {p.name for p in tiny_run.path.iterdir() if p.is_dir()} == {
        *(stage.name for stage in TINY.stages), "cache", "model", "tensorboard"
    }
    assert not list(tiny_run.path.glob("*/state*"))  # what could be resumed is gone with the stage's end


def test_a_recipe_may_leave_out_no_field(tmp_path):
    values = to_dict(TINY)
    write_json(tmp_path / "recipe.json", values)
    assert read_recipe(tmp_path / "recipe.json", REGISTRY) == TINY
    del values["seed"]
    write_json(tmp_path / "recipe.json", values)
    with pytest.raises(InputError, match=r"recipe\.json: missing field seed"):
        read_recipe(tmp_path / "recipe.json", REGISTRY)


@pytest.mark.parametrize("fresh", [True, False])
def test_another_recipe_is_refused_and_writes_nothing(tiny_run, fresh):
    before = (tiny_run.path / "recipe.json").read_bytes()
    with pytest.raises(InputError, match="holds a run of another recipe|already holds a run"):
        open_run(tiny_run.path, replace(TINY, seed=5), fresh=fresh)
    with pytest.raises(InputError, match="another recipe"):
        train(replace(TINY, seed=5), tiny_run.path, resume=True)
    assert (tiny_run.path / "recipe.json").read_bytes() == before


@pytest.mark.slow
def test_published_parts_do_not_start_from_random_weights_unasked(tiny_run, tmp_path):
    wanting = replace(TINY, stages=TINY.stages[-2:], published=("model.language",))
    with pytest.raises(InputError, match="model.language would start from random weights; expected --init-from"):
        train(wanting, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(wanting, tmp_path / "scratch", from_scratch=True) is not None
    assert train(wanting, tmp_path / "given", init_from=tiny_run.path / "model") is not None
    assert train(wanting, tmp_path / "given", resume=True) is not None


def test_a_stage_starts_from_the_one_named_before_it_whatever_the_recipe_has_between(tiny_run, tmp_path):
    both, one = tmp_path / "both", tmp_path / "one"
    train(TINY, both, stages=("unified-1", "unified-3"), init_from=tiny_run.path / "tokenizer-3" / "done")
    assert not (both / "unified-2").exists()
    train(TINY, one, stages=("unified-3",), init_from=both / "unified-1" / "done")
    assert same(weights(both, "unified-3"), weights(one, "unified-3"))
    assert not same(weights(both, "unified-3"), weights(tiny_run.path, "unified-3"))  # unified-2 was left out


def test_a_fresh_run_does_not_write_over_an_old_one(tiny_run):
    with pytest.raises(InputError, match="already holds a run; resume it"):
        train(TINY, tiny_run.path)


@pytest.mark.parametrize("name", ["model/own.py", "adapter/own.bin", "data.json", "text_tokenizer/own.json"])
def test_a_folder_that_is_no_run_keeps_what_a_run_would_remove(tmp_path, name):
    run, own = tmp_path / "project", tmp_path / "project" / name
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    (run / "README.md").write_text("mine")
    for plan in ({}, {"stages": ("encoder",)}, {"resume": True}):
        with pytest.raises(InputError, match=f"project holds no run, but {own.relative_to(run).parts[0]}, which a run"):
            train(TINY, run, **plan)
    assert own.read_text() == "mine" and not (run / "recipe.json").exists()
    own.unlink()
    shutil.rmtree(own.parent) if own.parent != run else None
    open_run(run, TINY, fresh=True)  # other files are in nobody's way
    assert (run / "README.md").read_text() == "mine"


def test_a_models_folder_is_no_folder_for_a_run(tiny_run, tmp_path):
    copied = shutil.copytree(tiny_run.path / "model", tmp_path / "model")
    before = sorted(path.relative_to(copied) for path in copied.rglob("*"))
    with pytest.raises(InputError, match="is a model's folder"):
        train(TINY, copied)
    assert sorted(path.relative_to(copied) for path in copied.rglob("*")) == before


def test_a_broken_recipe_file_is_refused(tmp_path):
    (tmp_path / "recipe.json").write_text('{"name": "tiny"')
    with pytest.raises(InputError, match="recipe.json is not readable JSON"):
        open_run(tmp_path, TINY, fresh=False)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the run folder"):
        open_run(tmp_path / "file" / "run", TINY, fresh=True)


def test_a_stage_whose_start_is_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match="stage dit starts from the end of autoencoder, which is not in"):
        train(TINY, tmp_path / "run", stages=("dit",))


def test_a_tokenizer_with_more_words_than_the_model_is_refused():
    small = replace(TINY, model=replace(TINY.model, text=replace(TINY.model.text, vocab_size=32)))
    with pytest.raises(InputError, match=r"text.vocab_size: expected at least \d+ for this tokenizer, got 32"):
        small.prompts(build_tokenizer())


def test_the_seed_decides_the_first_weights():
    one, two, three = (random_modules(replace(TINY, seed=s), "cpu", {}).model.state_dict() for s in (0, 0, 1))
    for name in ("language.network.embed_tokens.weight", "router.gate.0.weight", "connector.projection.weight"):
        assert torch.equal(one[name], two[name]) and not torch.equal(one[name], three[name])


def test_the_seed_decides_every_first_weight():
    torch.manual_seed(1)
    one = random_modules(TINY, "cpu", {}).state_dict()
    torch.manual_seed(2)
    two = random_modules(TINY, "cpu", {}).state_dict()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def adversary(**changes):
    return replace(TINY, discriminator=replace(TINY.discriminator, **changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(TINY, seed=-1), "seed: expected at least 0, got -1"),
        (lambda: replace(TINY, log_every=0), "log_every: expected at least 1, got 0"),
        (lambda: replace(TINY.data, scenes=0), "data.scenes: expected at least 1"),
        (lambda: replace(TINY.data, edits=0), "data.edits: expected at least 1"),
        (lambda: replace(TINY.flow, unconditional_share=2.0), "flow.unconditional_share: expected 0 to 1, got 2.0"),
        (lambda: replace(TINY.flow, sampling_steps=0), "flow.sampling_steps: expected above 0"),
        (lambda: replace(TINY.flow, training_shift=0.0), "flow.training_shift: expected above 0"),
        (lambda: replace(TINY.flow, sampling_shift=math.nan), "flow.sampling_shift: expected above 0, got nan"),
        (lambda: replace(TINY.flow, guidance=-1.0), "flow.guidance: expected at least 0"),
        (lambda: replace(TINY.data, edits=49), "data.edits: expected at most one for each of 48 scenes, got 49"),
        (lambda: replace(TINY, save_minutes=math.inf), "tiny.save_minutes: expected a finite number, got inf"),
        (lambda: replace(TINY, flow=replace(TINY.flow, time_mean=math.nan)), "tiny.flow.time_mean: .*got nan"),
        (lambda: adversary(layers=5), "tokenizer-3: expected a discriminator .*64 pixels, got .* 5 layers, .* 96 and"),
        (lambda: adversary(channels=4), "tokenizer-3: expected a discriminator that reads 3 channels .*of 4 channels"),
        (lambda: adversary(layers=0), "discriminator: expected at least 1 layer, got 0"),
        (lambda: adversary(width=30), "discriminator: expected a width that 8 groups divide, got 30"),
        (lambda: adversary(groups=0), "discriminator: expected a width that 0 groups divide"),
    ],
)
def test_a_recipe_refuses_settings_that_cannot_be(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_run_ends_bit_equal_to_one_that_was_not(tiny_run, half):
    """Foundations from the folder, a signal inside tokenizer-2, another inside unified-2, then on to the end."""

    def signal_at(name, at):
        return lambda stage, step, *_: os.kill(os.getpid(), signal.SIGINT) if (stage, step) == (name, at) else None

    announced = []
    for stop in (("tokenizer-2", 0), ("unified-2", 1), None):
        model = train(
            TINY, half, resume=True, report=signal_at(*stop) if stop else None,
            announce=lambda stage, _: announced.append(stage.name),
        )
        assert (model is None) == (stop is not None)
        if stop:
            assert (half / stop[0] / "state" / "meta.json").exists() and not (half / "model").exists()
    assert announced == [
        "tokenizer-1", "tokenizer-2", "tokenizer-2", "tokenizer-3", "unified-1", "unified-2", "unified-2", "unified-3",
    ]
    for stage in ("tokenizer-1", "tokenizer-2", "tokenizer-3", "unified-1", "unified-2", "unified-3"):
        assert same(weights(half, stage), weights(tiny_run.path, stage)), stage
    for file in sorted((tiny_run.path / "model").rglob("*.safetensors")):
        assert (half / file.relative_to(tiny_run.path)).read_bytes() == file.read_bytes(), file


def test_resuming_a_finished_run_trains_nothing_and_gives_its_model(tiny_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(tiny_run.path, run)
    monkeypatch.setattr(module, "run_stage", lambda *_, **__: pytest.fail("a stage was trained"))
    model = train(TINY, run, resume=True)
    assert same(model.state_dict(), tiny_run.model.state_dict())


def test_a_damaged_end_of_a_stage_is_refused(half):
    path = half / "dit" / "done" / "modules.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="modules.safetensors disagrees with its checksum in meta.json: it is damaged"):
        train(TINY, half, resume=True)


def test_a_stage_trained_again_makes_the_later_ones_undone(tiny_run, half):
    shutil.copytree(tiny_run.path / "model", half / "model")
    train(TINY, half, stages=("mllm",))
    assert (half / "encoder" / "done").exists() and (half / "mllm" / "done").exists()
    assert not (half / "autoencoder" / "done").exists() and not (half / "dit" / "done").exists()
    assert not (half / "model").exists()


def test_what_is_removed_goes_by_one_rename_and_the_last_made_first(tiny_run, half, monkeypatch):
    """A removal that is broken off leaves whole ends alone, and none of a later stage without the earlier ones."""
    shutil.copytree(tiny_run.path / "model", half / "model")
    real, left = checkpoint.shutil.rmtree, []

    def broken_off(path, **keywords):
        if not os.path.exists(path):
            return
        left.append([name for name in ORDER if (half / name / "done").exists()])
        assert path.suffix == ".trash"
        real(path, **keywords)

    planned = resolve(TINY, read_run(TINY, half), stages=("mllm",)).stages[0]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", broken_off)
        invalidate_later_stages(half, TINY, planned)
    foundations = ORDER[: ORDER.index("tokenizer-1")]
    assert left == [foundations[:count] for count in range(len(foundations), 0, -1)]
    assert not list(half.rglob("*.trash"))


def test_the_manifest_leaves_out_a_damaged_end_that_the_model_did_not_come_from(tiny_run, half, caplog):
    (half / "dit" / "done" / "meta.json").write_text("{}")
    found = bundle.run_manifest(TINY, half, "dit")
    assert list(found["stages"]) == ORDER[: ORDER.index("dit")] and "leaves out stage dit" in caplog.text


def test_a_run_that_another_process_has_written_since_it_was_looked_at_is_refused(tiny_run, half):
    """A second command that was planned in the last seconds of the first one removed the end that this had written."""
    plan = resolve(TINY, read_run(TINY, half), stages=("tokenizer-1",), resume=True)
    shutil.copytree(tiny_run.path / "tokenizer-1", half / "tokenizer-1")
    with pytest.raises(InputError, match="was written by another process after this one had looked at it"):
        execute(plan)
    assert same(weights(half, "tokenizer-1"), weights(tiny_run.path, "tokenizer-1"))


@pytest.mark.parametrize(
    ("owner", "where"), [(module, "starting_modules"), (type(TINY.data), "open"), (UnifiedObjective, "prepare")]
)
def test_a_signal_in_the_set_up_ends_the_run_before_anything_is_removed(
    tiny_run, tmp_path, monkeypatch, caplog, owner, where
):
    run = tmp_path / "run"
    shutil.copytree(tiny_run.path, run)
    plain = getattr(owner, where)

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    before = sorted(path for path in run.rglob("*") if path.is_file())
    monkeypatch.setattr(owner, where, interrupted)
    monkeypatch.setattr(module, "run_planned", lambda *_: pytest.fail("a step was trained"))
    caplog.set_level("INFO", "spar.training")
    assert train(TINY, run, stages=("unified-2",)) is None
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before
    assert "stopped before stage unified-2, of which nothing was removed" in caplog.text
    if where == "starting_modules":
        assert train(TINY, tmp_path / "new") is None and not (tmp_path / "new").exists()


def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_removed(half):
    idle = (("model.nothing.*", 0.5),)
    stages = tuple(replace(s, lr_multipliers=idle) if s.name == "mllm" else s for s in TINY.stages)
    write_json(half / "recipe.json", to_dict(replace(TINY, stages=stages)))
    with pytest.raises(InputError, match="pattern 'model.nothing.*' matches no parameter"):
        train(replace(TINY, stages=stages), half, stages=("mllm",))
    assert (half / "mllm" / "done").is_dir()


def test_a_stage_that_is_being_trained_again_is_not_taken_for_done(half):
    def stop(stage, step, *_):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    assert train(TINY, half, stages=("mllm",), report=stop) is None
    seen = []
    train(TINY, half, stages=("mllm",), resume=True, report=lambda stage, step, *_: seen.append(step))
    assert seen == [2]


# ---- starting from weights -------------------------------------------------------------------------------------------


def test_init_from_takes_weights_and_nothing_else(tiny_run, tmp_path):
    """A new run of one stage from another run's weights: step 0, a fresh optimizer, the same end."""
    run, seen = tmp_path / "run", []
    train(
        TINY, run, stages=("unified-1",), init_from=tiny_run.path / "tokenizer-3" / "done",
        report=lambda stage, step, *_: seen.append((stage, step)),
    )
    assert seen == [("unified-1", 0), ("unified-1", 1), ("unified-1", 2)]
    assert same(weights(run, "unified-1"), weights(tiny_run.path, "unified-1"))
    assert not (run / "model").exists()  # that is the last stage's


def test_init_from_starts_where_it_says(tiny_run, tmp_path):
    run = tmp_path / "run"
    train(TINY, run, stages=("unified-1",), init_from=tiny_run.path / "unified-2" / "done")
    ours, theirs = weights(run, "unified-1"), weights(tiny_run.path, "unified-2")
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if n.startswith("model.denoiser."))
    assert not same(ours, weights(tiny_run.path, "unified-1"))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_init_from_weights_that_are_none_is_refused(tiny_run, tmp_path, damage):
    folder = tmp_path / "done"
    folder.mkdir()
    expected = "--init-from: expected a finished stage such as RUN/dit/done or a SPAR folder, got "
    if damage == "cut":
        (folder / "modules.safetensors").write_bytes(b"no tensors")
        files = {"modules.safetensors": checksum(folder / "modules.safetensors")}
        write_meta(folder, {"config": to_dict(TINY.stages[0]), "files": files})
        expected = "modules.safetensors is damaged"
    with pytest.raises(InputError, match=expected):
        train(TINY, tmp_path / "run", stages=("unified-1",), init_from=folder)


def test_init_from_weights_of_other_sizes_is_refused(tiny_run, tmp_path):
    model = replace(TINY.model, streams=replace(TINY.model.streams, residual_blocks=2))
    with pytest.raises(InputError, match="does not fit this model: .* missing"):
        train(
            replace(TINY, model=model), tmp_path / "run", stages=("unified-1",),
            init_from=tiny_run.path / "tokenizer-3" / "done",
        )


def test_init_from_serves_a_design_that_differs_behind_it(tiny_run, tmp_path):
    """One tokenizer for every router: what no earlier stage has trained keeps its own fresh weights."""
    model = replace(TINY.model, router=replace(TINY.model.router, kind="last"))
    run = tmp_path / "run"
    trained = train(
        replace(TINY, model=model), run, stages=("unified-1",), init_from=tiny_run.path / "tokenizer-3" / "done"
    )
    before = weights(tiny_run.path, "tokenizer-3")
    for name, value in trained.tokenizer.state_dict().items():
        assert torch.equal(value, before[f"model.tokenizer.{name}"])
    assert not any("router.gate" in name for name in weights(run, "unified-1"))


def test_a_vocabulary_grows_and_the_new_words_begin_at_the_mean(tiny_run, tmp_path):
    smaller = tiny_run.path / "model"
    before = load_model(smaller).model.language.network.embed_tokens.weight
    more = replace(TINY, model=replace(TINY.model, text=replace(TINY.model.text, vocab_size=len(before) + 7)))
    trained = train(more, tmp_path / "run", stages=("unified-3",), init_from=smaller)
    after = trained.language.network.embed_tokens.weight
    assert torch.equal(after[: len(before)], before)
    torch.testing.assert_close(after[len(before) :], before.mean(0, keepdim=True).expand(7, -1))
    fewer = replace(TINY, model=replace(TINY.model, text=replace(TINY.model.text, vocab_size=188)))
    with pytest.raises(InputError, match="does not fit this model"):
        train(fewer, tmp_path / "fewer", stages=("unified-3",), init_from=smaller)


def test_a_run_that_has_begun_is_resumed_wherever_it_was_to_begin(tiny_run, half):
    """The command that began a run goes on with it under --resume auto, `--init-from` and all."""
    stages = tuple(stage.name for stage in TINY.stages if (half / stage.name / "done").exists())
    seen = []
    train(
        TINY, half, stages=(*stages, "tokenizer-1"), resume=True, init_from=tiny_run.path / "dit" / "done",
        report=lambda stage, *_: seen.append(stage),
    )  # fmt: skip
    assert set(seen) == {"tokenizer-1"} and same(weights(half, "tokenizer-1"), weights(tiny_run.path, "tokenizer-1"))


def test_what_no_stage_trains_and_what_is_published_must_fit(tiny_run, tmp_path):
    """A tokenizer's end with a smaller LLM must not leave a frozen one at random, nor a published DiT."""
    kinds = TokenizerObjective | UnifiedObjective
    few = replace(TINY, stages=tuple(s for s in TINY.stages if isinstance(s.objective, kinds)))
    deeper = replace(few, model=replace(few.model, text=replace(few.model.text, layers=6)))
    stages = {"stages": ("unified-1",), "init_from": tiny_run.path / "tokenizer-3" / "done"}
    with pytest.raises(InputError, match="does not fit this model: .* missing .model.language.network.layers"):
        train(deeper, tmp_path / "deeper", **stages)
    wider = replace(few, model=replace(few.model, denoiser=replace(few.model.denoiser, layers=3)))
    assert train(wider, tmp_path / "wider", **stages) is not None
    with pytest.raises(InputError, match="missing .model.denoiser.network.transformer_blocks.2"):
        train(replace(wider, published=("model.denoiser",)), tmp_path / "published", **stages)


def test_init_from_a_file_without_one_fitting_tensor_is_refused(tmp_path):
    folder = tmp_path / "done"
    save_folder(folder, {"modules": {"something.else": torch.ones(3)}}, {"config": to_dict(TINY.stages[0])})
    with pytest.raises(InputError, match="holds none of this model's weights"):
        train(replace(TINY, stages=TINY.stages[:1]), tmp_path / "run", init_from=folder)


# ---- what a stage takes over -----------------------------------------------------------------------------------------


def test_stage_three_keeps_a_frozen_copy_of_the_encoder_it_begins_with(tiny_run):
    before, after = weights(tiny_run.path, "tokenizer-2"), weights(tiny_run.path, "tokenizer-3")
    encoder = "model.tokenizer.encoder."
    names = [name.removeprefix("teacher.") for name in after if name.startswith("teacher.")]
    assert names and all(torch.equal(after[f"teacher.{name}"], before[encoder + name]) for name in names)
    assert not all(torch.equal(after[f"teacher.{name}"], after[encoder + name]) for name in names)


def test_the_connector_begins_as_the_llms_last_layers(start):
    model = start("unified-1").modules.model
    last = model.language.network.layers[-len(model.connector.layers) :]
    for own, source in zip(model.connector.layers, last, strict=True):
        assert same(own.state_dict(), source.state_dict())
    joint = start("unified-2").modules.model  # later unified stages go on with what they have
    assert not same(joint.connector.layers[-1].state_dict(), joint.language.network.layers[-1].state_dict())


def test_words_begin_at_the_tags_read_outs(start, tiny_run):
    prompts, ctx = PromptEncoder(build_tokenizer(), 64), start("mllm")
    table, heads = ctx.modules.model.language.network.embed_tokens.weight, ctx.modules.dense_head.tags
    for tag, names in TAG_NAMES.items():
        rows = heads[tag].weight[-len(names) :]
        for name, row in zip(names, rows - rows.mean(0), strict=True):
            for word in {name, PLURALS.get(name, name)}:
                cosine = torch.cosine_similarity(table[prompts.encode(word)[0]], row, dim=0)
                assert float(cosine) == pytest.approx(1, abs=1e-4), word
    sizes = table.norm(dim=-1)
    assert float(sizes.max()) < 2 * float(sizes.mean())
    random = start("mllm", objective=NextTokenObjective())
    token = prompts.encode("red")[0]
    assert not torch.equal(random.modules.model.language.network.embed_tokens.weight[token], table[token])


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def test_the_model_folder_is_the_trained_model_and_says_how_it_was_made(tiny_run):
    loaded = load_model(tiny_run.path / "model")
    assert same(loaded.model.state_dict(), tiny_run.model.state_dict())
    manifest = loaded.manifest
    assert (manifest["recipe"], manifest["seed"]) == ("tiny", 0)
    assert from_dict(Recipe, manifest["resolved_recipe"], registry=REGISTRY) == TINY
    assert {name: row["steps"] for name, row in manifest["stages"].items()} == {s.name: 3 for s in TINY.stages}
    assert all(row["seconds"] > 0 for row in manifest["stages"].values())
    assert {row["dtype"] for row in manifest["stages"].values()} <= {"float32", "bfloat16"}
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["machine"]["cores"] >= 1


@pytest.mark.parametrize("stage", [None, "dit", "tokenizer-3"])
def test_the_model_of_any_finished_stage_can_be_had(tiny_run, stage):
    saved = weights(tiny_run.path, stage or "unified-3")
    loaded = load_stage_model(tiny_run.path, REGISTRY, stage)
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in loaded.model.state_dict().items())
    assert not loaded.model.training


def test_the_manifest_tells_only_of_the_stages_that_made_the_model(tiny_run):
    stages = load_stage_model(tiny_run.path, REGISTRY, "dit").manifest["stages"]
    assert list(stages) == ["encoder", "mllm", "mllm-2", "mllm-3", "mllm-4", "autoencoder", "dit"]


def test_the_model_of_a_stage_that_has_not_ended_is_refused(half, tmp_path):
    with pytest.raises(InputError, match="meta.json is missing in .*tokenizer-1"):
        load_stage_model(half, REGISTRY, "tokenizer-1")
    with pytest.raises(InputError, match="recipe.json is missing"):
        load_stage_model(tmp_path / "nowhere", REGISTRY)


def test_the_flows_settings_become_the_models(tiny_run):
    flow = replace(TINY.flow, sampling_shift=3.0, sampling_steps=7, guidance=2.5, training_shift=1.5)
    modules = random_modules(TINY, "cpu", {})
    loaded = bundle.build_bundle(
        modules, replace(TINY, flow=flow), tiny_run.path, PromptEncoder(build_tokenizer(), 64), "unified-3"
    )
    assert (loaded.sampling.shift, loaded.sampling.steps, loaded.sampling.guidance) == (3.0, 7, 2.5)


def test_the_commit_is_the_source_trees_or_unknown(monkeypatch):
    assert bundle._commit() == "unknown" or len(bundle._commit()) == 40

    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(bundle.subprocess, "run", no_git)
    assert bundle._commit() == "unknown"


def test_the_commit_of_a_repository_around_an_installation_is_not_ours(monkeypatch, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    own = tmp_path / ".venv" / "bundle.py"
    own.parent.mkdir()
    own.write_text("")
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(bundle, "__file__", str(own))
    assert bundle._commit() == "unknown"
    for words in (["add", "-f", str(own)], ["commit", "-q", "-m", "ours"]):
        subprocess.run([*git, *words], check=True)
    assert len(bundle._commit()) == 40


def test_an_external_teacher_is_loaded_or_refused_before_the_run_begins(tmp_path):
    outside = replace(TINY, alignment=AlignmentConfig(teacher="external", external=str(tmp_path / "nothing")))
    with pytest.raises(InputError, match="alignment.external: expected the folder or Hub id of an image encoder"):
        train(outside, tmp_path / "run", stages=ENCODER_ONLY)  # whose modules are as wide as the teacher
    assert not (tmp_path / "run").exists()


def test_metrics_are_json_that_any_reader_takes(tiny_run):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (tiny_run.path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["stage"] for row in rows] == [stage.name for stage in TINY.stages for _ in range(stage.steps)]


@pytest.mark.slow
def test_a_run_goes_on_from_a_finished_model_and_its_manifest_says_so(tiny_run, tmp_path):
    run, given = tmp_path / "run", tiny_run.path / "model"
    seen = []
    model = train(
        TINY, run, stages=("unified-2", "unified-3"), init_from=given, report=lambda stage, step, *_: seen.append(stage)
    )
    assert model is not None and {*seen} == {"unified-2", "unified-3"}
    start, end = load_model(given).model, load_model(run / "model").model
    assert torch.equal(start.language.embed(torch.tensor([[7]])), end.language.embed(torch.tensor([[7]])))  # frozen
    assert not torch.equal(start.connector.queries, end.connector.queries)
    manifest = load_model(run / "model").manifest
    assert [*manifest["stages"]] == ["unified-2", "unified-3"]
    assert manifest["origin"] == load_model(given).manifest
    train(TINY, run, stages=("unified-3",), init_from=tiny_run.path / "unified-2" / "done")
    assert "origin" not in load_model(run / "model").manifest  # now it came from a stage


def test_parts_may_start_from_random_weights_though_the_folder_has_them(tiny_run):
    given, patterns = tiny_run.path / "model", ("model.denoiser.*", "model.connector.*")
    modules = random_modules(TINY, "cpu", {})
    fresh = {key: value.clone() for key, value in modules.state_dict().items()}
    load_initial_weights(modules, given, TINY.stage("unified-2"), TINY, patterns)
    own = modules.state_dict()
    source = TINY.open_model(given)
    for key in source.shapes:
        expected = fresh[key] if matches(key, patterns) else source.read(key)
        assert torch.equal(own[key], expected.to(own[key].dtype)), key
    assert not torch.equal(own["model.connector.queries"], source.read("model.connector.queries"))


def test_what_starts_anew_is_in_the_manifest_and_a_pattern_must_mean_something(tiny_run, tmp_path):
    given, run = tiny_run.path / "model", tmp_path / "run"
    for pattern in ("model.dit.*", "model.tokenizer.*"):  # which is not there; which the stage does not train
        with pytest.raises(InputError, match=f"such as model.denoiser.*, got '{re.escape(pattern)}'"):
            train(TINY, run, stages=("unified-3",), init_from=given, reinitialize=(pattern,))
    adapted = replace(TINY, lora=replace(TINY.lora, rank=2))
    with pytest.raises(InputError, match="--reinitialize: expected no LoRA"):
        train(adapted, run, stages=("unified-3",), init_from=given, reinitialize=("model.denoiser.*",))
    assert not run.exists()
    train(TINY, run, stages=("unified-3",), init_from=given, reinitialize=("model.router.*",))
    origin = load_model(run / "model").manifest["origin"]
    assert origin == {**load_model(given).manifest, "reinitialized": ["model.router.*"]}


@pytest.mark.slow
def test_a_run_that_began_from_a_model_resumes_without_it(tiny_run, tmp_path):
    def stop(*_):
        signal.raise_signal(signal.SIGINT)

    run, given = tmp_path / "run", tiny_run.path / "model"
    stages = ("unified-2", "unified-3")
    whole = train(TINY, tmp_path / "whole", stages=stages, init_from=given)
    assert train(TINY, run, stages=stages, init_from=given, report=stop) is None
    resumed = train(TINY, run, stages=stages, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_goes_on_by_its_own_command_where_what_it_began_with_has_gone(tiny_run, tmp_path, caplog):
    """Its first weights and its teacher are in its state; until there is one, they are missed in words."""

    def stop(*_):
        signal.raise_signal(signal.SIGINT)

    run, start, teacher = tmp_path / "run", tmp_path / "start", tmp_path / "teacher"
    shutil.copytree(tiny_run.path / "tokenizer-2" / "done", start)
    shutil.copytree(tiny_run.path / "model", teacher)
    given = {"init_from": start, "teacher": teacher, "reinitialize": ("model.tokenizer.fusion.*",)}
    command = {"stages": ("tokenizer-3",), **given}
    train(TINY, tmp_path / "whole", **command)
    assert train(TINY, run, **command, report=stop) is None
    shutil.rmtree(start)
    shutil.rmtree(teacher)
    with pytest.raises(InputError, match="got '.*start'; .*other has no state of tokenizer-3 yet, which still starts"):
        train(TINY, tmp_path / "other", resume=True, **command)
    assert not (tmp_path / "other").exists()
    caplog.clear()
    for _ in range(2):  # in the stage; with it done
        assert train(TINY, run, resume=True, **command) is not None
        assert "the run has begun and goes on without what it started from: --init-from: " in caplog.text
    assert same(weights(run, "tokenizer-3"), weights(tmp_path / "whole", "tokenizer-3"))


def test_a_stage_that_needs_the_autoencoders_encoder_does_not_start_from_a_model(tiny_run, tmp_path):
    with pytest.raises(InputError, match="autoencoder's encoder"):
        train(TINY, tmp_path / "run", stages=("tokenizer-2",), init_from=tiny_run.path / "model")


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_signal_while_a_stages_end_is_written_stops_after_it(tiny_run, tmp_path, monkeypatch, which):
    """The stage is done, the next is not begun; of the last stage the model is written too."""
    from spar.training.objectives.unified import UnifiedObjective as Objective

    stages = ("unified-2", "unified-3")
    chosen = stages[0] if which == "first" else stages[1]

    def finish(self, ctx, data):
        if ctx.stage.name == chosen:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Objective, "finish", finish)
    run, begin = tmp_path / "run", tiny_run.path / "unified-1" / "done"
    done = train(TINY, run, stages=stages, init_from=begin)
    assert (run / "unified-2" / "done").is_dir()
    assert (done is not None) == (which == "last") == (run / "model").is_dir()
    if which == "first":
        assert not (run / "unified-3").exists()
        monkeypatch.undo()
        assert train(TINY, run, stages=stages, resume=True) is not None


@pytest.mark.parametrize("change", [{"log_every": 7}, {"save_minutes": 1.0}])
def test_settings_that_no_result_depends_on_may_change_when_a_run_is_resumed(tiny_run, tmp_path, change):
    run = tmp_path / "run"
    open_run(run, TINY, fresh=True)
    open_run(run, replace(TINY, **change), fresh=False)
    (name, value), = change.items()
    assert read_json(run / "recipe.json")[name] == value


def test_a_change_that_counts_is_named_with_both_values(tmp_path):
    run = tmp_path / "run"
    open_run(run, TINY, fresh=True)
    stages = tuple(replace(s, lr=0.5, lr_end=0.1) if s.name == "dit" else s for s in TINY.stages)
    for changed, said in (
        (replace(TINY, seed=5), r"\(seed: 0, now 5\)"),
        (replace(TINY, stages=stages), r"\(stages\.dit\.lr: 0\.005, now 0\.5\)"),
        (replace(TINY, data=replace(TINY.data, scenes=64)), r"\(data\.scenes: 48, now 64\)"),
    ):
        with pytest.raises(InputError, match=f"holds a run of another recipe {said}; give its own flags"):
            open_run(run, changed, fresh=False)


def test_a_change_late_in_a_long_setting_shows_where_it_begins(tmp_path):
    base = recipe("spar-1b")
    first, second = (replace(base, data=FilesData(sets=("set",), cache="/a" * 60 + end)) for end in ("/one", "/two"))
    open_run(tmp_path, first, fresh=True)
    with pytest.raises(InputError, match=r"\(data\.cache: \.\.\.[/a]+/one, now \.\.\.[/a]+/two\)"):
        open_run(tmp_path, second, fresh=False)
    longer = replace(first, data=replace(first.data, cache=first.data.cache + "/more"))
    with pytest.raises(InputError, match=r"/one, now \.\.\.[/a]+/one/more\)"):
        open_run(tmp_path, longer, fresh=False)
