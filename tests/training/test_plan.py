"""Plans: resolving is pure, and says where weights come from, what is prepared and what becomes void, or refuses."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from spar.checkpoints.safetensors_io import read_tensors
from spar.checkpoints.spar_format import has_part, load_model, load_teacher, save_model
from spar.common.config import read_json, to_dict, write_json
from spar.common.errors import InputError
from spar.recipes import recipe
from spar.recipes.shapes.dense_tagging import TagWordsObjective
from spar.training.checkpoint import load_group, read_meta, save_folder, write_meta
from spar.training.files_data import FilesData
from spar.training.objectives.next_token import NextTokenObjective
from spar.training.objectives.tokenizer import TokenizerObjective
from spar.training.objectives.unified import UnifiedObjective
from spar.training.plan import InitFolder, Origin, RunStatus, StageStart, read_init_folder, read_run, resolve
from spar.training.run_folder import check_run, read_recipe
from spar.training.trainer import train

TINY = recipe("tiny")
NAMES = [stage.name for stage in TINY.stages]
TOKENIZER, UNIFIED = NAMES.index("tokenizer-1"), NAMES.index("unified-1")
RUN = Path("runs/tiny")
MODEL = InitFolder(Path("model"), is_model=True)
BUILT = InitFolder(
    Path("built"), is_model=True, holds=frozenset({"pixel_encoder"}),
    parts={"tokenizer.semantic_stream": "random weights of seed 0", "language": "mllm"},
)  # fmt: skip


WITHOUT_TAGS = replace(
    TINY,
    stages=tuple(
        replace(one, objective=TagWordsObjective()) if one.name.startswith("mllm") else one for one in TINY.stages
    ),
)


def plan(*stages: str, init: InitFolder | None = None, done=(), states=(), **settings):
    status = RunStatus(RUN, dict.fromkeys(done, 3), dict.fromkeys(states, 2), init)
    return resolve(TINY, status, stages=stages, **settings)


def test_parts_that_start_anew_are_prepared_as_random_ones_are():
    left_out = plan("unified-1", init=MODEL, reinitialize=("model.connector.*",)).stages[0]
    assert left_out.prepares == ("random weights for model.connector.*", "connector from LLM")
    assert left_out.reinitialize == ("model.connector.*",)
    other = plan("unified-1", "unified-2", init=MODEL, reinitialize=("model.denoiser.*",))
    assert other.stages[0].prepares == ("random weights for model.denoiser.*",)  # the folder's connector is trained
    assert other.stages[1].reinitialize == () and "teacher mean" in other.stages[1].prepares
    stage = InitFolder(Path("unified-1/done"), is_model=False, kind="unified")
    for pattern, copied in (("model.connector.layers.*", True), ("model.connector.queries", False)):
        for folder in (MODEL, stage):
            prepared = plan("unified-1", init=folder, reinitialize=(pattern,)).stages[0].prepares
            assert ("connector from LLM" in prepared) == copied
    resumed = plan("unified-1", init=MODEL, states=("unified-1",), resume=True, reinitialize=("model.denoiser.*",))
    assert resumed.stages[0].reinitialize == ()
    with pytest.raises(InputError, match="--reinitialize: expected --init-from beside it"):
        plan("unified-1", done=("tokenizer-3",), reinitialize=("model.denoiser.*",))


def test_a_new_run_goes_from_random_weights_stage_by_stage():
    found = plan()
    assert [one.config.name for one in found.stages] == NAMES and found.fresh
    assert found.stages[0].start == StageStart("random")
    for before, one in zip(NAMES, found.stages[1:], strict=False):
        assert one.start == StageStart("stage", RUN / before / "done")
    prepared = {one.config.name: one.prepares for one in found.stages if one.prepares}
    centred = dict.fromkeys(NAMES[UNIFIED + 1 :], ("teacher mean",))
    assert prepared == {
        "mllm": ("tag embeddings",), "tokenizer-1": ("teacher from encoder",), "unified-1": ("connector from LLM",),
        **centred,
    }  # fmt: skip
    assert not any(one.invalidates for one in found.stages)


def test_a_resumed_run_skips_what_is_done_and_goes_on_in_the_stage_that_is_not():
    found = plan(done=NAMES[:TOKENIZER], states=["tokenizer-1"], resume=True)
    assert [one.skipped for one in found.stages] == [i < TOKENIZER for i in range(len(NAMES))] and not found.fresh
    assert found.stages[TOKENIZER].start == StageStart("state", RUN / "tokenizer-1" / "state", 2)
    assert found.stages[TOKENIZER].prepares == ()  # the state has it all
    assert found.stages[TOKENIZER + 1].start.source == "stage" and found.init_from is None


def test_a_stage_trained_anew_makes_all_later_ones_void():
    found = plan("tokenizer-2", "unified-1", done=NAMES)
    assert found.stages[0].invalidates == tuple(NAMES[TOKENIZER + 1 :]) and found.stages[1].invalidates == ()
    assert found.stages[1].start == StageStart("stage", RUN / "tokenizer-2" / "done")
    with pytest.raises(
        InputError, match="stage tokenizer-2 starts from the end of tokenizer-1, which is not in runs/tin"
    ):
        plan("tokenizer-2")


def test_a_run_that_has_begun_ignores_the_folder_that_it_started_from():
    assert plan(init=MODEL, resume=True).init_from == MODEL.path  # its first stage has not
    begun = plan("unified-2", init=MODEL, states=["unified-2"], resume=True)
    assert begun.stages[0].start.source == "state" and begun.init_from is None


def test_a_run_that_began_later_is_not_resumed_from_its_first_stage_on():
    """`--resume auto` without the `--stage` of the first command began at the first stage and removed all the rest."""
    said = r"has an end or a state of unified-2 but none of encoder, .*such as --stage unified-2 --stage unified-3; to"
    for progress in ({"states": ["unified-2"]}, {"done": ["unified-2"]}):
        with pytest.raises(InputError, match=said):
            plan(init=MODEL, resume=True, **progress)
    damaged = RunStatus(RUN, damaged={"unified-2": "a reason"})
    with pytest.raises(InputError, match=said):
        resolve(TINY, damaged, resume=True)
    named = plan("unified-2", "unified-3", init=MODEL, states=["unified-2"], resume=True)
    assert named.stages[0].start.source == "state"
    with pytest.raises(InputError, match="a state of dit but none of mllm, .*such as --stage encoder --stage dit "):
        plan(done=["encoder", "dit"], resume=True)
    assert plan("mllm", done=["encoder", "dit"]).stages[0].invalidates == ("dit",)  # to train it anew it is named


@pytest.mark.parametrize("place", ["model", "adapter", "unified-3/done", "unified-3/state"])
def test_a_training_does_not_start_from_what_it_removes(place):
    for stages in (("unified-2", "unified-3"), ("unified-3",)):
        with pytest.raises(InputError, match=f"--init-from: expected a folder that the training of {stages[0]} in .* "
                           f"does not remove, got {RUN / place}; give the run another folder"):  # fmt: skip
            plan(*stages, init=replace(MODEL, path=RUN / place))
    with pytest.raises(InputError, match="--teacher: expected a folder that the training of tokenizer-3 in .*does not"):
        plan("tokenizer-3", done=NAMES, teacher=RUN / place)
    kept = InitFolder(RUN / "unified-1" / "done", is_model=False, kind="unified")
    assert plan("unified-3", init=kept).init_from == kept.path
    assert plan("unified-3", init=replace(MODEL, path=Path("runs/tiny-2") / place)).stages
    done = plan("unified-3", init=replace(MODEL, path=RUN / place), done=["unified-3"], resume=True)
    assert done.stages[0].skipped  # nothing is removed


def test_a_link_does_not_hide_what_a_training_removes(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    status = RunStatus(tmp_path / "run", init=replace(MODEL, path=tmp_path / "latest" / "model"))
    with pytest.raises(InputError, match="--init-from: expected a folder that the training of unified-3"):
        resolve(TINY, status, stages=("unified-3",))


def test_a_plan_that_is_only_shown_may_lack_data_and_published_weights():
    full = recipe("spar-1b")
    with pytest.raises(InputError, match="no data source given"):
        resolve(full, RunStatus(RUN))
    with pytest.raises(InputError, match="model.denoiser, pixel_encoder would start from random weights"):
        resolve(replace(full, data=FilesData(sets=("a.tar",))), RunStatus(RUN))
    found = resolve(full, RunStatus(RUN), only_shown=True)
    assert [one.config for one in found.stages] == [*full.stages] and found.stages[0].start == StageStart("random")
    with pytest.raises(InputError, match="data.source files has .* nothing for encoder"):  # data that do not suit
        resolve(replace(TINY, data=FilesData(sets=("a.tar",))), RunStatus(RUN), only_shown=True)


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words_begin_at_the_tags_where_the_objective_says_so_but_a_model_knows_its_words():
    stage = TINY.stage("mllm")
    before = Origin(before=TINY.stage("encoder"))
    assert stage.objective.preparations(TINY, stage, before) == ("tag embeddings",)
    assert NextTokenObjective().preparations(TINY, stage, before) == ()
    assert resolve(WITHOUT_TAGS, RunStatus(RUN, {}, {}, MODEL), stages=("mllm",)).stages[0].prepares == ()
    assert plan(done=["encoder"], states=["mllm"], resume=True).stages[1].prepares == ()  # the state has them


# ---- the semantic teacher --------------------------------------------------------------------------------------------


def test_the_teacher_is_taken_before_the_first_tokenizer_stage_alone():
    """Copied at every semantic stage, it would drift with the encoder that it is to hold."""
    stages = tuple(
        replace(s, objective=replace(s.objective, semantic=1.0)) if isinstance(s.objective, TokenizerObjective) else s
        for s in TINY.stages
    )
    found = resolve(replace(TINY, stages=stages), RunStatus(RUN))
    taken = [one.config.name for one in found.stages if "teacher from encoder" in one.prepares]
    assert taken == ["tokenizer-1"]


def test_a_second_semantic_stage_keeps_the_teacher_of_the_first(tmp_path):
    """As tokenizer-448 of spar-1b follows tokenizer-3, which trains the encoder."""
    last = TINY.stage("tokenizer-3")
    again = replace(last, name="tokenizer-4")
    index = NAMES.index("tokenizer-3") + 1
    longer = replace(TINY, stages=(*TINY.stages[:index], again, *TINY.stages[index:]))
    train(longer, tmp_path / "run", stages=("encoder",))
    for name in ("tokenizer-1", "tokenizer-3", "tokenizer-4"):
        before = {"tokenizer-1": "encoder", "tokenizer-3": "tokenizer-1", "tokenizer-4": "tokenizer-3"}[name]
        train(longer, tmp_path / "run", stages=(name,), init_from=tmp_path / "run" / before / "done")
    ends = {name: load_group(tmp_path / "run" / name / "done", "modules") for name in ("encoder", "tokenizer-4")}
    drifted = 0
    for key, value in ends["encoder"].items():
        if key.startswith("model.tokenizer.encoder."):
            teacher = ends["tokenizer-4"][key.replace("model.tokenizer.encoder.", "teacher.")]
            assert torch.equal(teacher, value), key
            drifted += not torch.equal(ends["tokenizer-4"][key], value)
    assert drifted


def test_a_model_keeps_its_teacher_in_a_file_of_its_own(tiny_run):
    folder = tiny_run.path / "model"
    assert has_part(folder, "teacher") and read_json(folder / "manifest.json")["teacher"]
    before = load_group(tiny_run.path / "dit" / "done", "modules")
    for name, value in load_teacher(folder).state_dict().items():
        assert torch.equal(value, before[f"model.tokenizer.encoder.{name}"]), name
    trained = load_model(folder).model.tokenizer.encoder.state_dict()
    assert any(not torch.equal(value, trained[name]) for name, value in load_teacher(folder).state_dict().items())
    assert set(read_tensors(folder / "teacher" / "model.safetensors")) == set(trained)


def test_a_folder_with_a_teacher_gives_it_and_one_without_says_so():
    with_one = replace(MODEL, holds=frozenset({"teacher", "pixel_encoder"}))
    found = plan("tokenizer-3", init=with_one).stages[0]
    assert found.prepares == ("teacher from folder",) and found.teacher_folder == with_one.path
    without = replace(MODEL, holds=frozenset({"pixel_encoder"}))
    with pytest.raises(InputError, match="model keeps no semantic teacher .*--teacher FOLDER"):
        plan("tokenizer-3", init=without)
    named = plan("tokenizer-3", init=without, teacher=Path("built")).stages[0]
    assert named.prepares == ("teacher from folder",) and named.teacher_folder == Path("built")
    assert plan("tokenizer-3", init=BUILT).stages[0].prepares == ("teacher from encoder",)
    dit = InitFolder(Path("dit/done"), is_model=False, kind="dit")
    assert plan("tokenizer-3", init=dit).stages[0].prepares == ("teacher from encoder",)
    tokenizer = replace(dit, kind="tokenizer")
    kept = replace(tokenizer, holds=frozenset({"teacher"}))
    assert plan("tokenizer-3", init=kept).stages[0].prepares == ()
    with pytest.raises(InputError, match="keeps no semantic teacher"):  # of a recipe whose stages read none
        plan("tokenizer-3", init=tokenizer)


def test_a_stages_end_says_whether_it_holds_a_teacher(tiny_run, tmp_path):
    assert "teacher" in read_init_folder(TINY, tiny_run.path / "tokenizer-3" / "done").holds
    tensors = load_group(tiny_run.path / "tokenizer-3" / "done", "modules")
    without = {k: v for k, v in tensors.items() if not k.startswith("teacher.")}
    save_folder(tmp_path / "done", {"modules": without}, {"config": {"objective": {"kind": "tokenizer"}}})
    found = read_init_folder(TINY, tmp_path / "done")
    assert ("teacher" in found.holds, found.kind, found.is_model) == (False, "tokenizer", False)


def test_training_takes_the_teacher_that_is_named(tiny_run, tmp_path):
    run = tmp_path / "run"
    source = tiny_run.path / "tokenizer-2" / "done"
    train(TINY, run, stages=("tokenizer-3",), init_from=source, teacher=tiny_run.path / "model")
    kept, given = (
        load_group(run / "tokenizer-3" / "done", "modules"),
        load_teacher(tiny_run.path / "model").state_dict(),
    )
    assert all(torch.equal(kept[f"teacher.{name}"], value) for name, value in given.items())


# ---- the connector ---------------------------------------------------------------------------------------------------


def test_a_trained_connector_is_not_overwritten_by_the_llms_layers(tiny_run, tmp_path):
    """Only one that no unified stage has trained starts as the LLM's last layers."""
    model = tiny_run.path / "model"
    stages = tuple(replace(s, lr=1e-12, lr_end=0.0) if s.name == "unified-1" else s for s in TINY.stages)
    train(replace(TINY, stages=stages), tmp_path / "run", stages=("unified-1",), init_from=model)
    ours = load_group(tmp_path / "run" / "unified-1" / "done", "modules")
    for name, value in load_model(model).model.connector.state_dict().items():
        assert torch.allclose(ours[f"model.connector.{name}"], value, atol=1e-6), name
    assert plan("unified-1", init=MODEL).stages[0].prepares == ()
    trained = InitFolder(Path("unified-2/done"), is_model=False, kind="unified")
    assert plan("unified-1", init=trained).stages[0].prepares == ()
    for kind in ("tokenizer", "dit"):
        fresh = replace(trained, kind=kind)
        assert plan("unified-1", init=fresh).stages[0].prepares == ("connector from LLM",)


# ---- folders that do not suit a stage --------------------------------------------------------------------------------


def test_a_unified_stage_does_not_start_on_a_tokenizer_of_random_streams(tiny_run, tmp_path):
    with pytest.raises(
        InputError, match="tokenizer of built is not trained yet: tokenizer.semantic_stream have random"
    ):
        plan("unified-1", init=BUILT)
    bundle = load_model(tiny_run.path / "model")
    save_model(bundle, tmp_path / "built")
    write_json(tmp_path / "built" / "manifest.json", {"parts": dict(BUILT.parts)})
    assert read_init_folder(TINY, tmp_path / "built").random_streams == ("tokenizer.semantic_stream",)
    with pytest.raises(InputError, match="is not trained yet"):
        train(TINY, tmp_path / "run", stages=("unified-1",), init_from=tmp_path / "built")
    assert not (tmp_path / "run").exists()


def test_a_converted_tokenizer_serves_a_unified_stage_though_its_pixel_stream_is_random():
    """As `spar convert` leaves it: the fusion passes the semantic stream on."""
    parts = {
        "tokenizer.semantic_stream": "unilip", "tokenizer.pixel_stream": "random weights of seed 0",
        "tokenizer.fusion": "passes the semantic stream on: its learned part starts at zero",
    }  # fmt: skip
    converted = replace(MODEL, parts=parts, holds=frozenset({"pixel_encoder"}))
    assert plan("unified-1", init=converted).stages[0].prepares == ()
    assert plan("tokenizer-3", init=converted).stages[0].prepares == ("teacher from encoder",)


@pytest.mark.parametrize("stage", ["autoencoder", "dit", "tokenizer-1"])
def test_a_stage_that_reads_the_pixel_encoder_wants_a_folder_with_one(stage):
    with pytest.raises(InputError, match=f"stage {stage} needs the autoencoder's encoder, which model does not hold"):
        plan(stage, init=MODEL)


def test_a_folder_that_is_neither_a_model_nor_a_stages_end_is_refused(tmp_path):
    status = read_run(TINY, tmp_path / "run", tmp_path)
    with pytest.raises(InputError, match=f"^--init-from: expected a finished stage .*, got '{tmp_path}'$"):
        resolve(TINY, status, stages=("unified-1",))
    assert status.init is None and not list(tmp_path.iterdir())


def test_a_folder_that_has_gone_is_missed_where_a_stage_starts_from_it_alone():
    fault = "--init-from: expected a finished stage, got 'gone'"
    status = RunStatus(RUN, init_fault=fault)
    chosen = {"stages": ("unified-1", "unified-2"), "reinitialize": ("model.router.*",)}
    for resume, said in ((False, fault), (True, f"{fault}; {RUN} has no state of unified-1 yet, which still starts")):
        with pytest.raises(InputError, match=f"^{said}"):
            resolve(TINY, status, resume=resume, **chosen)
    for begun, source in (({"states": {"unified-1": 2}}, "state"), ({"done": {"unified-1": 3}}, "done")):
        found = resolve(TINY, replace(status, **begun), resume=True, **chosen)
        assert [one.start.source for one in found.stages] == [source, "stage"] and found.init_from is None
        with pytest.raises(InputError, match=f"^{fault}$"):  # trained anew, it starts from there
            resolve(TINY, replace(status, **begun), **chosen)


def test_looking_at_a_run_reads_it_and_writes_nothing(tiny_run):
    before = sorted(tiny_run.path.rglob("*"))
    status = read_run(TINY, tiny_run.path, tiny_run.path / "model")
    assert list(status.done) == NAMES and not status.states and status.init and "teacher" in status.init.holds
    assert sorted(tiny_run.path.rglob("*")) == before
    assert all(one.skipped for one in resolve(TINY, status, resume=True).stages)


def test_centring_that_is_off_measures_nothing():
    """512 images were decoded and encoded for a mean that no loss read."""
    off = replace(TINY, alignment=replace(TINY.alignment, center=False))
    assert not any("teacher mean" in one.prepares for one in resolve(off, RunStatus(RUN)).stages)


# ---- what a plan must not get wrong ----------------------------------------------------------------------------------


def test_the_end_of_a_stage_that_does_not_name_its_objective_is_refused(tiny_run, tmp_path):
    """Such as an earlier version wrote: unknown is not blank, or a trained connector would be written over."""
    shutil.copytree(tiny_run.path / "unified-1" / "done", tmp_path / "done")
    meta = read_meta(tmp_path / "done")
    meta["config"] = {**{key: value for key, value in meta["config"].items() if key != "objective"}, "step": "unified"}
    write_meta(tmp_path / "done", meta)
    with pytest.raises(InputError, match="was made by an earlier version of spar"):
        read_init_folder(TINY, tmp_path / "done")


def test_a_plan_lists_saved_states_and_the_model_among_what_becomes_void():
    status = RunStatus(RUN, dict.fromkeys(NAMES[: UNIFIED + 1], 3), {"unified-2": 2}, model_parts=("model",))
    found = resolve(TINY, status, stages=("tokenizer-3", "unified-1"))
    assert found.stages[0].invalidates == ("tokenizer-3", "unified-1", "unified-2 (state)", "model")
    assert found.stages[1].invalidates == ()
    own = resolve(TINY, replace(status, states={"unified-3": 2}), stages=("unified-3",), resume=True)
    assert own.stages[0].invalidates == ("model",)  # its own state goes on


@pytest.mark.parametrize("stages", [("unified-1", "tokenizer-3"), ("dit", "dit")])
def test_stages_out_of_order_or_named_twice_are_refused(stages):
    with pytest.raises(InputError, match=f"in the recipe's order, each once, got {', '.join(stages)}"):
        plan(*stages, done=NAMES)


def test_a_teacher_for_a_run_that_begins_with_another_stage_is_refused():
    with pytest.raises(InputError, match="--teacher is for a run that begins with a tokenizer stage, not with encoder"):
        plan(teacher=Path("model"))


def test_an_objective_that_extends_another_counts_as_it():
    @dataclass(frozen=True)
    class Mine(UnifiedObjective):
        kind: ClassVar[str] = "mine"

    stages = tuple(
        replace(one, objective=Mine(align=0.5, noise_samples=2)) if one.name == "unified-2" else one
        for one in TINY.stages
    )
    found = resolve(replace(TINY, stages=stages), RunStatus(RUN))
    assert [one.config.name for one in found.stages if "connector from LLM" in one.prepares] == ["unified-1"]
    folder = InitFolder(Path("done"), is_model=False, kind="mine")
    assert Origin(folder).made_by(UnifiedObjective) and not Origin(folder).made_by(TokenizerObjective)


def test_the_end_of_an_unknown_objective_needs_a_teacher():
    """Its encoder may have been trained: it is no teacher, unlike that of a foundation."""
    folder = InitFolder(Path("done"), is_model=False, kind="mine")
    with pytest.raises(InputError, match="keeps no semantic teacher"):
        plan("tokenizer-3", init=folder)
    assert plan("tokenizer-3", init=replace(folder, holds=frozenset({"teacher"}))).stages[0].prepares == ()
    assert plan("tokenizer-3", init=replace(folder, kind="dit")).stages[0].prepares == ("teacher from encoder",)


def test_words_begin_at_the_tags_where_they_are_random_and_nowhere_else():
    found = resolve(TINY, RunStatus(RUN))
    assert [one.config.name for one in found.stages if "tag embeddings" in one.prepares] == ["mllm"]
    heads = frozenset({"dense_head"})
    for kind, prepares in (("dense_tagging", ("tag embeddings",)), ("next_token", ()), ("unified", ())):
        folder = InitFolder(Path("done"), is_model=False, kind=kind, holds=heads)
        assert plan("mllm-2", init=folder).stages[0].prepares == prepares


@pytest.mark.parametrize("lacking", [{"prompt_share": 0.0}, {"edit_prompts": 0.0}])
def test_tags_after_an_edit_need_edits_among_the_prompts(lacking):
    stage = TINY.stage("mllm-2")
    given = replace(stage, data=replace(stage.data, layouts=False, **lacking))
    with pytest.raises(InputError, match=r"stage mllm-2: edit_tags 1\.0 needs edits or layouts among the prompts"):
        replace(TINY, stages=tuple(given if one is stage else one for one in TINY.stages))


def test_tags_after_an_edit_need_the_read_outs_which_a_model_folder_lacks():
    folder = InitFolder(Path("model"), is_model=True)
    with pytest.raises(InputError, match=r"stage mllm-2: edit_tags reads .* which model does not hold"):
        plan("mllm-2", init=folder)
    assert resolve(WITHOUT_TAGS, RunStatus(RUN, {}, {}, folder), stages=("mllm-2",)).stages[0].prepares == ()


def test_what_a_stage_refuses_to_prepare_leaves_the_run_as_it_was(tiny_run, tmp_path):
    shutil.copytree(tiny_run.path, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(InputError, match="expected a SPAR"):
        train(TINY, tmp_path / "run", stages=("tokenizer-3",), teacher=tmp_path / "nowhere")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert (tmp_path / "run" / "tokenizer-3" / "done").is_dir() and (tmp_path / "run" / "model").is_dir()


def test_the_run_of_an_earlier_version_is_refused_as_such(tmp_path):
    values = to_dict(TINY)
    write_json(tmp_path / "recipe.json", {key: value for key, value in values.items() if key != "kind"})
    for refused in (lambda: check_run(tmp_path, TINY, fresh=False), lambda: read_recipe(tmp_path / "recipe.json", {})):
        with pytest.raises(InputError, match="written by an earlier version of spar"):
            refused()



def test_damaged_states_bar_no_stage_that_does_not_resume_from_them(tiny_run, tmp_path):
    """Of a stage that is done they are nothing, and a stage that is trained anew asks for none."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run.path / "dit", run / "dit")
    for stage in ("dit", "unified-2"):
        (run / stage / "state").mkdir(parents=True)
    status = read_run(TINY, run)
    assert "dit" in status.done and set(status.damaged) == {"unified-2"} and not status.states
    with pytest.raises(InputError, match="unified-2: no saved state is whole: state .meta.json is missing"):
        resolve(TINY, status, stages=("unified-2",), resume=True, from_scratch=True)
    init = replace(status, init=InitFolder(Path("x"), False, "unified"))
    found = resolve(TINY, init, stages=("unified-2",)).stages[0]
    assert found.start.source == "folder" and found.invalidates == ("unified-2 (damaged)",)


def test_a_damaged_end_bars_no_stage_that_does_not_need_it(tiny_run, tmp_path):
    """It barred every command, `--stage dit` too, which the message advised."""
    run = tmp_path / "run"
    for stage in NAMES[: TOKENIZER + 1]:
        shutil.copytree(tiny_run.path / stage, run / stage)
    (run / "dit" / "done" / "meta.json").write_text("{")
    status, said = read_run(TINY, run), "the end of stage dit is damaged .*train the stage anew .--stage dit."
    assert set(status.damaged) == {"dit"} and "dit" not in status.done
    for stages, resume in (((), True), (("tokenizer-1",), False), (("dit",), True)):
        with pytest.raises(InputError, match=said):
            resolve(TINY, status, stages=stages, resume=resume)
    again = resolve(TINY, status, stages=("dit",)).stages[0]
    assert again.start.source == "stage" and again.invalidates == ("dit (damaged)", "tokenizer-1")
    assert resolve(TINY, status, stages=("mllm",), resume=True).stages[0].skipped
    shutil.copytree(run / "mllm" / "done", run / "dit" / "state")
    saved = resolve(TINY, read_run(TINY, run), stages=("dit",), resume=True).stages[0]
    assert saved.start.source == "state"  # it goes on from its whole state
