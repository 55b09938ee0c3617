"""Write the tables of scores from the results files in docs/results: python docs/scores.py

docs/results.md has full tables, each between its own marks: the bundled weights of both systems, what each recipe gives
from random weights, the stages of those trainings (manifests), both recipes side by side, and what both systems cost
(benchmarks/results/two_systems.json). README.md has one row for each task. The manifests of the bundled weights,
which the model cards and `spar info` show, take their scores from the same files: python docs/bundle.py NAME --scores
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spar.checkpoints.bundled import BUNDLED_MODELS
from spar.common.config import read_json
from spar.evaluation.results import Result, read_result
from spar.evaluation.targets import (
    DUALTOKEN_RECIPE_TARGETS,
    RECIPE_TARGETS,
    TARGETS,
    scores_table,
    show,
    show_interval,
    show_title,
)

ROOT = Path(__file__).parents[1]

# (title of the result, score, what it is)
SUMMARY = (
    ("shapes-gen", "overall", "generated images that show the whole prompt and nothing else"),
    ("shapes-gen, held-out combinations", "overall", "the same for combinations that training never shows"),
    ("shapes-edit", "overall", "edits that do what was requested and keep the rest"),
    ("shapes-vqa", "overall", "questions answered correctly"),
    ("shapes-recon", "survival", "objects that look and lie the same after reconstruction"),
    ("shapes-recon", "psnr", "PSNR of reconstructions"),
    ("shapes-zero-shot", "overall", "colors and shapes named by the two towers"),
)


def read_results(folder: str) -> list[Result]:
    """The results files of a folder, by name."""
    return [read_result(path) for path in sorted((ROOT / folder).glob("*.json"))]


def summary_table(spar: Sequence[Result], dualtoken: Sequence[Result]) -> str:
    """A Markdown table of SUMMARY, each score with its interval; a task that a system does not define has none."""
    systems = [{show_title(result): result for result in results} for results in (spar, dualtoken)]
    lines = ["| Benchmark | Measures | SPAR | DualToken |", "| --- | --- | ---: | ---: |"]
    for title, name, measures in SUMMARY:
        cells = [title, measures]
        for results in systems:
            score = results[title].score(name) if title in results else None
            cells.append(f"{show(name, score.value)} ({show_interval(score)})" if score else "not defined")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def stages_table(manifest: Mapping[str, Any]) -> str:
    """A Markdown table of the stages in a model's manifest."""
    stages = manifest["stages"]
    whole = {key: sum(one[key] for one in stages.values()) for key in ("steps", "seconds")}
    shown = {**stages, "all": whole}
    rows = [f"| {name} | {one['steps']:,} | {one['seconds'] / 60:.0f} |" for name, one in shown.items()]
    return "\n".join(["| stage | steps | minutes |", "| --- | ---: | ---: |", *rows]) + "\n"


def costs_table(path: Path) -> str:
    """A Markdown table of a result of benchmarks/two_systems.py."""
    found = read_json(path)
    models, batch = found["results"].values(), str(found["batch"])
    lines = [f"|  | {' | '.join(one['system'] for one in models)} |", f"| --- |{' ---: |' * len(models)}"]
    rows: dict[str, list[str]] = {"parameters": [f"{one['parameters'] / 1e6:.1f} M" for one in models]}
    for task in ("generate", "edit", "understand", "reconstruct"):
        own = [one["seconds_per_image"].get(task) for one in models]
        for count, words in (("1", "alone"), (batch, f"of {batch}")):
            rows[f"{task}, {words}"] = [f"{one[count]:.3f} s" if one else "not defined" for one in own]
    rows["memory at most"] = [f"{one['peak_gib']:.2f} GiB" for one in models]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())]) + "\n"


def tables() -> dict[tuple[str, str], str]:
    """The tables by document and mark."""
    own, dualtoken = read_results("docs/results"), read_results("docs/results/dualtoken")
    recipe = read_results("docs/results/recipe")
    folders = ROOT / "docs/results/recipe/run", BUNDLED_MODELS["dualtoken"]
    run, made = (read_json(folder / "manifest.json") for folder in folders)
    second = read_results("docs/results/dualtoken/recipe")
    second_run = read_json(ROOT / "docs/results/dualtoken/recipe/run/manifest.json")
    return {
        ("README.md", "scores"): summary_table(own, dualtoken),
        ("docs/results.md", "scores"): scores_table(own, TARGETS),
        ("docs/results.md", "scores of the recipe"): scores_table(recipe, RECIPE_TARGETS),
        ("docs/results.md", "stages of the recipe"): stages_table(run),
        ("docs/results.md", "scores of DualToken"): scores_table(dualtoken),
        ("docs/results.md", "first stages of DualToken"): stages_table(made["origin"]),
        ("docs/results.md", "stages of DualToken"): stages_table(made),
        ("docs/results.md", "scores of DualToken's recipe"): scores_table(second, DUALTOKEN_RECIPE_TARGETS),
        ("docs/results.md", "stages of DualToken's recipe"): stages_table(second_run),
        ("docs/results.md", "both recipes"): summary_table(recipe, second),
        ("docs/results.md", "costs of both"): costs_table(ROOT / "benchmarks/results/two_systems.json"),
    }


def main() -> None:
    for (document, mark), table in tables().items():
        path = ROOT / document
        text = path.read_text("utf-8")
        begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
        path.write_text(text.split(begin)[0] + begin + table + end + text.split(end)[1], "utf-8")


if __name__ == "__main__":
    main()
