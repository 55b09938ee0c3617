"""Training curves as inline SVG; their colours come by class."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from markupsafe import Markup

from spar.reporting.templating import render_template

MAX_POINTS = 160  # of a curve; more are averaged
LOG_LEAST = 4.0  # a curve that spans less than this factor has a linear axis even if `log` is True
WIDTH, HEIGHT = 186.0, 88.0  # of the plot without its axes' labels


def thin(steps: np.ndarray, values: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a series to at most `limit` points, each the mean of its share."""
    if len(steps) <= limit:
        return steps.astype(float), values
    edges = np.linspace(0, len(steps), limit + 1).astype(int)
    parts = list(pairwise(edges))
    return np.array([steps[a:b].mean() for a, b in parts]), np.array([values[a:b].mean() for a, b in parts])


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over a tenth of a series, shorter at its ends."""
    half = len(values) // 20
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def curve(name: str, steps: np.ndarray, values: np.ndarray, *, log: bool) -> Markup:
    """One small panel: a term over the steps, raw (faint) and smoothed.

    `log` requests a logarithmic axis, used if all values are positive and span a factor of LOG_LEAST.
    """
    finite = np.isfinite(values)
    steps, values = thin(np.asarray(steps)[finite], np.asarray(values, dtype=float)[finite])
    if not len(values):
        return render_template("empty_curve.svg", name=name)
    low, high = float(values.min()), float(values.max())
    log = log and low > 0 and high / low >= LOG_LEAST
    heights = np.log(values) if log else values
    bottom, top = float(heights.min()), float(heights.max())
    span, reach = (top - bottom) or 1.0, float(steps[-1] - steps[0]) or 1.0

    def points(series: np.ndarray) -> str:
        xs, ys = WIDTH * (steps - steps[0]) / reach, HEIGHT * (1 - (series - bottom) / span)
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))

    shares = (0.0, 0.5, 1.0) if top > bottom else (0.0,)
    marked = [(HEIGHT * (1 - share), bottom + share * (top - bottom)) for share in shares]
    smoothed = {"raw": points(heights), "curve": points(smooth(heights))}
    return render_template(
        "curve.svg", name=name, steps=steps, values=values, log=log, width=WIDTH,
        ticks=[(y, np.exp(value) if log else value) for y, value in marked],
        lines=smoothed if len(values) > 30 else {"curve": smoothed["raw"]},
    )  # fmt: skip
