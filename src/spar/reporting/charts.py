"""Inline SVG: training curves, routing weights as bars, intervals. Colours come by class."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from spar.reporting.markup import Markup, tag

MAX_POINTS = 160  # of a curve; more are averaged
LOG_LEAST = 4.0  # a curve that spans less than this factor has a linear axis even if `log` is True


def svg(width: float, height: float, label: str, *children: Markup) -> Markup:
    """An <svg> of a size in pixels, with a label for screen readers."""
    box = f"0 0 {width:g} {height:g}"
    return tag("svg", *children, viewBox=box, width=f"{width:g}", height=f"{height:g}", role="img", aria_label=label)


def _text(x: float, y: float, words: str, anchor: str = "start", class_: str | None = None, **more: object) -> Markup:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_, **more)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def _rect(x: float, y: float, width: float, height: float, class_: str, title: str = "", **more: object) -> Markup:
    inner = tag("title", title) if title else None
    return tag(
        "rect", inner, x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", class_=class_, **more
    )


# ---- curves ----------------------------------------------------------------------------------------------------------


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
        return svg(240, 40, f"{name}: no values", _text(4, 20, f"{name}: no finite values"))
    low, high = float(values.min()), float(values.max())
    log = log and low > 0 and high / low >= LOG_LEAST
    heights = np.log(values) if log else values
    bottom, top = float(heights.min()), float(heights.max())
    span, reach = (top - bottom) or 1.0, float(steps[-1] - steps[0]) or 1.0
    left, right, above, below = 50.0, 236.0, 8.0, 96.0

    def path(series: np.ndarray, class_: str) -> Markup:
        xs = left + (steps - steps[0]) / reach * (right - left)
        ys = below - (series - bottom) / span * (below - above)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        return tag("polyline", points=points, class_=class_)

    marks = []
    for share in (0.0, 0.5, 1.0) if top > bottom else (0.0,):
        y = below - share * (below - above)
        value = bottom + share * (top - bottom)
        marks.append(_line(left, y, right, y, "axis"))
        marks.append(_text(left - 5, y + 4, f"{np.exp(value) if log else value:.2g}", "end"))
    ends = (_text(left, 112, f"{steps[0]:.0f}"), _text(right, 112, f"step {steps[-1]:.0f}", "end"))
    scale = _text((left + right) / 2, 112, "log scale", "middle") if log else None
    lines = [path(heights, "raw"), path(smooth(heights), "curve")] if len(values) > 30 else [path(heights, "curve")]
    words = f"{name} from {values[0]:.3g} to {values[-1]:.3g} over steps {steps[0]:.0f} to {steps[-1]:.0f}"
    return svg(240, 118, words, *marks, *lines, *ends, *([scale] if scale else []))


# ---- routing ---------------------------------------------------------------------------------------------------------


def layer_bars(name: str, layers: Sequence[int], means: Sequence[float], top: float) -> Markup:
    """One bar per layer on a scale from 0 to `top`; the dashed line marks an even share."""
    left, width, step = 56.0, 140.0, 18.0
    parts = []
    for row, (layer, mean) in enumerate(zip(layers, means, strict=True)):
        y = 2 + step * row
        parts.append(_text(left - 6, y + 12, f"layer {layer}", "end"))
        parts.append(_rect(left, y, width, step - 5, "track"))
        parts.append(_rect(left, y, width * min(1.0, mean / top), step - 5, "bar", f"layer {layer}: {mean:.3f}"))
        parts.append(_text(left + width + 5, y + 12, f"{mean:.2f}", class_="strong"))
    even = left + width / len(layers) / top
    parts.append(_line(even, 0, even, step * len(layers), "goal"))
    words = ", ".join(f"layer {layer} {mean:.2f}" for layer, mean in zip(layers, means, strict=True))
    return svg(240, 4 + step * len(layers), f"{name}: {words}", *parts)


# ---- scores ----------------------------------------------------------------------------------------------------------


def interval_bar(value: float, low: float, high: float, target: float | None = None) -> Markup:
    """A share in [0, 1] as a bar with its interval, and the target as a dashed line."""
    width, height = 140.0, 14.0
    inner = width - 4
    parts = [_rect(2, 3, inner, 8, "track"), _rect(2, 3, inner * min(1.0, max(0.0, value)), 8, "bar pale")]
    parts.append(_line(2 + inner * low, 7, 2 + inner * high, 7, "whisker"))
    parts += [_line(2 + inner * end, 4, 2 + inner * end, 10, "whisker") for end in (low, high)]
    if target is not None:
        parts.append(_line(2 + inner * target, 0, 2 + inner * target, height, "goal"))
    return svg(width, height, f"{value:.3f}, interval {low:.3f} to {high:.3f}", *parts)
