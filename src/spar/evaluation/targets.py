"""Targets of scores, the verdicts on results, and the README's table in Markdown from results files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    Target("shapes-recon", "psnr", 33.5),
    Target("shapes-recon", "ssim", 0.95),
    Target("shapes-recon", "survival", 0.97),
    Target("shapes-vqa", "overall", 0.99),
    Target("shapes-vqa", "position", 0.92),
    Target("shapes-vqa-bind", "overall", 0.97),
    Target("shapes-chat", "overall", 0.95),
    Target("shapes-paraphrase", "overall", 0.90),
    Target("shapes-gen", "overall", 0.95),
    Target("shapes-gen", "counting", 0.90),
    Target("shapes-gen", "overall", 0.94, "held_out"),
    Target("shapes-gen-bind", "overall", 0.85),
    Target("shapes-edit", "overall", 0.94),
    Target("shapes-edit", "replace", 0.90),
    Target("shapes-edit-bind", "overall", 0.85),
)
# Of the recipe on a CPU, within its bound of time.
RECIPE_TARGETS = (
    Target("shapes-recon", "psnr", 33.0),
    Target("shapes-vqa", "overall", 0.98),
    Target("shapes-vqa-bind", "overall", 0.93),
    Target("shapes-chat", "overall", 0.90),
    Target("shapes-paraphrase", "overall", 0.85),
    Target("shapes-gen", "overall", 0.88),
    Target("shapes-gen", "counting", 0.80),
    Target("shapes-gen", "overall", 0.88, "held_out"),
    Target("shapes-gen-bind", "overall", 0.70),
    Target("shapes-edit", "overall", 0.88),
    Target("shapes-edit-bind", "overall", 0.65),
)


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
    held_out = "held-out combinations" if result.settings.get("combinations") == "held_out" else ""
    return ", ".join(filter(None, (result.benchmark, held_out, result.settings.get("label"))))


def show_name(name: str) -> str:
    """A score's name in words."""
    return _NAMES.get(name, name.replace("_", " "))


def is_share(name: str) -> bool:
    """Whether a score is a share in [0, 1]."""
    return name not in (*_DECIBELS, "frechet")


def main_scores(result: Result) -> list[Score]:
    """The main scores: no diagnostics and no baselines."""
    return [score for score in result.scores if not score.name.startswith((PARTS, *BASELINES))]


def part_scores(result: Result) -> list[Score]:
    """The diagnostics."""
    return [score for score in result.scores if score.name.startswith(PARTS)]


def baselines(result: Result) -> dict[str, str]:
    """The baselines of the scores that have some: {"overall": "blind 0.300, gray 0.200"}."""
    found: dict[str, list[str]] = {}
    for prefix in BASELINES:
        for score in result.scores:
            if score.name.startswith(prefix):
                words = f"{prefix.removesuffix('.')} {show(score.name, score.value)}"
                found.setdefault(score.name.removeprefix(prefix), []).append(words)
    return {name: ", ".join(words) for name, words in found.items()}


class SwapChange(NamedTuple):
    """Understanding with the original encoder and with the model's own."""

    before: Score
    after: Score

    @property
    def points(self) -> float:
        """The difference in percentage points."""
        return 100 * (self.after.value - self.before.value)

    @property
    def verdict(self) -> str:
        """"reached" if understanding is within one point of the original, else "short"."""
        return "reached" if abs(self.points) <= 1 else "short"


def swap_change(results: Iterable[Result]) -> SwapChange | None:
    """The change of understanding, if the results have both encoders."""
    seen = [r for r in results if r.benchmark == "shapes-vqa" and r.settings.get("combinations", "seen") == "seen"]
    before = [result for result in seen if result.settings.get("label") == BEFORE_SWAP]
    after = [result for result in seen if result.settings.get("label") != BEFORE_SWAP]
    return SwapChange(before[0].score("overall"), after[0].score("overall")) if before and after else None


def scores_table(results: Sequence[Result], targets: Sequence[Target] = TARGETS) -> str:
    """A Markdown table of the main scores of results, with intervals, baselines and targets."""
    lines = [
        "| Benchmark | Score | Value | 95 % interval | n | Target |",
        "| --- | --- | ---: | --- | ---: | --- |",
    ]
    for result in results:
        others = baselines(result)
        for score in main_scores(result):
            target = find_target(result, score, targets)
            goal = f"≥ {target.at_least:g}: {verdict(score, target)}" if target else ""
            cells = [
                show_title(result), show_name(score.name), show(score.name, score.value),
                show_interval(score), str(score.n), goal,
            ]
            if score.name in others:
                cells[1] += f" ({others[score.name]})"
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    change = swap_change(results)
    if change is not None:
        before, after = change
        lines.append(
            f"| after the swap | understanding | {change.points:+.1f} points | {before.value:.3f} to {after.value:.3f} "
            f"| {after.n} | within 1 point: {change.verdict} |"
        )
    return "\n".join(lines) + "\n"
