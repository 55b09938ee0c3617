"""Targets of scores, the verdicts on results, and the README's table in Markdown from results files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spar.evaluation.options import BEFORE_SWAP
from spar.evaluation.results import Result, Score

PARTS, BASELINES = "part.", ("blind.", "gray.")
_DECIBELS = ("psnr", "psnr_outside", "psnr_low", "psnr_middle", "psnr_high")
_DISTANCES = ("frechet", "rfid", "inception_score")  # with three digits
_NAMES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "survival": "objects that survive",
    "frechet": "Fréchet distance",
    "rfid": "rFID",
    "ssim_range_2": "SSIM with range 2",
    "inception_score": "Inception score",
    "psnr_outside": "PSNR outside the edit",
}


@dataclass(frozen=True)
class Target:
    """The target of a score."""

    benchmark: str
    score: str
    at_least: float
    combinations: str = "seen"


# Benchmark, score, combinations; the target of the bundled weights, and of the recipe on a CPU within its time.
_GOALS: tuple[tuple[str, str, str, float, float | None], ...] = (
    ("shapes-recon", "psnr", "seen", 33.5, 33.0),
    ("shapes-recon", "ssim", "seen", 0.95, None),
    ("shapes-recon", "survival", "seen", 0.97, None),
    ("shapes-vqa", "overall", "seen", 0.99, 0.98),
    ("shapes-vqa", "position", "seen", 0.92, None),
    ("shapes-vqa-bind", "overall", "seen", 0.97, 0.93),
    ("shapes-chat", "overall", "seen", 0.95, 0.90),
    ("shapes-paraphrase", "overall", "seen", 0.90, 0.85),
    ("shapes-gen", "overall", "seen", 0.95, 0.88),
    ("shapes-gen", "counting", "seen", 0.90, 0.80),
    ("shapes-gen", "overall", "held_out", 0.94, 0.88),
    ("shapes-gen-bind", "overall", "seen", 0.85, 0.70),
    ("shapes-edit", "overall", "seen", 0.94, 0.88),
    ("shapes-edit", "replace", "seen", 0.90, None),
    ("shapes-edit-bind", "overall", "seen", 0.85, 0.65),
)
TARGETS = tuple(Target(name, score, bundle, of) for name, score, of, bundle, _ in _GOALS)
RECIPE_TARGETS = tuple(Target(name, score, own, of) for name, score, of, _, own in _GOALS if own is not None)
# Of DualToken's weights; its usage at every depth is the benchmark's overall score.
DUALTOKEN_TARGETS = (
    Target("shapes-recon", "psnr", 31.0),
    Target("shapes-recon", "survival", 0.95),
    Target("shapes-codes", "overall", 0.90),
    Target("shapes-zero-shot", "overall", 0.95),
    Target("shapes-zero-shot", "overall", 0.90, "held_out"),
    Target("shapes-vqa", "overall", 0.96),
    Target("shapes-gen", "overall", 0.80),
    Target("shapes-agreement", "overall", 0.90),
    *(
        Target("shapes-codes", f"{name}.perplexity.{depth}", 0.5)
        for name in ("pixel", "semantic") for depth in range(1, 5)
    ),
)  # fmt: skip
# Of what its recipe gives on a CPU.
DUALTOKEN_RECIPE_TARGETS = (Target("shapes-gen", "overall", 0.50),)


def targets_of(result: Result) -> tuple[Target, ...]:
    """The targets of the system whose recipe made the model of a result."""
    model = result.settings.get("model")
    name = model.get("recipe") if isinstance(model, dict) else None
    return DUALTOKEN_TARGETS if str(name).startswith("dualtoken") else TARGETS


def find_target(result: Result, score: Score, targets: Sequence[Target] | None = None) -> Target | None:
    """The target of a score among the given ones, by default those of its model's system, or None."""
    key = (result.benchmark, score.name, result.settings.get("combinations", "seen"))
    among = targets_of(result) if targets is None else targets
    return next((t for t in among if (t.benchmark, t.score, t.combinations) == key), None)


def verdict(score: Score, target: Target) -> str:
    """"reached" or "short", with ", not certain" if the interval contains the target."""
    if score.value >= target.at_least:
        return "reached" if score.low >= target.at_least else "reached, not certain"
    return "short" if score.high < target.at_least else "short, not certain"


def show(name: str, value: float) -> str:
    """Format a value: decibels with one decimal, distances with three digits, shares with three decimals."""
    last = name.split(".")[-1]
    if last in _DECIBELS:
        return f"{value:.1f} dB"
    return f"{value:.3g}" if last in _DISTANCES else f"{value:.3f}"


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
    return name not in (*_DECIBELS, *_DISTANCES)


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


def scores_table(results: Sequence[Result], targets: Sequence[Target] | None = None) -> str:
    """A Markdown table of the main scores of results, with intervals, baselines and targets as in `find_target`."""
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
