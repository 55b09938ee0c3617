"""Tables, bars and log lines of the command line, built with rich for `main.py`.

rich is imported inside the functions, so that a verb without tables and terminal starts without it.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from spar.common.progress import Advance

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from spar.checkpoints.inspect import Inspection
    from spar.cli.doctor import Check
    from spar.data.validate import ValidationReport as DataReport
    from spar.evaluation.compare import Difference
    from spar.evaluation.results import Result
    from spar.evaluation.study_results import StudyResult
    from spar.training.config import StageConfig
    from spar.training.estimate import HardwareConfig, StageEstimate
    from spar.training.plan import RunPlan

WRONG_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # exit statuses

MARKS = {True: ("ok", "green"), False: ("wrong", "bold red"), None: ("note", "yellow")}
NOT_LOSS_TERMS = ("loss", "grad_norm", "lr", "seconds")  # values of a step that are not terms of its loss

Announce = Callable[["StageConfig", list[tuple[str, int, int]]], None]
Report = Callable[[str, int, int, dict[str, float]], None]


def new_console(*, stderr: bool = False) -> "Console":
    """A console that prints text as it is; without a terminal, one that does not wrap the rows of tables."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 1000
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)


def new_table(*columns: str, title: str | None = None) -> "Table":
    """A table with these columns; a name that starts with > is aligned to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def show_table(console: "Console", table: "Table") -> None:
    """Print a table; where a terminal is so narrow that it would break words, each row as lines of name and value."""
    wide = console.options.update(width=10**6)
    if table.__rich_measure__(console, wide).minimum <= console.width:
        console.print(table)
        return
    from rich.table import Table

    if table.title:
        console.print(table.title)
    for row in zip(*(column.cells for column in table.columns), strict=True):
        lines = Table.grid(padding=(0, 2))
        lines.add_column(no_wrap=True)
        lines.add_column(overflow="fold")
        for column, value in zip(table.columns, row, strict=True):
            if value != "":
                lines.add_row(str(column.header), value)
        console.print(lines, "")


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one: it alone prints."""
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Whether a launcher started this process together with others; a scheduler may name their number alone."""
    return "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "1")


@contextmanager
def progress_bar(title: str) -> Iterator[Advance | None]:
    """A bar with the time left, on stderr if it is a terminal: yields advance(done, total), or None."""
    if not (sys.stderr.isatty() and is_first_process()):
        yield None
        return
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=new_console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(title), total=None)  # a pattern of files has brackets
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def training_display() -> Iterator[tuple[Announce, Report]]:
    """(announce, report) for `train`: a stage's freezing table, a line per logged step, and a bar on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    console = new_console()
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), "left", TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, *times, console=console, disable=not console.is_terminal) as progress:

        def announce(stage: "StageConfig", parts: list[tuple[str, int, int]]) -> None:
            show_table(console, freezing_table(stage, parts))

        def report(stage: str, step: int, steps: int, values: dict[str, float]) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=steps, completed=step)
            progress.update(tasks[stage], completed=step + 1)
            console.print(log_line(stage, step, steps, values), soft_wrap=True)

        yield announce, report


def log_line(stage: str, step: int, steps: int, values: dict[str, float]) -> str:
    """Format one logged step: loss, its terms, gradient norm, learning rate, and the time left of the stage."""
    terms = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name not in NOT_LOSS_TERMS)
    left = timedelta(seconds=round(values["seconds"] / (step + 1) * (steps - step - 1)))
    rest = f"grad_norm {values['grad_norm']:.3g}  lr {values['lr']:.2g}  left {left}"
    return f"{stage} {step + 1}/{steps}  loss {values['loss']:.4g}  {terms}  {rest}"


def freezing_table(stage: "StageConfig", parts: Sequence[tuple[str, int, int]]) -> "Table":
    """Trainable and frozen parameters of a stage, by part."""
    table = new_table("part", ">trainable", ">frozen", title=f"{stage.name}: {stage.steps} steps of {stage.batch}")
    for part, trainable, frozen in parts:
        table.add_row(part, f"{trainable:,}", f"{frozen:,}")
    table.add_section()
    table.add_row("all", f"{sum(row[1] for row in parts):,}", f"{sum(row[2] for row in parts):,}")
    return table


def plan_table(plan: "RunPlan") -> "Table":
    """What each stage of a run starts from, reads, trains, prepares, measures at its end and makes void."""
    table = new_table(
        "stage", "objective", "starts from", "data", "trains", ">steps", ">batch", "prepares", "then measures",
        "removes",
    )  # fmt: skip
    for one in plan.stages:
        stage = one.config
        batch = f"{stage.batch} x {stage.objective.draws}" if stage.objective.draws > 1 else str(stage.batch)
        table.add_row(
            stage.name, stage.objective.kind, str(one.start), plan.recipe.data.describe(stage),
            ", ".join(stage.trainable), str(stage.steps), batch, ", ".join(one.prepares),
            "" if one.skipped else stage.objective.measures, ", ".join(one.invalidates),
        )  # fmt: skip
    return table


def estimate_table(estimates: Sequence["StageEstimate"], hardware: "HardwareConfig") -> "Table":
    """Cost of stages: parameters, memory of one device, operations of a step, images a second of all, time.

    What an objective does not say of its cost is left out.
    """
    peak, _ = hardware.limits
    table = new_table(
        "stage", ">trainable", ">frozen", ">at once", ">weights", ">gradients", ">optimizer", ">activations",
        ">in all", ">TFLOP a step", ">images/s", ">time",
        title=f"{hardware.gpus} x {hardware.gpu}: {hardware.mfu:.0%} of {peak / 1e12:,.3g} TFLOP/s each",
    )  # fmt: skip
    for one in estimates:
        held = map(show_bytes, (one.weights, one.gradients, one.optimizer, one.activations, one.memory))
        speed = (show_number(one.flops / 1e12), show_number(one.images_per_second), show_time(one.seconds))
        table.add_row(
            one.stage.name, show_count(one.trainable), show_count(one.frozen), str(one.micro_batch), *held,
            *(speed if one.flops else ("", "", "")),
        )  # fmt: skip
    table.add_section()
    table.add_row("all", *[""] * 10, show_time(sum(one.seconds for one in estimates)))
    return table


def show_count(number: float) -> str:
    """A number of parameters, in millions from one million on."""
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:,.1f} M"


def show_bytes(number: float) -> str:
    """A size in MiB or, from one on, in GiB."""
    return f"{number / 2**20:.1f} MiB" if number < 2**30 else f"{number / 2**30:.1f} GiB"


def show_number(value: float) -> str:
    """A number of three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show_time(seconds: float) -> str:
    """A time in its largest fitting unit."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def epochs_table(epochs: dict[str, dict[str, float]]) -> "Table":
    """Epochs of each data set in each stage."""
    sets = list(dict.fromkeys(name for one in epochs.values() for name in one))
    table = new_table("epochs", *(f">{name}" for name in sets))
    for stage, found in epochs.items():
        table.add_row(stage, *(f"{found[name]:,.2f}" if name in found else "" for name in sets))
    return table


def score_table(result: "Result") -> "Table":
    """Scores of a result with intervals and targets, the benchmark's main scores first."""
    from spar.evaluation.targets import find_target, main_scores, show, show_interval, show_name, show_title, verdict

    table = new_table("score", ">value", "95 % interval", ">n", "target", title=show_title(result))
    first = main_scores(result)
    for score in (*first, *(score for score in result.scores if score not in first)):
        target = find_target(result, score)
        goal = f"{target.at_least:g}: {verdict(score, target)}" if target else ""
        table.add_row(show_name(score.name), show(score.name, score.value), show_interval(score), str(score.n), goal)
    return table


def difference_table(differences: "Sequence[tuple[str, Difference]]") -> "Table":
    """Paired differences of models' scores from the first one's, by the names of their results."""
    from spar.evaluation.targets import show, show_name

    title = "p of main scores after Holm's correction, of single tasks without one"
    several = len({name for name, _ in differences}) > 1
    second = ("model", ">first", ">its") if several else (">first", ">second")
    heads = ("benchmark", "score", *second, ">difference", "95 % interval", ">n", ">p", "verdict")
    table = new_table(*heads, title=title)
    for name, one in differences:
        unit = " dB" if one.score == "psnr" else ""
        table.add_row(
            one.title, show_name(one.score), *([name] if several else []), show(one.score, one.first),
            show(one.score, one.second),
            f"{one.value:+.3g}{unit}", f"{one.low:+.3g} to {one.high:+.3g}", str(one.n), f"{one.p:.3g}", one.verdict,
        )  # fmt: skip
    return table


def study_table(found: "StudyResult") -> "Table":
    """The differences of a study's arms from its reference."""
    heads = ("arm", "endpoint", f">{found.study.reference}", ">arm", ">difference", "95 % interval", ">p", "verdict")
    holds = "contains 0 everywhere"
    if outside := found.outside:
        holds = f"does NOT contain 0 in {', '.join(outside)}: chance is larger there than said here"
    table = new_table(*heads, title=f"{found.study.question} (A/A arm: {holds})")
    for one in found.differences:
        table.add_row(
            one.arm, one.endpoint, f"{one.reference:.4g}", f"{one.mean:.4g}", f"{one.value:+.3g}",
            f"{one.low:+.3g} to {one.high:+.3g}", f"{one.p:.3g}", one.verdict,
        )  # fmt: skip
    return table


def check_table(checks: Sequence["Check"]) -> "Table":
    """Findings of the installation check."""
    from rich.text import Text

    table = new_table("", "what", "found", "how to fix it")
    for check in checks:
        table.add_row(Text(*MARKS[check.ok]), check.name, check.found, check.fix)
    return table


def model_values(found: "Inspection") -> dict[str, Any]:
    """An inspection as JSON values."""
    values = asdict(found)
    return {"kind": "model" if found.sampling else "tokenizer", "parameters": found.parameters, **values}


def model_table(found: "Inspection", name: str) -> "Table":
    """Parts of a folder of weights."""
    table = new_table("part", ">parameters", ">MB", "stored in", title=f"{name}: {found.format}")
    for part in found.parts:
        table.add_row(part.name, f"{part.parameters:,}", f"{part.bytes / 1e6:,.2f}", ", ".join(part.types))
    table.add_section()
    table.add_row("the model", f"{found.parameters:,}", "", "")
    return table


def model_facts(found: "Inspection") -> dict[str, Any]:
    """Origin, image size and scores of a folder of weights."""
    config, sampling = found.config, found.sampling
    size, stride = config.image_size, config.token_stride
    facts: dict[str, Any] = {
        "images": f"{size} x {size}, {config.grid**2} visual tokens of {stride} x {stride} pixels",
        **{key: found.manifest[key] for key in ("recipe", "seed", "commit") if key in found.manifest},
        "written by": ", ".join(f"{library} {version}" for library, version in found.versions.items()),
    }
    if sampling:
        facts["sampling"] = str(sampling)
    for benchmark, scores in found.scores.items():
        facts[benchmark] = ", ".join(f"{score} {value:g}" for score, value in scores.items())
    return facts


def data_table(report: "DataReport") -> "Table":
    """Findings of the data check: counts first, then what is wrong, by name."""
    from rich.text import Text

    table = new_table("", "what", "found", title=f"{report.name}: {report.kind}, {report.format}")

    def row(ok: bool | None, what: str, found: str) -> None:
        table.add_row(Text(*MARKS[ok]), what, found)

    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{name}: {count:,}" for name, count in counts.items())

    where = f"{report.files:,} files" if report.files else "a list"
    row(True, "samples", f"{report.samples:,} in {where}; checked {report.checked:,}")
    row(True, "formats, by content", listed(report.formats))
    row(True, "colour profiles", listed(report.profiles))
    row(True, "shorter side, pixels", listed(report.shorter_sides))
    row(True, "width to height", listed(report.aspects))
    row(not (report.captions["empty"] or report.captions["too_long"]), "captions, characters", listed(report.captions))
    row(not report.bad, "bad samples", f"{report.bad:,}")
    row(not report.duplicates, "duplicates", f"{report.duplicates:,}")
    if report.repeated_pictures:
        row(None, "same image, other words", f"{report.repeated_pictures:,}")
    if report.skipped:
        row(None, "skipped", listed(report.skipped))
    for note in report.notes:
        row(None, "note", note)
    for damage in report.damage:
        row(False, "damaged file", damage)
    for bad in report.named_bad:
        row(False, f"bad: {bad.key}", f"{bad.origin}: {bad.reason}")
    for key, earlier in report.named_duplicates:
        row(False, f"duplicate: {key}", f"of {earlier}")
    return table


def fail(message: str) -> int:
    """Print one line on stderr."""
    print("spar: error: " + printable(" ".join(message.split())), file=sys.stderr)
    return WRONG_INPUT


def printable(text: str) -> str:
    """Replace the control characters of an untrusted text."""
    return "".join(c if c.isprintable() else "?" for c in text)
