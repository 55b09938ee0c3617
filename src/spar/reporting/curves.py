"""Training curves: a run's metrics.jsonl as one series per stage and term."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spar.common.errors import InputError

Curves = dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]
_NO_TERMS = ("stage", "step", "seconds")


def read_metrics(path: str | Path) -> Curves:
    """Read {stage: {term: (steps, values)}}, stages and terms in the order of their first lines.

    A resumed run repeats steps: the last line of a step counts. An incomplete last line is skipped.

    Raises:
        InputError: the file is missing, or a line has no metrics.
    """
    points: dict[str, dict[str, dict[int, float]]] = {}
    for stage, step, numbers in _read_lines(Path(path)):
        for term, value in numbers.items():
            if term not in _NO_TERMS:
                points.setdefault(stage, {}).setdefault(term, {})[step] = value
    return {stage: {term: _series(values) for term, values in terms.items()} for stage, terms in points.items()}


def stage_seconds(path: str | Path) -> dict[str, float]:
    """Wall seconds of each stage at its last line; errors are those of `read_metrics`."""
    seconds: dict[str, float] = {}
    for stage, _, numbers in _read_lines(Path(path)):
        if "seconds" in numbers:
            seconds[stage] = max(seconds.get(stage, 0.0), numbers["seconds"])
    return seconds


def _read_lines(path: Path) -> Iterator[tuple[str, int, dict[str, float]]]:
    """The stage, the step and the numbers of each line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the metrics {path}: {error.strerror or error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            stage, step = str(row["stage"]), int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            where = f"{path}, line {number}"
            raise InputError(f"{where}: expected metrics with stage and step, got {line[:60]!r}") from error
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        yield stage, step, numbers


def _series(values: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    steps = sorted(values)
    return np.array(steps), np.array([values[step] for step in steps])
