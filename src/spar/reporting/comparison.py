"""The page of `spar compare`: differences with their intervals drawn, and drawings at equal seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spar.evaluation.compare import Difference
from spar.evaluation.targets import show, show_name
from spar.reporting.templating import render_template

REACH = 80.0  # half a drawing's width, in its own units


@dataclass(frozen=True)
class ComparedRow:
    """A difference as the page shows it; `low`, `value` and `high` are places in the drawing, 0 its middle."""

    model: str
    one: Difference
    name: str
    first: str
    second: str
    low: float
    value: float
    high: float


def render_comparison(
    first: str, differences: Sequence[tuple[str, Difference]], prompts: Sequence[str] = (),
    grids: Sequence[tuple[str, Sequence[Any]]] = (),
) -> str:  # fmt: skip
    """The page as text.

    Args:
        first: the name of the results that all others are compared with.
        differences: with the names of those others.
        prompts: of the drawings.
        grids: by name the images of all prompts.
    """
    return render_template(
        "comparison.html", first=first, rows=rows(differences), prompts=prompts, grids=grids, reach=REACH,
        several=len({name for name, _ in differences}) > 1,
    ) + "\n"  # fmt: skip


def rows(differences: Sequence[tuple[str, Difference]]) -> list[ComparedRow]:
    """The rows; the intervals of one benchmark and score are drawn to one scale."""
    scales: dict[tuple[str, str], float] = {}
    for _, one in differences:
        key = (one.title, one.score)
        scales[key] = max(scales.get(key, 0.0), abs(one.low), abs(one.high), abs(one.value))
    found = []
    for model, one in differences:
        scale = REACH / (scales[one.title, one.score] or 1.0)
        found.append(
            ComparedRow(
                model, one, show_name(one.score), show(one.score, one.first), show(one.score, one.second),
                scale * one.low, scale * one.value, scale * one.high,
            )
        )  # fmt: skip
    return found
