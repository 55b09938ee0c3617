"""Targets of scores, the verdicts on results, and the README's table in Markdown from results files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spar.evaluation.options import BEFORE_SWAP
from spar.evaluation.results import Result, Score

PARTS, BASELINES = "part.", ("blind.", "gray.")
_DECIBELS = ("psnr", "psnr_outside")
_NAMES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "survival": "objects that survive",
    "frechet": "Fréchet distance",
    "psnr_outside": "PSNR outside the edit",
}


@dataclass(frozen=True)
class Target:
    """The target of a score."""

    benchmark: str
    score: str
    at_least: float
    combinations: str = "seen"


TARGETS = (
    Target("shapes-recon", "psnr", 33.0),
    Target("shapes-recon", "ssim", 0.95),
    Target("shapes-recon", "survival", 0.97),
    Target("shapes-vqa", "overall", 0.97),
    Target("shapes-vqa", "position", 0.92),
    Target("shapes-gen", "overall", 0.90),
    Target("shapes-gen", "overall", 0.70, "held_out"),
    Target("shapes-edit", "overall", 0.80),
)

RECIPE_TARGETS = (Target("shapes-gen", "overall", 0.70),)  # of the CPU recipe alone, before further training


def find_target(result: Result, score: Score, targets: Sequence[Target] = TARGETS) -> Target | None:
    """The target of a score, or None."""
    key = (result.benchmark, score.name, result.settings.get("combinations", "seen"))
    return next((t for t in targets if (t.benchmark, t.score, t.combinations) == key), None)


def verdict(score: Score, target: Target) -> str:
    """"reached" or "short", with ", not certain" if the interval contains the target."""
    if score.value >= target.at_least:
        return "reached" if score.low >= target.at_least else "reached, not certain"
    return "short" if score.high < target.at_least else "short, not certain"


def show(name: str, value: float) -> str:
    """Format a value: decibels with one decimal, the distance with three digits, shares with three decimals."""
    last = name.split(".")[-1]
    if last in _DECIBELS:
        return f"{value:.1f} dB"
    return f"{value:.3g}" if last == "frechet" else f"{value:.3f}"


def show_interval(score: Score) -> str:
    """Format the interval as "low to high"."""
    low, high = show(score.name, score.low).removesuffix(" dB"), show(score.name, score.high)
    return f"{low} to {high}"


def show_title(result: Result) -> str:
    """The benchmark with its combinations and label: "shapes-gen, held-out combinations"."""
    held_out = ["held-out combinations"] if result.settings.get("combinations") == "held_out" else []
    label = [result.settings["label"]] if result.settings.get("label") else []
    return ", ".join([result.benchmark, *held_out, *label])


def show_name(name: str) -> str:
    """A score's name in words."""
    return _NAMES.get(name, name.replace("_", " "))


def main_scores(result: Result) -> list[Score]:
    """The main scores: no diagnostics and no baselines."""
    return [score for score in result.scores if not score.name.startswith((PARTS, *BASELINES))]


def baselines(result: Result, score: Score) -> dict[str, Score]:
    """The existing baselines of a score: {"blind": ..., "gray": ...}."""
    return {
        prefix.removesuffix("."): result.score(prefix + score.name)
        for prefix in BASELINES
        if result.has(prefix + score.name)
    }


def swap_change(results: Iterable[Result]) -> tuple[Score, Score] | None:
    """Understanding with the original encoder and with the model's own, if the results have both."""
    before: list[Result] = []
    after: list[Result] = []
    for result in results:
        if result.benchmark == "shapes-vqa" and result.settings.get("combinations", "seen") == "seen":
            (before if result.settings.get("label") == BEFORE_SWAP else after).append(result)
    return (before[0].score("overall"), after[0].score("overall")) if before and after else None


def scores_table(results: Sequence[Result], targets: Sequence[Target] = TARGETS) -> str:
    """A Markdown table of the main scores of results, with intervals, baselines and targets."""
    lines = [
        "| Benchmark | Score | Value | 95 % interval | n | Target |",
        "| --- | --- | ---: | --- | ---: | --- |",
    ]
    for result in results:
        for score in main_scores(result):
            target = find_target(result, score, targets)
            others = ", ".join(f"{name} {show(name, base.value)}" for name, base in baselines(result, score).items())
            goal = f"≥ {target.at_least:g}: {verdict(score, target)}" if target else ""
            cells = [
                show_title(result), show_name(score.name), show(score.name, score.value),
                show_interval(score), str(score.n), goal,
            ]
            if others:
                cells[1] += f" ({others})"
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    change = swap_change(results)
    if change is not None:
        before, after = change
        points = 100 * (after.value - before.value)
        goal = "within 1 point: " + ("reached" if abs(points) <= 1 else "short")
        values = f"{before.value:.3f} to {after.value:.3f}"
        lines.append(f"| after the swap | understanding | {points:+.1f} points | {values} | {after.n} | {goal} |")
    return "\n".join(lines) + "\n"
