"""The page of a study: differences, curves of all arms in one panel, drawings at equal seeds, cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spar.evaluation.study_results import StudyResult
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
    """The terms of the reference's stages, those of the loss first; an arm without a term, or with other steps, has no
    line there.
    """
    runs = {
        arm: [read_metrics(folder / arm / f"seed-{seed}" / "metrics.jsonl") for seed in found.study.seeds]
        for arm in found.study.arms
    }
    first = runs[found.study.reference][0]
    terms = [(stage, term) for stage, names in first.items() for term in names if term not in ("lr", "grad_norm")]
    drawn = []
    for stage, term in sorted(terms, key=lambda pair: pair[1] != "loss"):
        steps = first[stage][term][0]
        means = []
        for one in runs.values():
            series = [run.get(stage, {}).get(term) for run in one]
            whole = [values[1] for values in series if values is not None and len(values[0]) == len(steps)]
            means.append(np.mean(whole, axis=0) if len(whole) == len(one) else None)
        drawn.append(_panel(f"{stage}, {term}", steps, means))
    return drawn[:MAX_PANELS]


def _panel(name: str, steps: np.ndarray, means: Sequence[np.ndarray | None]) -> Panel:
    lines = [None if values is None else thin(steps, smooth(values)) for values in means]
    drawn = np.concatenate([line[1] for line in lines if line is not None])
    low, high = float(drawn.min()), float(drawn.max())
    span, reach = (high - low) or 1.0, float(steps[-1] - steps[0]) or 1.0

    def points(xs: np.ndarray, ys: np.ndarray) -> str:
        return " ".join(
            f"{WIDTH * (x - steps[0]) / reach:.1f},{HEIGHT * (1 - (y - low) / span):.1f}"
            for x, y in zip(xs, ys, strict=True)
        )

    ticks = [(HEIGHT * (1 - share), low + share * (high - low)) for share in (0.0, 0.5, 1.0)]
    return Panel(name, int(steps[-1]), ticks, [points(*line) if line else "" for line in lines])


def render_study(
    found: StudyResult, folder: Path, prompts: Sequence[str] = (), grids: Sequence[tuple[str, Sequence[Any]]] = ()
) -> str:
    """The page as text."""
    return render_template(
        "study.html", study=found.study, arms=found.study.arms, differences=found.differences, outside=found.outside,
        panels=panels(found, folder), prompts=prompts, grids=grids, seconds=found.seconds,
        parameters=found.parameters, memory=found.memory, reached=found.reached,
        taken=found.taken, colors=COLORS,
    ) + "\n"  # fmt: skip
