"""What a study has found: the results of its runs, the differences between arms, what the arms cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spar.common.config import read_json, to_dict
from spar.evaluation.results import Result, read_result
from spar.evaluation.study import AGAIN, SHARED, Study
from spar.evaluation.study_sharing import METRICS, TAKEN, metric_rows
from spar.evaluation.study_statistics import StudyDifference, study_differences

ARM = "arm.json"  # in an arm's run, once it is trained


@dataclass(frozen=True)
class StudyResult:
    """What a study has found: every arm's results by endpoint and seed, the differences, and what the arms cost.

    `memory` is the most that a training's tensors took of a GPU, in bytes; 0 on a CPU, as all arms share one process.
    `reached` has of each arm the share of its last stage's steps after which the reference's flow loss in training was
    down to what the arm's was at its end, and None if it never was; arms without such a loss, or with other steps, are
    not in it. `taken` has of each run of the study, ARM/seed-S, the stages that were trained elsewhere, and where.
    """

    study: Study
    results: dict[str, dict[str, list[Result]]]
    differences: tuple[StudyDifference, ...]
    seconds: dict[str, float]
    parameters: dict[str, int]
    memory: dict[str, int]
    reached: dict[str, float | None]
    taken: dict[str, dict[str, str]]

    @property
    def outside(self) -> list[str]:
        """Where the A/A arm's interval does not contain 0, so that chance is larger than the others say."""
        own = (one for one in self.differences if one.arm == AGAIN)
        return [one.endpoint for one in own if not one.low <= 0 <= one.high]

    @property
    def holds(self) -> bool:
        """Whether every interval of the A/A arm contains 0, so that the others may be believed."""
        return not self.outside


def collect(study: Study, folder: Path) -> StudyResult:
    """The result of a study whose runs and measurements are all there."""
    runs = {arm: [folder / arm / f"seed-{seed}" for seed in study.seeds] for arm in study.arms}
    results = {
        arm: {name: [read_result(result_path(run, name)) for run in places] for name in study.endpoints}
        for arm, places in runs.items()
    }
    places = {**runs, SHARED: [folder / SHARED / f"seed-{seed}" for seed in study.seeds]} if study.shared else runs
    stages = [(arm, meta) for arm, own in places.items() for run in own for meta in run.glob("*/done/meta.json")]
    seconds = dict.fromkeys(places, 0.0)
    for arm, meta in stages:
        seconds[arm] += float(read_json(meta).get("seconds", 0.0)) / len(study.seeds)
    facts = {arm: [read_json(place / ARM) for place in places] for arm, places in runs.items()}
    parameters = {arm: int(one[0]["parameters"]) for arm, one in facts.items()}
    memory = {arm: max(int(each.get("memory", 0)) for each in one) for arm, one in facts.items()}
    differences = study_differences(study.reference, results)
    curves = {arm: mean_curve(places) for arm, places in runs.items()}
    first = curves[study.reference]
    reached = {
        arm: share_until(np.array([*first.values()]), np.array([*curve.values()]))
        for arm, curve in curves.items() if arm != study.reference and curve and [*curve] == [*first]
    }  # fmt: skip
    taken = {
        f"{arm}/{place.name}": read_json(place / TAKEN)
        for arm, own in places.items() for place in own if (place / TAKEN).is_file()
    }  # fmt: skip
    return StudyResult(study, results, tuple(differences), seconds, parameters, memory, reached, taken)


def mean_curve(runs: Sequence[Path]) -> dict[int, float]:
    """The mean flow loss of an arm's runs by the logged steps of their last stage; empty where these differ, or where
    the stage has none.
    """
    curves: list[dict[int, float]] = []
    for run in runs:
        last = finished_stages(run)[-1]
        rows = [row for row in metric_rows(run / METRICS) if row.get("stage") == last]
        curves.append({row["step"]: row["flow"] for row in rows if "flow" in row})
    if any([*curve] != [*curves[0]] for curve in curves):
        return {}
    return {step: float(np.mean([curve[step] for curve in curves])) for step in curves[0]}


def share_until(reference: np.ndarray, other: np.ndarray) -> float | None:
    """The share of its steps after which a curve stays at most at another's end, both as means over a fifth of them;
    None if it never does. Both have the same steps.
    """
    width = max(1, len(other) // 5)
    own = np.convolve(reference, np.ones(width) / width, "valid")
    above = np.flatnonzero(own > other[-width:].mean())
    first = 0 if not len(above) else int(above[-1]) + 1
    return None if first == len(own) else (first + width) / len(other)


def results_file(found: StudyResult) -> dict[str, Any]:
    """The contents of `results.json`."""
    scores = {
        arm: {name: [[*map(to_dict, one.scores)] for one in results] for name, results in endpoints.items()}
        for arm, endpoints in found.results.items()
    }
    first = next(iter(next(iter(found.results.values())).values()))[0]
    return {
        "study": to_dict(found.study), "seconds": found.seconds, "parameters": found.parameters,
        "memory": found.memory, "reached": found.reached, "taken": found.taken,
        "differences": [_difference_values(one) for one in found.differences], "scores": scores,
        "machine": first.settings.get("machine"), "versions": first.settings.get("versions"),
    }  # fmt: skip


def _difference_values(one: StudyDifference) -> dict[str, Any]:
    """JSON has no infinity: what one seed can detect is null."""
    detectable = one.detectable if np.isfinite(one.detectable) else None
    return {**to_dict(one), "detectable": detectable, "verdict": one.verdict}


def result_path(run: Path, name: str) -> Path:
    """Where a run has the result of an endpoint."""
    return run / "results" / f"{name}.json"


def finished_stages(run: Path) -> list[str]:
    """The stages that a run has finished, in order."""
    done = {path.parent.name for path in run.glob("*/done") if path.is_dir()}
    return [stage["name"] for stage in read_json(run / "recipe.json")["stages"] if stage["name"] in done]
