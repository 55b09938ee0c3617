"""Write the tables and the plot of docs/performance.md from the files in benchmarks/results: docs/performance.py

Each file is the last line of a script of its name in benchmarks/.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spar.common.config import read_json

ROOT = Path(__file__).parents[1]
SCORES = ROOT / "docs" / "results"  # of `spar eval`
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "images" / "growth.svg"
PANEL, PLOT_COLUMNS = (180, 130), 4  # pixels of a panel's plot
COLORS = {"seconds": "#0b6e99", "gib": "#a8481d", "tflop": "#6b7280"}  # and dashes, so that colour is not all
DASHES = {"seconds": "", "gib": "6 3", "tflop": "2 3"}
Values = Mapping[str, Any]


def _attention(values: Values) -> str:
    return ", ".join(f"{name} {one['ratio']:.1f} times" for name, one in values["results"].items())


def _inference(values: Values) -> str:
    parts = (
        f"{name} {one['times_faster']:.2f} times ({one['roofline_share']:.0%} of the roofline)"
        for name, one in values["results"].items()
    )
    image = values["image"]
    return f"{', '.join(parts)}; an image of {image['steps']} steps {image['times_faster']:.2f} times"


def _text_tokens(values: Values) -> str:
    return ", ".join(f"batch {batch} {one['ratio']:.1f} times" for batch, one in values["results"].items())


def _train_step(values: Values) -> str:
    return ", ".join(f"{one['stage']} {one['seconds']:.1f} s, {one['mfu']:.0%}" for one in values["results"])


def _joining_policies(values: Values) -> str:
    parts = []
    for kind, machines in values["results"].items():
        ratios = [one["by cost"]["p95"] for loads in machines.values() for one in loads.values()]
        parts.append(f"{kind} steps {min(ratios):.2f} to {max(ratios):.2f} times")
    return ", ".join(parts)


def _cost_of_parts(values: Values) -> str:
    return ", ".join(
        f"{name} {values['results'][name]['encode']['ratio']:.2f} times"
        for name in ("no pixel stream", "no semantic stream")
    )


# By file: what is measured, beside what, and how the result reads.
ROWS: dict[str, tuple[str, str, Callable[[Values], str]]] = {
    "attention": ("explicit attention at the recipe's lengths", "torch's fused kernel", _attention),
    "full_size_inference": ("a part of spar-1b at inference", "the libraries' own classes", _inference),
    "text_tokens": ("text tokens a second, 0.5 B parameters", "transformers' generate", _text_tokens),
    "train_step": ("a training step of spar-1b, batch 1", "the run's own matmul peak", _train_step),
    "cost_of_parts": ("encoding with all parts, shapes", "without the part", _cost_of_parts),
    "data_loader": (
        "images a second of the loader", "a bare Pillow loop", lambda values: f"{values['ratio']:.2f} times"
    ),
    "decode_tiles": (
        "decoding in tiles, 1,024 pixels", "as a whole",
        lambda values: f"memory {values['memory_ratio']:.2f} times, time {values['time_ratio']:.1f} times",
    ),
    "serve_load": (
        "images a second of eight clients", "one client",
        lambda values: f"{values['ratio']:.1f} times; p95 of 16 clients {values['long']['p95_s']:.2f} s",
    ),
    "joining_policies": (
        "p95 of requests that join by cost, simulated", "gathered into the next call", _joining_policies
    ),
    "serve_joining": (
        "p95 of requests that may join a running batch", "gathered into the next call",
        lambda values: ", ".join(
            f"{kind} steps {one['p95_ratio']:.2f} times" for kind, one in values["results"].items()
        ),
    ),
    "startup": (
        "`spar generate` from a cold process", "importing torch", lambda values: f"{values['ratio']:.1f} times"
    ),
    "busy_cpu": (
        "an image while one process keeps a core busy", "with OpenMP's own way of waiting",
        lambda values: f"{values['ratio']['1']['image']:.1f} times faster",
    ),
}  # fmt: skip


def summary() -> str:
    """What the scripts that have a baseline in the same run gave, where they were run."""
    lines = ["| script | measured | beside | result | machine |", "| --- " * 5 + "|"]
    for name, (measured, beside, read) in ROWS.items():
        if not (RESULTS / f"{name}.json").is_file():
            continue
        values = read_json(RESULTS / f"{name}.json")
        machine = values["machine"]
        where = f"{machine['cores']} cores, {machine['processor']}"
        lines.append(f"| `{name}` | {measured} | {beside} | {read(values)} | {where} |")
    return "\n".join(lines) + "\n"


def _machine(values: Values) -> str:
    """Where a script was run, as the end of a sentence."""
    machine = values["machine"]
    return (
        f"{machine['cores']} cores, {machine['processor']}, {values['peak_gflops']:.0f} GFLOP/s; "
        f"torch {values['versions']['torch']}."
    )


def approximations() -> str:
    """What each way of sampling saves and costs."""
    path = RESULTS / "approximations.json"
    if not path.is_file():
        return "Not run.\n"
    values = read_json(path)
    lines = [
        "| way | blocks run | denoiser | whole call | Shapes-Gen | fidelity | change of 255 |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for name, one in values["results"].items():
        cells = (
            name, f"{one['blocks']:.0%}", f"{one['denoiser_times_faster']:.2f} times",
            f"{one['times_faster']:.2f} times", f"{one['score']:.3f} ({one['low']:.3f} to {one['high']:.3f})",
            f"{one['fidelity']:.3f}", f"{one['change_of_255']:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    images = next(iter(values["results"].values()))["images"]
    lines += [
        "",
        f"{images} images, one a prompt, the same seeds; {values['dtype']}, {values['batch']} at once, "
        f"{values['threads']} threads;",
        _machine(values),
    ]
    return "\n".join(lines) + "\n"


def few_steps() -> str:
    """What distillation to few steps leaves of the scores; the first row is the model that was distilled."""
    lines = ["| steps and guidance | Shapes-Gen | Shapes-Edit |", "| --- | --- | --- |"]
    few = SCORES / "few-steps"
    exact = ("20, guidance 4.5 (edits 2)", SCORES, "")
    for words, folder, suffix in (exact, ("4, none", few, "-4"), ("2, none", few, "-2")):
        both = (_overall(folder / f"{name}{suffix}.json") for name in ("shapes-gen", "shapes-edit"))
        scores = (f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in both)
        lines.append(f"| {words} | {' | '.join(scores)} |")
    return "\n".join(lines) + "\n"


def _overall(path: Path) -> tuple[float, float, float]:
    """The overall score of a result, and its interval."""
    (found,) = (one for one in read_json(path)["scores"] if one["name"] == "overall")
    return found["value"], found["low"], found["high"]


GROWN = {"seconds": "time", "gib": "memory", "tflop": "operations"}


def growth() -> str:
    """The exponents of what grows, measured at the small size and counted at full size."""
    lines = ["| what grows | sizes | time | memory | operations | spar-1b, operations | in the limit |"]
    lines.append("| --- | --- " + "| ---: " * 5 + "|")
    whole = read_json(RESULTS / "growth_1b.json")["results"]
    values = read_json(RESULTS / "growth.json")
    for name, one in values["results"].items():
        own, full = one["exponents"], whole.get(name, {"exponents": {}})["exponents"]
        shown = (f"{own[kind]:.2f}" if own.get(kind) is not None else "" for kind in GROWN)
        counted = f"{full['tflop']:.2f}" if full.get("tflop") is not None else ""
        sizes = f"{one['sizes'][0]} to {one['sizes'][-1]}"
        lines.append(f"| {name} | {sizes} | {' | '.join(shown)} | {counted} | {one['expected']}: {one['why']} |")
    lines += [
        "",
        f"`{values['recipe']}`, random weights, {values['dtype']}, {values['threads']} threads;",
        f"{_machine(values)} `spar-1b` from {whole['side, encode']['sizes'][0]} to "
        f"{whole['side, encode']['sizes'][-1]} pixels.",
    ]
    return "\n".join(lines) + "\n"


def growth_plot() -> str:
    """One panel of logarithms an axis, each quantity over its value at the first size; thin: the limit's slope."""
    values = read_json(RESULTS / "growth.json")["results"]
    width, height = PANEL[0] + 60, PANEL[1] + 62
    rows = math.ceil(len(values) / PLOT_COLUMNS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PLOT_COLUMNS * width} {rows * height + 24}" '
        'font-family="sans-serif" font-size="11" role="img" aria-label="Growth of time, memory and operations">'
        '<rect width="100%" height="100%" fill="white"/>'
    ]
    for number, (name, one) in enumerate(values.items()):
        x, y = number % PLOT_COLUMNS * width + 44, number // PLOT_COLUMNS * height + 24
        parts.append(f'<g transform="translate({x} {y})">{_panel(name, one)}</g>')
    for number, (kind, words) in enumerate(GROWN.items()):
        x, y = 44 + 130 * number, rows * height + 10
        parts.append(
            f'<path d="M{x} {y}h26" stroke="{COLORS[kind]}" stroke-width="2" stroke-dasharray="{DASHES[kind]}"/>'
            f'<text x="{x + 32}" y="{y + 4}">{words}</text>'
        )
    x = 44 + 130 * len(GROWN)
    parts.append(
        f'<path d="M{x} {y}h26" stroke="black" stroke-width="0.7"/><text x="{x + 32}" y="{y + 4}">in the limit</text>'
    )
    return "".join(parts) + "</svg>\n"


def _panel(name: str, one: Values) -> str:
    sizes = one["sizes"]
    power = 2 if name.startswith("side") else 1  # of sides the pixels count
    across = [power * math.log(size / sizes[0]) for size in sizes]
    kinds = {kind: one[kind] for kind in GROWN if kind in one and min(one[kind]) > 0}
    lines = {kind: [math.log(value / rows[0]) for value in rows] for kind, rows in kinds.items()}
    limit = [one["expected"] * each for each in across]
    top = max(limit[-1] if one["expected"] == 1 else 0, *(max(line) for line in lines.values()), 0.1)
    reach = across[-1] or 1.0

    def path(line: Sequence[float], style: str) -> str:
        kept = [(a, b) for a, b in zip(across, line, strict=True) if b <= top * 1.02]
        points = " ".join(f"{PANEL[0] * a / reach:.1f},{PANEL[1] * (1 - b / top):.1f}" for a, b in kept)
        return f'<polyline points="{points}" fill="none" {style}/>'

    drawn = [path(limit, 'stroke="black" stroke-width="0.7"')]
    drawn += [
        path(line, f'stroke="{COLORS[kind]}" stroke-width="2" stroke-dasharray="{DASHES[kind]}"')
        for kind, line in lines.items()
    ]
    return (
        f'<text x="0" y="-8" font-weight="bold">{name}</text>'
        f'<rect width="{PANEL[0]}" height="{PANEL[1]}" fill="none" stroke="#999"/>{"".join(drawn)}'
        f'<text x="-6" y="{PANEL[1]}" text-anchor="end">1</text>'
        f'<text x="-6" y="10" text-anchor="end">{math.exp(top):.3g}</text>'
        f'<text x="0" y="{PANEL[1] + 14}">{sizes[0]}</text>'
        f'<text x="{PANEL[0]}" y="{PANEL[1] + 14}" text-anchor="end">{sizes[-1]}</text>'
    )


def tables() -> dict[str, str]:
    """By mark."""
    return {
        "ratios": summary(), "approximations": approximations(), "few steps": few_steps(), "growth": growth(),
    }  # fmt: skip


def main() -> None:
    text = DOCUMENT.read_text("utf-8")
    for mark, table in tables().items():
        begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
        text = text.split(begin)[0] + begin + table + end + text.split(end)[1]
    DOCUMENT.write_text(text, "utf-8")
    PLOT.write_text(growth_plot(), "utf-8")


if __name__ == "__main__":
    main()
