"""Trackers see what is logged, at the step of the whole run; one that fails stops nothing, and one that is not there is
refused before the training.
"""

import json
import os
import sqlite3
import struct
import sys
from contextlib import closing, nullcontext, suppress
from types import SimpleNamespace

import pytest

from spar.common.errors import InputError
from spar.recipes import recipe
from spar.training.trackers import flat, places, tracked


class Fake:
    requires_logging_directory = False
    made: list["Fake"] = []
    fails = ""

    def __init__(self, project: str) -> None:
        self.project, self.seen = project, []
        Fake.made.append(self)

    def __getattr__(self, name):
        def called(*given, **keywords):
            if name == Fake.fails:
                raise ConnectionError("no network\nat all")
            self.seen.append((name, *given, *keywords.values()))

        return called


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"fake": Fake, "absent": Fake})
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["fake"])
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "fails", "")
    return Fake


def test_a_tracker_sees_the_run(fake, tmp_path):
    tiny, reports = recipe("tiny"), []
    with tracked(["fake", "fake"], tiny, tmp_path, lambda *given: reports.append(given)) as report:
        report("mllm", 1, 3, {"loss": 2.0})
    (made,) = fake.made
    names = [one[0] for one in made.seen]
    assert (made.project, names) == ("tiny", ["start", "store_init_configuration", "log", "finish"])
    assert made.seen[1][1]["stages.mllm.steps"] == 3 and made.seen[1][1]["seed"] == 0
    assert made.seen[2][1:] == ({"mllm/loss": 2.0}, 4)  # the encoder's three steps came before
    assert reports == [("mllm", 1, 3, {"loss": 2.0})]


@pytest.mark.parametrize("fault", ["log", "finish"])
def test_a_tracker_that_fails_stops_nothing(fake, tmp_path, monkeypatch, caplog, fault):
    monkeypatch.setattr(fake, "fails", fault)
    with tracked(["fake"], recipe("tiny"), tmp_path, None) as report:
        for step in range(3):
            report("mllm", step, 3, {"loss": 2.0})
    assert len(fake.made[0].seen) == (2 if fault == "log" else 5)
    assert caplog.text.count("the tracker fake failed and is left out from here: no network") == 1


@pytest.mark.parametrize(
    ("name", "failed", "stopped"),
    [
        ("wandb", [("run.finish", 1)], [("run.finish", 1)]),
        ("mlflow", [("end_run", "FAILED")], [("end_run", "KILLED")]),
        ("swanlab", [("run.finish", "crashed", "loss is nan")], [("run.finish", "aborted", "KeyboardInterrupt")]),
        ("clearml", [("finish",), ("run.mark_failed", True)], [("finish",), ("run.mark_stopped", True)]),
        ("trackio", [("finish",)], [("finish",)]),  # which knows of no status
    ],
)
def test_a_tracker_is_told_how_the_run_has_ended(fake, tmp_path, monkeypatch, name, failed, stopped):
    seen = []

    class Client:
        """A tracker's own run, and the module mlflow."""

        def __init__(self, prefix: str = "") -> None:
            self.prefix = prefix

        def __getattr__(self, method):
            return lambda *given, **keywords: seen.append((self.prefix + method, *given, *keywords.values()))

    class Tracker(fake):
        tracker = Client("run.")

        def finish(self) -> None:
            seen.append(("finish",))

    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {name: Tracker})
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [name])
    monkeypatch.setattr("spar.training.trackers.places", lambda *_: {})
    monkeypatch.setitem(sys.modules, "mlflow", Client())
    ends = {None: [("finish",)], RuntimeError("loss is nan"): failed, KeyboardInterrupt(): stopped}
    for failure, wanted in ends.items():
        seen.clear()
        ending = pytest.raises(type(failure)) if failure else nullcontext()
        with ending, tracked([name], recipe("tiny"), tmp_path, None):
            if failure:
                raise failure
        assert seen == wanted


def test_where_a_second_tracker_cannot_be_opened_the_first_is_finished(fake, tmp_path, monkeypatch):
    def offline(project):
        raise ConnectionError("no network")

    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"fake": Fake, "wandb": offline})
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["fake", "wandb"])
    monkeypatch.setattr(offline, "requires_logging_directory", False, raising=False)
    both = tracked(["fake", "wandb"], recipe("tiny"), tmp_path, None)
    with pytest.raises(InputError, match="cannot be opened"), both:
        pass
    assert fake.made[0].seen[-1] == ("finish",)


def test_where_one_tracker_is_not_there_none_is_opened(fake, tmp_path):
    with pytest.raises(InputError, match="not installed"), tracked(["fake", "absent"], recipe("tiny"), tmp_path, None):
        pass
    assert fake.made == []


def test_trackers_that_are_not_there_are_refused(fake, tmp_path, monkeypatch):
    for name, message in (("what", "--track: expected one of absent, fake, got 'what'"), ("absent", "not installed")):
        with pytest.raises(InputError, match=message), tracked([name], recipe("tiny"), tmp_path, None):
            pass
    monkeypatch.setattr(fake, "fails", "start")
    with pytest.raises(InputError, match="--track fake: it cannot be opened: no network$"):
        with tracked(["fake"], recipe("tiny"), tmp_path, None):
            pass
    with tracked([], recipe("tiny"), tmp_path, None) as report:
        assert report is None


def test_accelerates_own_tracker_writes_into_the_run(tmp_path, monkeypatch):
    """Without Accelerate's own state, which under a launcher would wait for the other processes."""
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    monkeypatch.setattr(PartialState, "_shared_state", {})
    assert {"wandb", "trackio", "mlflow", "tensorboard"} <= {*map(str, LOGGER_TYPE_TO_CLASS)}
    with tracked(["tensorboard"], recipe("tiny"), tmp_path, None) as report:
        report("mllm", 1, 3, {"loss": 2.0})
    assert [path for path in (tmp_path / "trackers").rglob("events*") if path.stat().st_size]
    assert PartialState._shared_state == {}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A home and a working directory of their own, and no variable of a tracker's but those that keep it offline."""
    for name in [one for one in os.environ if one.startswith(("WANDB_", "TRACKIO_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, value in {
        "HOME": tmp_path / "home", "XDG_CACHE_HOME": tmp_path / "home", "XDG_CONFIG_HOME": tmp_path / "home",
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": tmp_path / "trackio",
        "MLFLOW_TRACKING_URI": (tmp_path / "mlflow").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return tmp_path


def tell(name, run, failure=None):
    """A tracker's run of two steps, and perhaps of a failure."""
    with suppress(RuntimeError), tracked([name], recipe("tiny"), run, None) as report:
        report("mllm", 1, 3, {"loss": 2.0})
        report("mllm", 2, 3, {"loss": 0.5})
        if failure:
            raise failure


def wandb_records(path):
    """What wandb has written: a log of LevelDB's, in blocks of 32 KiB; a piece's length and kind precede it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (room := 2**15 - place % 2**15) < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_wandb_offline_has_the_run_and_writes_into_its_folder(elsewhere):
    wandb = pytest.importorskip("wandb")
    tell("wandb", elsewhere / "run")
    assert wandb.run is None  # finished
    (written,) = (elsewhere / "run" / "trackers" / "wandb").rglob("run-*.wandb")
    records = [*wandb_records(written)]
    assert {one.run.project for one in records if one.HasField("run")} == {"tiny"}
    config = {item.key: item.value_json for one in records for item in one.config.update}
    assert (config["stages.mllm.steps"], config["seed"]) == ("3", "0")
    rows = [{item.nested_key[0]: json.loads(item.value_json) for item in one.history.item} for one in records]
    seen = [(row["_step"], row["mllm/loss"]) for row in rows if "mllm/loss" in row]
    assert seen == [(4, 2.0), (5, 0.5)]  # the encoder's three steps came before
    assert [one.exit.exit_code for one in records if one.HasField("exit")] == [0]
    tell("wandb", elsewhere / "failed", RuntimeError("loss is nan"))
    (written,) = (elsewhere / "failed" / "trackers" / "wandb").rglob("run-*.wandb")
    assert [one.exit.exit_code for one in wandb_records(written) if one.HasField("exit")] == [1]
    assert not list((elsewhere / "here").iterdir())


def test_wandbs_own_variable_says_where_it_writes(elsewhere, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", "there")
    assert places("wandb", False, elsewhere / "run") == {} and not (elsewhere / "run").exists()
    monkeypatch.delenv("WANDB_DIR")
    assert places("wandb", False, elsewhere / "run") == {"dir": elsewhere / "run"} and (elsewhere / "run").is_dir()


@pytest.mark.slow
def test_mlflow_has_the_run(elsewhere):
    mlflow = pytest.importorskip("mlflow")
    tell("mlflow", elsewhere / "run")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    found = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "mllm/loss")]
    assert found == [(4, 2.0), (5, 0.5)]
    assert (run.data.params["stages.mllm.steps"], run.info.status) == ("3", "FINISHED")
    tell("mlflow", elsewhere / "failed", RuntimeError("loss is nan"))
    statuses = {one.info.status for one in client.search_runs([run.info.experiment_id])}
    assert statuses == {"FINISHED", "FAILED"} and mlflow.active_run() is None
    assert not list((elsewhere / "here").iterdir())


@pytest.mark.slow
def test_trackio_has_the_run(elsewhere):
    pytest.importorskip("trackio")
    tell("trackio", elsewhere / "run")
    with closing(sqlite3.connect(elsewhere / "trackio" / "tiny.db")) as file:
        rows = file.execute("select step, metrics from metrics order by step").fetchall()
        ((config,),) = file.execute("select config from configs").fetchall()
    assert [(step, json.loads(values)) for step, values in rows] == [(4, {"mllm/loss": 2.0}), (5, {"mllm/loss": 0.5})]
    assert json.loads(config)["stages.mllm.steps"] == 3
    assert not list((elsewhere / "here").iterdir())


def test_fields_are_flat_and_plain():
    values = {"a": {"b": 1, "c": None}, "stages": [{"name": "x", "lr": 0.1}], "list": [1, 2], "d": True}
    wanted = {"a.b": 1, "a.c": "", "stages.x.name": "x", "stages.x.lr": 0.1, "list": "[1, 2]", "d": True}
    assert flat(values) == wanted
    assert all(isinstance(value, str | int | float) for value in flat(SimpleNamespace(**values).__dict__).values())
