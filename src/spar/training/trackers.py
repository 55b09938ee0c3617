"""Experiment trackers beside a run's own metrics, off by default: those that Accelerate knows (wandb, trackio, ...).

A tracker sees what is logged, under `STAGE/NAME` at the step of the whole run, and the recipe's fields. What it sends,
and where, is its own: its environment variables say (WANDB_MODE=offline, MLFLOW_TRACKING_URI, ...). The files of wandb,
and of those that ask for a folder, lie in `RUN/trackers`. A tracker that fails is left out from then on; the training
goes on. One that knows how a run has ended is told so: that it has failed, or was stopped.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

from spar.common.config import to_dict
from spar.common.errors import InputError, first_line
from spar.training.config import Recipe
from spar.training.loop import Report

log = logging.getLogger("spar.training")


class _Log(logging.LoggerAdapter):
    """A logger with the method that Accelerate's own has."""

    def warning_once(self, *given: Any, **keywords: Any) -> None:
        self.warning(*given, **keywords)


@contextmanager
def tracked(names: Sequence[str], recipe: Recipe, run: Path, report: Report | None) -> Iterator[Report | None]:
    """A report that also tells trackers; they are opened here and finished at the end.

    The run has failed where the block raises, and was stopped where that is a KeyboardInterrupt.

    Raises:
        InputError: a tracker that there is not, whose package is missing, or which cannot be opened.
    """
    if not names:
        yield report
        return
    opened: dict[str, Any] = {}
    ends = dict(zip((stage.name for stage in recipe.stages), accumulate(s.steps for s in recipe.stages), strict=True))

    def attempt(name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of its network, disk or client
            log.warning("the tracker %s failed and is left out from here: %s", name, first_line(error))
            opened.pop(name, None)

    def reported(stage: str, step: int, steps: int, values: dict[str, float]) -> None:
        named, whole = {f"{stage}/{name}": value for name, value in values.items()}, ends[stage] - steps + step
        for name, tracker in list(opened.items()):
            attempt(name, lambda: tracker.log(named, step=whole))  # noqa: B023  # called at once
        if report:
            report(stage, step, steps, values)

    def finish(failure: BaseException | None) -> None:
        for name, tracker in list(opened.items()):
            attempt(name, lambda: _finish(name, tracker, failure))  # noqa: B023  # called at once

    check_trackers(names)
    try:
        for name in dict.fromkeys(names):
            opened[name] = _open(name, recipe, run)
        yield reported
    except BaseException as error:
        finish(error)
        raise
    finish(None)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what cannot be opened, before anything is.

    Raises:
        InputError: a tracker that there is not, or whose package is missing.
    """
    from accelerate import tracking

    known = {str(key) for key in tracking.LOGGER_TYPE_TO_CLASS}
    available = {str(one) for one in tracking.get_available_trackers()} if names else set()
    for name in names:
        if name not in known:
            raise InputError(f"--track: expected one of {', '.join(sorted(known))}, got {name!r}")
        if name not in available:
            raise InputError(f"--track {name}: its package is not installed: pip install {name}")


def _open(name: str, recipe: Recipe, run: Path) -> Any:
    """A started tracker: its project is the recipe, its folder the run's, where it wants one."""
    from accelerate import tracking

    known = {str(key): found for key, found in tracking.LOGGER_TYPE_TO_CLASS.items()}
    try:
        tracker = known[name](recipe.name, **places(name, known[name].requires_logging_directory, run / "trackers"))
        # Only the main process is here: Accelerate's own state, which would join all processes, is not needed.
        tracker.main_process_only = False
        tracking.logger = _Log(log, {})
        tracker.start()
        tracker.store_init_configuration(flat(to_dict(recipe)))
    except Exception as error:  # no network, no login, no such server
        raise InputError(f"--track {name}: it cannot be opened: {first_line(error)}") from error
    return tracker


def _finish(name: str, tracker: Any, failure: BaseException | None) -> None:
    """Finish a tracker, which by Accelerate's own method says of every run that it has succeeded."""
    stopped = isinstance(failure, KeyboardInterrupt)
    if failure is not None and name == "wandb":
        tracker.tracker.finish(exit_code=1)
    elif failure is not None and name == "mlflow":
        import_module("mlflow").end_run("KILLED" if stopped else "FAILED")
    elif failure is not None and name == "swanlab":
        tracker.tracker.finish("aborted" if stopped else "crashed", error=first_line(failure))
    else:
        tracker.finish()
        if failure is not None and name == "clearml":  # once it is closed, as its own pipelines do
            (tracker.tracker.mark_stopped if stopped else tracker.tracker.mark_failed)(force=True)


def places(name: str, asks: bool, folder: Path) -> dict[str, Any]:
    """Where a tracker is to write, as the arguments of its class; wandb's variable has its way."""
    if asks:
        return {"logging_dir": folder}
    if name == "wandb" and not os.environ.get("WANDB_DIR"):
        folder.mkdir(parents=True, exist_ok=True)  # of a folder that is missing it takes another one
        return {"dir": folder}
    return {}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's fields as `stages.NAME.FIELD: value`, of plain types."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) and "name" in one for one in value):
            for one in value:
                found |= flat(one, f"{prefix}{key}.{one['name']}.")
        else:
            plain = isinstance(value, str | int | float | bool)
            found[f"{prefix}{key}"] = value if plain else "" if value is None else str(value)
    return found
