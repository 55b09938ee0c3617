"""The page of a training run: its curves, and the results files in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spar.common.config import read_json
from spar.common.errors import InputError
from spar.evaluation.results import Result, read_result
from spar.reporting.curves import read_metrics, stage_seconds
from spar.reporting.report import ReportData

HIDDEN_KEYS = ("resolved_recipe",)


def run_report(run: Path) -> ReportData:
    """Contents of the page of a run's folder.

    Raises:
        InputError: the folder does not exist, or has neither metrics nor results.
    """
    if not run.is_dir():
        raise InputError(f"expected the folder of a run, but {str(run)!r} is not a folder")
    metrics, manifest, results = run / "metrics.jsonl", run / "model" / "manifest.json", find_results(run)
    if not metrics.is_file() and not results:
        raise InputError(f"expected a run with metrics.jsonl or results files, but {str(run)!r} has neither")
    seconds = stage_seconds(metrics) if metrics.is_file() else {}
    return ReportData(
        title=f"SPAR run {run.resolve().name}",
        manifest=visible_manifest(read_json(manifest) if manifest.is_file() else {}),
        facts={f"{stage}, seconds": round(spent, 1) for stage, spent in seconds.items()},
        curves=read_metrics(metrics) if metrics.is_file() else {},
        results=results,
    )


def find_results(folder: Path) -> list[Result]:
    """The results files in a folder and in its `results` folder, by name; other JSON files are skipped."""
    paths = sorted([*folder.glob("*.json"), *folder.glob("results/*.json")])
    return [read_result(path) for path in paths if "benchmark" in read_json(path)]


def visible_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A model's manifest, with those of the models that it comes from, without HIDDEN_KEYS, which are too long."""
    return {
        name: visible_manifest(value) if isinstance(value, Mapping) else value
        for name, value in manifest.items()
        if name not in HIDDEN_KEYS
    }
