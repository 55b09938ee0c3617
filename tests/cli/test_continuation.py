"""What a training that was stopped says, in each of its phases: it is true of the folder, and its command goes on."""

import json
import os
import shlex
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from spar.cli.main import main
from spar.common.errors import InputError, PeerFailure
from spar.recipes import recipe
from spar.recipes.shapes.data import ShapesData
from spar.recipes.shapes.dense_tagging import DenseTaggingObjective
from spar.training import loop, trainer
from spar.training.loop import NonFiniteLoss
from spar.training.objectives.unified import UnifiedObjective

TINY = recipe("tiny")


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    """`said(words)`: what the command says at its end, and the command that it names, as words; it is to be stopped."""
    monkeypatch.chdir(tmp_path)

    def run(line, status=130):
        assert main(["train", "tiny", *shlex.split(line)]) == status
        (last,) = [one for one in capsys.readouterr().err.splitlines() if "with: spar train" in one]
        what, _, command = last.partition(" with: spar ")
        return what, command

    return run


def after(error: BaseException, cause: BaseException) -> BaseException:
    """An error as it is raised while another one is handled."""
    error.__context__ = cause
    return error


@pytest.fixture
def stop_in(monkeypatch):
    """`stop_in(owner, name)`: a signal comes as that function is called, or where `when` says; its return undoes it."""

    def patch(owner, name, when=lambda *_, **__: True, raised=None):
        plain = getattr(owner, name)

        def interrupted(*given, **keywords):
            if when(*given, **keywords):
                if raised is not None:
                    raise raised
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(*given, **keywords)

        monkeypatch.setattr(owner, name, interrupted)
        return lambda: monkeypatch.setattr(owner, name, plain)

    return patch


def planned(capsys, command):
    """A dry run of a command that was advised: it is not refused."""
    assert main([*shlex.split(command), "--dry-run"]) == 0
    printed = capsys.readouterr()
    return printed.out + printed.err


@pytest.mark.parametrize("resume", ["", " --resume auto"])
def test_before_the_folder_is_there_nothing_is_written_and_the_same_command_begins(said, stop_in, resume):
    stop_in(trainer, "starting_modules")
    assert said(f"--run 'my run'{resume}") == (
        "spar: stopped; the run has not begun; begin again", f"train tiny --run 'my run'{resume}"
    )  # fmt: skip
    assert not Path("my run").exists()


def test_a_fresh_run_whose_folder_is_there_goes_on_though_no_stage_has_begun(said, stop_in, capsys):
    stop_in(ShapesData, "open")
    what, command = said("--run r")
    assert what == "spar: stopped; stage encoder has not begun; go on"
    assert command == "train tiny --run r --resume auto" and not Path("r/encoder").exists()
    planned(capsys, command)
    assert main(["train", "tiny", "--run", "r"]) == 2  # which the same command would not: the folder holds a run
    assert "already holds a run" in capsys.readouterr().err
    assert said("--run r --resume auto") == (what, command)


@pytest.mark.parametrize("where", ["open", "prepare"])
def test_a_stage_that_was_to_be_trained_anew_is_so_by_the_same_command(tiny_run, said, stop_in, capsys, where):
    """Under --resume auto, which was advised, it is done: nothing would be trained."""
    shutil.copytree(tiny_run.path, "r")
    stop_in(*((ShapesData, "open") if where == "open" else (UnifiedObjective, "prepare")))
    what, command = said("--run r --stage unified-2")
    assert what == "spar: stopped; stage unified-2 has not begun, and nothing was removed; go on"
    assert command == "train tiny --run r --stage unified-2"
    assert (Path("r") / "unified-3" / "done").is_dir()
    assert "the end of unified-1" in planned(capsys, command)


def test_a_removal_that_is_broken_off_is_not_said_to_be_none(tiny_run, said, stop_in):
    shutil.copytree(tiny_run.path, "r")
    stop_in(shutil, "rmtree", lambda path, **_: Path(path).name == "model.trash" and path.exists(), KeyboardInterrupt)
    what, command = said("--run r --stage unified-2")
    assert what == "spar: stopped; stage unified-2 has not begun; go on" and not Path("r/model").exists()
    assert command == "train tiny --run r --stage unified-2"


def test_in_a_stage_the_saved_steps_are_told_and_a_later_set_up_loses_none(said, stop_in):
    undo = stop_in(loop, "train_step", lambda ctx, *_, **__: ctx.step == 1)
    what, command = said("--run r --stage encoder")
    assert what == "spar: stopped; stage encoder is saved after 2 of 3 steps; go on"
    assert command == "train tiny --run r --stage encoder --resume auto"
    undo()
    stop_in(ShapesData, "open")
    assert said("--run r --stage encoder --resume auto") == (what, command)


@pytest.mark.parametrize(
    ("raised", "status", "begins"),
    [
        (KeyboardInterrupt(), 130, "spar: stopped"),  # a second Ctrl-C
        (NonFiniteLoss("loss is nan"), 1, "spar: error: loss is nan"),
        (MemoryError(), 1, "spar: error: out of memory: try "),
        (PeerFailure("another process has ended"), 1, "spar: error: another process has ended"),
        (OSError(28, "No space left on device", "r/x"), 1, "spar: error: No space left on device: r/x"),
        (InputError("too many samples are bad"), 2, "spar: error: too many samples are bad"),
        (BrokenPipeError(), 141, "spar: stopped by a closed pipe"),
        (after(SystemExit(1), BrokenPipeError()), 141, "spar: stopped by a closed pipe"),  # Rich's
    ],
)
def test_a_stage_without_a_saved_state_begins_again(said, stop_in, raised, status, begins):
    """`resume from the last saved state`, it said, where there was none."""
    undo = stop_in(loop, "train_step", lambda ctx, *_, **__: ctx.step == 1, raised=raised)
    what, command = said("--run r --stage encoder", status)
    assert what.startswith(begins)
    assert what.endswith("; stage encoder has no saved state yet and will begin again; go on")
    assert command == "train tiny --run r --stage encoder --resume auto"
    undo()
    assert main(shlex.split(command)) == 0 and Path("r/encoder/done").is_dir()


def test_a_disk_that_is_full_at_a_stages_end_goes_on_from_its_saved_state(said, stop_in):
    undo = stop_in(loop, "train_step", lambda ctx, *_, **__: ctx.step == 1)
    saved, command = said("--run r --stage encoder")
    undo()
    undo = stop_in(loop, "end_stage", raised=OSError(28, "No space left on device"))
    what, again = said(command.removeprefix("train tiny "), 1)
    left = saved.removeprefix("spar: stopped; ")
    assert (what, again) == (f"spar: error: No space left on device; {left}", command)
    undo()
    assert main(shlex.split(command)) == 0 and Path("r/encoder/done").is_dir()


def test_where_the_models_folder_cannot_be_written_the_stages_are_done(tiny_run, said, stop_in):
    shutil.copytree(tiny_run.path, "r")
    undo = stop_in(type(TINY), "save", raised=OSError(28, "No space left on device"))
    what, command = said("--run r --resume auto", 1)
    assert what == "spar: error: No space left on device; its stages were done already; go on"
    undo()
    shutil.rmtree("r/model")
    assert main(shlex.split(command)) == 0 and Path("r/model/config.json").is_file()


def test_a_failure_that_is_not_known_has_its_traceback_and_the_command(stop_in, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stop_in(loop, "train_step", raised=ZeroDivisionError())
    with pytest.raises(ZeroDivisionError) as caught:
        main(["train", "tiny", "--run", "r", "--stage", "encoder"])
    begun = "stage encoder has no saved state yet and will begin again"
    assert caught.value.__notes__ == [
        f"spar: the training has failed; {begun}; go on with: spar train tiny --run r --stage encoder --resume auto"
    ]


def test_what_is_refused_before_a_stage_has_begun_names_no_command(capsys, stop_in, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stop_in(trainer, "execute", raised=InputError("a setting is wrong"))
    assert main(["train", "tiny", "--run", "r"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "spar: error: a setting is wrong"


def test_another_process_leaves_the_command_to_the_first(capsys, stop_in, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    stop_in(trainer, "execute", raised=PeerFailure("another process has ended"))
    assert main(["train", "tiny", "--run", "r"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "spar: error: another process has ended"


@pytest.mark.parametrize("raised", [None, NonFiniteLoss("loss is nan")])
def test_trackers_are_told_that_a_run_was_stopped_or_has_failed(said, stop_in, monkeypatch, raised):
    told = []

    @contextmanager
    def tracked(names, recipe, run, report):
        try:
            yield report
        except BaseException as error:
            told.append(type(error))
            raise

    monkeypatch.setattr("spar.training.trackers.tracked", tracked)
    stop_in(loop, "train_step", lambda ctx, *_, **__: ctx.step == 1, raised=raised)
    said("--run r --stage encoder", 1 if raised else 130)
    assert told == [NonFiniteLoss if raised else KeyboardInterrupt]


def test_between_stages_the_one_that_has_ended_is_done(said, stop_in):
    undo = stop_in(DenseTaggingObjective, "finish")
    what, command = said("--run r --stage encoder --stage mllm")
    assert what == "spar: stopped; stage encoder is done; go on"
    assert command == "train tiny --run r --stage encoder --stage mllm --resume auto" and not Path("r/mllm").exists()
    undo()
    stop_in(trainer, "starting_modules")
    what, again = said(command.removeprefix("train tiny "))
    assert (what, again) == ("spar: stopped; stage mllm has not begun; go on", command)


def test_a_signal_in_the_last_stages_end_lets_the_run_finish(stop_in, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    stop_in(DenseTaggingObjective, "finish")
    assert main(["train", "tiny", "--run", "r", "--stage", "encoder"]) == 0
    assert Path("r/encoder/done").is_dir() and "stopped" not in capsys.readouterr().err


def test_a_damaged_state_is_told_as_such(said, stop_in):
    stop_in(loop, "train_step", lambda ctx, *_, **__: ctx.step == 1)
    stop_in(loop.MetricsLogger, "close", lambda *_, **__: Path("r/encoder/state/meta.json").write_text("{"))
    assert said("--run r --stage encoder")[0] == "spar: stopped; stage encoder has left a damaged folder; go on"


def test_an_older_state_is_told_where_the_newest_is_not_whole(said, stop_in, capsys):
    """As the resumed run takes it; `no saved state yet and will begin again`, it said."""
    undo = stop_in(loop, "train_step", lambda ctx, *_, **__: ctx.step == 1)
    saved, command = said("--run r --stage encoder")
    undo()
    Path("r/encoder/state").rename("r/encoder/state.1")  # a kill in the next save leaves it so
    undo = stop_in(ShapesData, "open")
    assert said("--run r --stage encoder --resume auto") == (saved, command)
    undo()
    shutil.copytree("r/encoder/state.1", "r/encoder/state")
    Path("r/encoder/state/modules.safetensors").write_bytes(b"")
    stop_in(loop, "train_step", raised=KeyboardInterrupt)
    assert said("--run r --stage encoder --resume auto") == (saved, command)
    assert not Path("r/encoder/state").exists() and "its state after 2 steps" in planned(capsys, command)


def test_of_several_processes_the_command_needs_its_launcher(said, stop_in, monkeypatch):
    stop_in(trainer, "execute", raised=KeyboardInterrupt)
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    what = "spar: stopped; the run has not begun; begin again under the same launcher"
    assert said("--run r") == (what, "train tiny --run r")


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_the_command_goes_on_though_the_folder_that_gave_the_sizes_has_gone(tiny_run, said, stop_in, capsys, left):
    """They are those of the run then, whose folder has its name, and no refusal says that it holds another recipe."""
    shutil.copytree(tiny_run.path / "model", "given")
    for path in Path("given").rglob("config.json"):
        path.write_text(path.read_text().replace('"reference": "added"', '"reference": "replaced"'))
    config = json.loads(Path("given/config.json").read_text())["model"]
    assert config["connector"]["reference"] == "replaced" != TINY.model.connector.reference
    undo = stop_in(loop, "train_step", lambda ctx, *_, **__: ctx.step == 1)
    line = "--name 'r s' --stage unified-3 --init-from given"
    command = said(line)[1]
    undo()
    shutil.rmtree("given")
    if left == "an empty folder":
        Path("given").mkdir()
    plan = planned(capsys, command)
    assert "its state after 2 steps" in plan
    assert "note: the run has begun and goes on without what it started from: --init-from: " in plan
    assert main(["train", "tiny", *shlex.split(line), "--dry-run"]) == 2  # anew, it needs the folder
    assert capsys.readouterr().err.startswith("spar: error: --init-from: expected a finished stage")
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out.endswith("--model 'runs/r s/model'\n")
    assert json.loads(Path("runs/r s/model/config.json").read_text())["model"] == config
