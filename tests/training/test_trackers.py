"""Trackers see what is logged, at the step of the whole run; one that fails stops nothing, and one that is not there is
refused before the training.
"""

from types import SimpleNamespace

import pytest

from spar.common.errors import InputError
from spar.recipes import recipe
from spar.training.trackers import flat, tracked


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


def test_fields_are_flat_and_plain():
    values = {"a": {"b": 1, "c": None}, "stages": [{"name": "x", "lr": 0.1}], "list": [1, 2], "d": True}
    wanted = {"a.b": 1, "a.c": "", "stages.x.name": "x", "stages.x.lr": 0.1, "list": "[1, 2]", "d": True}
    assert flat(values) == wanted
    assert all(isinstance(value, str | int | float) for value in flat(SimpleNamespace(**values).__dict__).values())
