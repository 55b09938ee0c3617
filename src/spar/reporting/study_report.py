"""The page of a study: differences, curves of all arms in one panel, drawings at equal seeds, cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spar.evaluation.study import StudyResult
from spar.reporting.charts import HEIGHT, WIDTH, smooth, thin
from spar.reporting.curves import read_metrics
from spar.reporting.templating import render_template

COLORS = ("#1b6ac9", "#9aa3ad", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#0e7490", "#be123c")
MAX_PANELS = 12


@dataclass(frozen=True)
class Panel:
    """One term of one stage: a line for each arm, the mean of its seeds; `ticks` are heights and values."""

    name: str
    last: int
    ticks: list[tuple[float, float]]
    lines: list[str]


def panels(found: StudyResult, folder: Path) -> list[Panel]:
    """The terms that all runs have logged at the same steps, those of the loss first."""
    runs = {
        arm: [read_metrics(folder / arm / f"seed-{seed}" / "metrics.jsonl") for seed in found.study.seeds]
        for arm in found.study.arms
    }
    first = runs[found.study.reference][0]
    terms = [(stage, term) for stage, names in first.items() for term in names if term not in ("lr", "grad_norm")]
    drawn = []
    for stage, term in sorted(terms, key=lambda pair: pair[1] != "loss"):
        series = [[run.get(stage, {}).get(term) for run in one] for one in runs.values()]
        if any(values is None for one in series for values in one):
            continue
        steps = first[stage][term][0]
        if any(len(values[0]) != len(steps) for one in series for values in one if values is not None):
            continue
        means = [np.mean([values[1] for values in one if values is not None], axis=0) for one in series]
        drawn.append(_panel(f"{stage}, {term}", steps, means))
    return drawn[:MAX_PANELS]


def _panel(name: str, steps: np.ndarray, means: Sequence[np.ndarray]) -> Panel:
    lines = [thin(steps, smooth(values)) for values in means]
    low, high = (float(edge(np.concatenate([values for _, values in lines]))) for edge in (np.min, np.max))
    span, reach = (high - low) or 1.0, float(steps[-1] - steps[0]) or 1.0

    def points(xs: np.ndarray, ys: np.ndarray) -> str:
        return " ".join(
            f"{WIDTH * (x - steps[0]) / reach:.1f},{HEIGHT * (1 - (y - low) / span):.1f}"
            for x, y in zip(xs, ys, strict=True)
        )

    ticks = [(HEIGHT * (1 - share), low + share * (high - low)) for share in (0.0, 0.5, 1.0)]
    return Panel(name, int(steps[-1]), ticks, [points(*line) for line in lines])


def render_study(
    found: StudyResult, folder: Path, prompts: Sequence[str] = (), grids: Sequence[tuple[str, Sequence[Any]]] = ()
) -> str:
    """The page as text."""
    return render_template(
        "study.html", study=found.study, arms=found.study.arms, differences=found.differences, holds=found.holds,
        panels=panels(found, folder), prompts=prompts, grids=grids, seconds=found.seconds,
        parameters=found.parameters, memory=found.memory, colors=COLORS,
    ) + "\n"  # fmt: skip
