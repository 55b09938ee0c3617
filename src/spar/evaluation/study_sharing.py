"""What the arms of studies share: the ends of stages that another arm, or another study, has trained alike.

The weights at a stage's end follow from the recipe without its stages, the stages up to this one, the objectives of
all (which build the heads, in an order that the seed's numbers follow), and from what the first stage starts from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar.common.config import decisive, to_dict
from spar.common.files import atomic_directory, atomic_file

if TYPE_CHECKING:
    from spar.training.config import Recipe

METRICS, ORIGIN, TEXT_TOKENIZER = "metrics.jsonl", "origin.json", "text_tokenizer"


@dataclass(frozen=True)
class Training:
    """A run, and by stage, in order, all that the weights at its end follow from."""

    run: Path
    keys: Mapping[str, str]


def training_keys(recipe: Recipe, stages: Sequence[str], start: Any) -> dict[str, str]:
    """The keys of a training's stages; `start` is what the first one starts from, as JSON has it."""
    values = decisive(to_dict(recipe), recipe)
    own = {stage["name"]: stage for stage in values.pop("stages")}
    values["objectives"] = {name: stage["objective"].get("kind") for name, stage in own.items()}
    return {
        name: json.dumps([values, [own[each] for each in stages[: number + 1]], start], sort_keys=True)
        for number, name in enumerate(stages)
    }


def take_over(training: Training, others: Sequence[Training]) -> dict[str, Path]:
    """Take over the ends of the first stages that a run lacks, and their curves, from others that trained them alike.

    Files are linked where the disk can, and copied otherwise. A stage that the run has begun itself stays its own.

    Returns:
        By stage the run that it came from.
    """
    run, taken = training.run, dict[str, Path]()
    for name, key in training.keys.items():
        if (run / name / "done").is_dir():
            continue
        alike = (one.run for one in others if one.run != run and one.keys.get(name) == key)
        source = next((other for other in alike if (other / name / "done" / "meta.json").is_file()), None)
        if source is None or (run / name / "state").exists():
            break
        for extra in (ORIGIN, TEXT_TOKENIZER):
            if (source / extra).exists() and not (run / extra).exists():
                _link_or_copy_tree(source / extra, run / extra)
        _add_metrics(source / METRICS, run / METRICS, name)
        _link_or_copy_tree(source / name / "done", run / name / "done")
        taken[name] = source
    return taken


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


def _add_metrics(source: Path, target: Path, stage: str) -> None:
    """Put a stage's lines of another run's curves after those of one's own other stages."""
    kept = [line for line in _lines(target) if json.loads(line).get("stage") != stage]
    kept += [line for line in _lines(source) if json.loads(line).get("stage") == stage]
    with atomic_file(target) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
