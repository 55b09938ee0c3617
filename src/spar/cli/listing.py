"""The verb that says what there is: `spar list`."""

import json
from pathlib import Path
from typing import Any

from spar.cli.console import new_console, new_table, show_count, show_table
from spar.cli.help_arguments import ListArguments
from spar.cli.parsing import takes


@takes(ListArguments, "spar list")
def list_all(args: ListArguments) -> int:
    """List the recipes, the bundled models, the benchmarks and the studies."""
    found = {"recipes": _recipes(), "models": _models(), "benchmarks": _benchmarks(), "studies": _studies()}
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    console = new_console()
    for title, rows in found.items():
        table = new_table(*rows[0] if rows else ("none",), title=title)
        for row in rows:
            table.add_row(*(show_count(value) if key == "parameters" else str(value) for key, value in row.items()))
        show_table(console, table)
    return 0


def _recipes() -> list[dict[str, Any]]:
    from spar.checkpoints.model_header import TITLES
    from spar.recipes import RECIPES

    rows = []
    for name, function in RECIPES.items():
        one = function()
        rows.append({
            "name": name, "system": TITLES.get(one.kind, one.kind), "pixels": one.image_size,
            "stages": len(one.stages), "steps": sum(stage.steps for stage in one.stages),
            "what": (function.__doc__ or "").strip().partition("\n")[0],
        })  # fmt: skip
    return rows


def _models() -> list[dict[str, Any]]:
    """The models that came with this installation; no flag needs to name the default."""
    from spar.checkpoints.bundled import BUNDLED_MODELS, DEFAULT_MODEL
    from spar.checkpoints.inspect import inspect

    rows: list[dict[str, Any]] = []
    for name, folder in BUNDLED_MODELS.items():
        if not (folder / "config.json").is_file():
            continue
        found = inspect(folder)
        rows.append({
            "name": f"{name}, the default" if name == DEFAULT_MODEL else name, "format": found.format,
            "recipe": found.manifest.get("recipe", ""), "pixels": found.config.image_size,
            "parameters": found.parameters, "folder": str(folder),
        })  # fmt: skip
    return rows


def _benchmarks() -> list[dict[str, Any]]:
    from spar.evaluation.benchmarks import MEASURED, NEEDS

    return [{"name": name, "needs": NEEDS.get(name, ""), "what": what} for name, what in MEASURED.items()]


def _studies() -> list[dict[str, Any]]:
    from spar.evaluation.study import bundled_studies, read_study

    studies = [read_study(Path(name)) for name in bundled_studies()]
    return [
        {"name": one.name, "recipe": one.recipe, "arms": len(one.arms), "seeds": len(one.seeds), "asks": one.question}
        for one in studies
    ]
