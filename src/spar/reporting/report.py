"""The report: one self-contained HTML page on a model, its images, answers, routing, training and scores.

Every part is optional and omitted if empty. No script runs and nothing is loaded from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from spar.common.errors import InputError
from spar.common.files import atomic_file
from spar.evaluation import targets
from spar.evaluation.results import Result
from spar.inference.outputs import Routing
from spar.reporting.charts import curve
from spar.reporting.curves import Curves
from spar.reporting.routing import routing_view
from spar.reporting.routing_summary import RoutingSummary
from spar.reporting.templating import render_template

_SETTINGS = ("seed", "steps", "guidance", "dtype", "size", "images_per_prompt", "seconds", "date")


@dataclass(frozen=True)
class ReportImage:
    """A generated image and its prompt; `right` is the detector's verdict, None if it did not run."""

    image: Image.Image
    prompt: str
    right: bool | None = None


@dataclass(frozen=True)
class ReportEdit:
    """An image before and after an instruction."""

    before: Image.Image
    instruction: str
    after: Image.Image
    right: bool | None = None


@dataclass(frozen=True)
class ReportAnswer:
    """A question about an image, the model's answer, and the true one if it is known."""

    image: Image.Image
    question: str
    answer: str
    expected: str | None = None

    @property
    def right(self) -> bool | None:
        """Whether the answer is the true one, None if that is not known."""
        return None if self.expected is None else self.answer.strip().lower() == self.expected.strip().lower()


@dataclass(frozen=True)
class ReportReconstruction:
    """An image before and after the tokenizer, and a note on it (its name, its PSNR)."""

    before: Image.Image
    after: Image.Image
    note: str = ""


@dataclass(frozen=True)
class ReportRouting:
    """One prompt's routing weights, with the reference image of an edit."""

    prompt: str
    routing: Routing
    image: Image.Image | None = None


@dataclass(frozen=True)
class ReportData:
    """Contents of the page; every field is optional.

    `manifest`: origin of the weights; `facts`: machine, versions, seconds; `curves`: from `curves.read_metrics`;
    `log_curves`: whether they have a logarithmic axis where possible.
    """

    title: str = "SPAR report"
    lead: str = ""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    gallery: Sequence[ReportImage] = ()
    edits: Sequence[ReportEdit] = ()
    answers: Sequence[ReportAnswer] = ()
    reconstructions: Sequence[ReportReconstruction] = ()
    routing: Sequence[ReportRouting] = ()
    routing_summary: RoutingSummary | None = None
    curves: Curves = field(default_factory=dict)
    log_curves: bool = True
    results: Sequence[Result] = ()


def write_report(path: str | Path, data: ReportData) -> None:
    """Write the page, as `atomic_file`; `InputError` on failure."""
    try:
        with atomic_file(Path(path)) as temporary:
            temporary.write_text(render_report(data), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the report {path}: {error.strerror or error}") from error


def render_report(data: ReportData) -> str:
    """The page as text."""
    return render_template(
        "report.html", data=data, targets=targets, settings_note=_settings_note, routing_view=routing_view, curve=curve
    ) + "\n"


def _settings_note(settings: Mapping[str, Any]) -> str:
    """How a result was measured: the detector's accuracy, the settings that matter, the machine."""
    words = [f"{name.replace('_', ' ')} {settings[name]}" for name in _SETTINGS if settings.get(name) is not None]
    if detector := settings.get("detector"):
        words.insert(
            0,
            f"detector version {detector.get('version')}, right on {detector.get('accuracy', 0):.1%} of real and "
            f"{detector.get('accuracy_degraded', 0):.1%} of degraded renders (n = {detector.get('n')})",
        )
    if machine := settings.get("machine"):
        words.append(f"{machine.get('cpu')}, {machine.get('cores')} cores")
    return "; ".join(words)
