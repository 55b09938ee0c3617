"""What the arms of studies share: the ends of stages that another arm, or another study, has trained alike.

The weights at a stage's end follow from the recipe without its stages, the stages up to this one, the heads that all
stages' objectives build (in an order that the seed's numbers follow), and from what the first stage starts from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar.common.config import Registry, decisive, read_json, to_dict, write_json
from spar.common.errors import InputError
from spar.common.files import atomic_directory, atomic_file

if TYPE_CHECKING:
    from spar.training.config import Recipe

METRICS, ORIGIN, TEXT_TOKENIZER = "metrics.jsonl", "origin.json", "text_tokenizer"
TAKEN = "taken.json"  # in a run: by stage where its end came from
KEPT = (ORIGIN, TEXT_TOKENIZER)  # what else a run keeps of its start


@dataclass(frozen=True)
class Training:
    """A run of a study, whether it is there yet or not.

    Attributes:
        name: STUDY/ARM/seed-S.
        run: its folder.
        stages: what it trains, in order.
        start: what the first one starts from, as JSON has it; of an arm with `shared` stages their keys.
        recipe: that it is trained by; what the folder holds may have been trained by an earlier form of it.
        shared: the training that it starts from, of a study that has shared stages.
    """

    name: str
    run: Path
    stages: tuple[str, ...]
    start: Any
    recipe: Recipe
    shared: Training | None = None

    def keys(self) -> dict[str, str]:
        """By stage, in order, all that the weights at its end follow from."""
        return training_keys(self.recipe, self.stages, self.start)

    def trained_keys(self, registry: Registry) -> dict[str, str]:
        """The same of the recipe that the folder was trained by; none where it tells nothing."""
        from spar.training.run_folder import read_recipe

        start = self.start if self.shared is None else list(self.shared.trained_keys(registry).values())
        try:
            recipe = read_recipe(self.run / "recipe.json", registry)
            return training_keys(recipe, [name for name in self.stages if recipe.stage(name)], start)
        except InputError:
            return {}


def training_keys(recipe: Recipe, stages: Sequence[str], start: Any) -> dict[str, str]:
    """The keys of a training's stages; `start` is what the first one starts from, as JSON has it."""
    values = decisive(to_dict(recipe), recipe)
    own = {stage["name"]: stage for stage in values.pop("stages")}
    values["heads"] = sorted({name for stage in recipe.stages for name in stage.objective.build(recipe, {})})
    return {
        name: json.dumps([values, [own[each] for each in stages[: number + 1]], start], sort_keys=True)
        for number, name in enumerate(stages)
    }


def take_over(training: Training, others: Sequence[Training], registry: Registry) -> dict[str, Training]:
    """Take over the ends of the first stages that a run lacks, and their curves, from others that trained them alike.

    Files are linked where the disk can, and copied otherwise; damaged ones are passed over. A stage that the run has
    begun itself stays its own. The run's `taken.json` names the sources.

    Returns:
        By stage the training that it came from.
    """
    run, taken = training.run, dict[str, Training]()
    if (run / TAKEN).is_file():
        write_json(run / TAKEN, _taken(run))
    for name, key in training.keys().items():
        if (run / name / "done").is_dir():
            continue
        alike = (one for one in others if one.run != run and one.keys().get(name) == key)
        source = next((one for one in alike if _holds(one, name, key, registry)), None)
        if source is None or (run / name / "state").exists():
            break
        for extra in KEPT:
            if (source.run / extra).exists() and not (run / extra).exists():
                _link_or_copy_tree(source.run / extra, run / extra)
        _add_metrics(source.run / METRICS, run / METRICS, name)
        write_json(run / TAKEN, {**_taken(run), name: source.name})
        _link_or_copy_tree(source.run / name / "done", run / name / "done")
        taken[name] = source
    return taken


def _taken(run: Path) -> dict[str, str]:
    """What a run has taken over and still holds."""
    before = read_json(run / TAKEN) if (run / TAKEN).is_file() else {}
    return {stage: source for stage, source in before.items() if (run / stage / "done").is_dir()}


def _holds(source: Training, stage: str, key: str, registry: Registry) -> bool:
    """Whether a run holds the undamaged end of a stage, and was trained by the recipe that is expected of it."""
    from spar.training.checkpoint import damage

    done = source.run / stage / "done"
    return done.is_dir() and source.trained_keys(registry).get(stage) == key and damage(done) is None


def metric_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run's metrics; lines that a crash has cut are left out, and a missing file has none."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield row


def _add_metrics(source: Path, target: Path, stage: str) -> None:
    """Put a stage's rows of another run's curves after those of one's own other stages."""
    kept = [row for row in metric_rows(target) if row.get("stage") != stage]
    kept += [row for row in metric_rows(source) if row.get("stage") == stage]
    with atomic_file(target) as temporary:
        temporary.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")


def _link_or_copy_tree(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        with atomic_directory(target) as temporary:
            shutil.copytree(source, temporary, copy_function=_link_or_copy, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def alike_stages(training: Training, others: Sequence[Training]) -> int:
    """How many of a training's stages some others train alike, there or not."""
    found = [set(one.keys().values()) for one in others]
    return sum(any(key in own for own in found) for key in training.keys().values())
