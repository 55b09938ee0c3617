"""The report's tables of scores: values, intervals, baselines, and verdicts on targets."""

from __future__ import annotations

from collections.abc import Sequence

from spar.evaluation.results import Result, Score
from spar.evaluation.targets import (
    BASELINES,
    baselines,
    find_target,
    main_scores,
    show,
    show_interval,
    show_name,
    show_title,
    swap_change,
    verdict,
)
from spar.reporting import html_page
from spar.reporting.charts import interval_bar
from spar.reporting.markup import Child, Markup, join, tag

_NO_SHARES = ("psnr", "psnr_outside", "frechet")
_CLASSES = {"reached": "reached", "short": "short"}
_SIGNS = {"reached": "✓ ", "short": "✗ "}
_SETTINGS = ("seed", "steps", "guidance", "dtype", "size", "images_per_prompt", "seconds", "date")


def show_scores(results: Sequence[Result]) -> Markup | None:
    """One table per result, with its settings below; None without results."""
    if not results:
        return None
    change = swap_change(results)
    return join(*(_result(result) for result in results), None if change is None else _change(*change))


def _result(result: Result) -> Markup:
    main = main_scores(result)
    side = [score for score in result.scores if score not in main and not score.name.startswith(BASELINES)]
    more = None
    if side:
        more = tag("details", tag("summary", "Parts, as diagnostics"), _table(result, side))
    return join(tag("h3", show_title(result)), _table(result, main), more, _settings(result))


def _table(result: Result, scores: Sequence[Score]) -> Markup:
    head: list[Child] = ["Score", "Value", "Target", "95 % interval", "n", ""]
    rows = [_row(result, score) for score in scores]
    if any(baselines(result, score) for score in scores):
        head.append("Baselines")
        for row, score in zip(rows, scores, strict=True):
            words = [f"{name} {show(name, base.value)}" for name, base in baselines(result, score).items()]
            row.append(", ".join(words))
    return html_page.table(head, rows, frozenset((1, 4)))


def _row(result: Result, score: Score) -> list[Child]:
    target = find_target(result, score)
    share = score.name not in _NO_SHARES
    bar = interval_bar(score.value, score.low, score.high, target.at_least if target else None) if share else ""
    goal: Child = ""
    if target is not None:
        words = verdict(score, target)
        text = f"{_SIGNS.get(words, '≈ ')}{words}"
        goal = join(f"≥ {target.at_least:g} ", tag("span", text, class_=_CLASSES.get(words, "near")))
    name = show_name(score.name.removeprefix("part."))
    return [name, show(score.name, score.value), goal, show_interval(score), str(score.n), bar]


def _settings(result: Result) -> Markup:
    settings = result.settings
    detector = settings.get("detector", {})
    words = [f"{name.replace('_', ' ')} {settings[name]}" for name in _SETTINGS if settings.get(name) is not None]
    if detector:
        words.insert(
            0,
            f"detector version {detector.get('version')}, right on {detector.get('accuracy', 0):.1%} of real and "
            f"{detector.get('accuracy_degraded', 0):.1%} of degraded renders (n = {detector.get('n')})",
        )
    machine = settings.get("machine", {})
    if machine:
        words.append(f"{machine.get('cpu')}, {machine.get('cores')} cores")
    return tag("p", "; ".join(words), class_="note")


def _change(before: Score, after: Score) -> Markup:
    points = 100 * (after.value - before.value)
    reached = abs(points) <= 1
    mark = tag("span", "✓ reached" if reached else "✗ short", class_="reached" if reached else "short")
    values = f"{before.value:.3f} to {after.value:.3f}, {points:+.1f} points"
    return tag("p", f"Understanding after the swap: {values}; within 1 point: ", mark)
