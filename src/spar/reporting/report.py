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
from spar.evaluation.results import Result
from spar.reporting import charts, html_page
from spar.reporting.curves import Curves
from spar.reporting.markup import Markup, inline_image, join, tag
from spar.reporting.routing import RoutingLike, routing_view
from spar.reporting.routing_summary import RoutingSummary
from spar.reporting.score_tables import show_scores


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
    routing: RoutingLike
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
    parts = {
        "Scores": show_scores(data.results),
        "Generated images": _gallery(data.gallery),
        "Edits": _edits(data.edits),
        "Questions and answers": _answers(data.answers),
        "Reconstructions": _reconstructions(data.reconstructions),
        "Routing": _routing(data.routing, data.routing_summary),
        "Training": _training(data.curves, data.log_curves),
        "Origin": _origin(data.manifest, data.facts),
    }
    shown = {title: body for title, body in parts.items() if body is not None}
    links = [tag("a", title, href="#" + html_page.anchor(title)) for title in shown]
    header = tag(
        "header", tag("h1", data.title), tag("p", data.lead, class_="lead") if data.lead else None,
        tag("nav", *links, aria_label="parts of this page") if links else None,
    )
    return html_page.document(data.title, header, *(html_page.section(title, body) for title, body in shown.items()))


def _mark(right: bool | None) -> Markup | None:
    """The detector's verdict as a word, not only as a colour."""
    if right is None:
        return None
    return tag("span", "✓ right" if right else "✗ wrong", class_="reached" if right else "short")


def _caption(*words: str | Markup | None) -> Markup:
    kept = [word for word in words if word is not None]
    return tag("figcaption", *(child for word in kept for child in (word, " ")))


def _grid(figures: Sequence[Markup], kind: str = "grid") -> Markup | None:
    return tag("div", *figures, class_=kind) if figures else None


def _pair(before: Image.Image, after: Image.Image, what: str) -> Markup:
    sides = ((before, "before"), (after, "after"))
    cells = [tag("div", inline_image(image, f"{what}, {side}"), tag("span", side)) for image, side in sides]
    return tag("div", *cells, class_="pair")


def _gallery(shown: Sequence[ReportImage]) -> Markup | None:
    return _grid([
        tag("figure", inline_image(one.image, f"Generated: {one.prompt}"), _caption(one.prompt, _mark(one.right)))
        for one in shown
    ])


def _edits(shown: Sequence[ReportEdit]) -> Markup | None:
    return _grid([
        tag("figure", _pair(one.before, one.after, one.instruction), _caption(one.instruction, _mark(one.right)))
        for one in shown
    ], "grid wide")


def _answers(shown: Sequence[ReportAnswer]) -> Markup | None:
    figures = []
    for one in shown:
        right = None if one.expected is None else one.answer.strip().lower() == one.expected.strip().lower()
        truth = f"(expected: {one.expected})" if right is False else None
        caption = _caption(one.question, tag("strong", one.answer), _mark(right), truth)
        figures.append(tag("figure", inline_image(one.image, f"Image asked about: {one.question}"), caption))
    return _grid(figures)


def _reconstructions(shown: Sequence[ReportReconstruction]) -> Markup | None:
    return _grid([
        tag("figure", _pair(one.before, one.after, one.note or "reconstruction"), _caption(one.note)) for one in shown
    ], "grid wide")


def _origin(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> Markup | None:
    parts = [
        join(tag("h3", title), html_page.facts(dict(values)))
        for title, values in (("The weights", manifest), ("This page", facts))
        if values
    ]
    return join(*parts) if parts else None


# ---- routing and training --------------------------------------------------------------------------------------------


def _routing(shown: Sequence[ReportRouting], summary: RoutingSummary | None) -> Markup | None:
    parts = [_one_routing(one) for one in shown]
    if summary is not None:
        parts.append(_summary(summary))
    if not parts:
        return None
    lead = "Each token of a prompt reads a mixture of LLM layers; its weights sum to one over the layers."
    return join(tag("p", lead, class_="lead"), *parts)


def _one_routing(shown: ReportRouting) -> Markup:
    return join(tag("h3", shown.prompt), routing_view(shown.routing, shown.image))


def _summary(summary: RoutingSummary) -> Markup:
    top = max(float(summary.means.max()), 1 / len(summary.layers))
    figures = [
        tag("figure", _caption(tag("strong", name), f"{count} tokens"),
            charts.layer_bars(name, summary.layers, means.tolist(), top))
        for name, means, count in zip(summary.classes, summary.means, summary.counts, strict=True)
    ]
    note = tag("p", "The dashed line marks an even share of the layers.", class_="note")
    return join(tag("h3", "Mean weight by kind of token"), note, tag("div", *figures, class_="grid small"))


def _training(curves: Curves, log: bool) -> Markup | None:
    stages: list[Markup] = []
    for stage, terms in curves.items():
        figures = [
            tag("figure", _caption(tag("strong", term), f"last {values[-1]:.3g}"),
                charts.curve(term, steps, values, log=log))
            for term, (steps, values) in terms.items()
        ]
        last = max(int(steps[-1]) for steps, _ in terms.values())
        head = tag("summary", stage, " ", tag("span", f"to step {last}, {len(terms)} terms", class_="note"))
        stages.append(tag("details", head, tag("div", *figures, class_="grid small"), open="" if not stages else None))
    return join(*stages) if stages else None
