"""What many tests share: one run of the `tiny` recipe through every stage, and the start of any of its stages.

Nothing heavy is imported here: a test that needs no torch pays nothing for it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class TinyRun:
    """A finished run: folder and recipe, what was reported `(stage, step, steps, values)`, each stage's table."""

    path: Path
    recipe: Any
    model: Any
    reports: list[tuple[str, int, int, dict[str, float]]] = field(default_factory=list)
    tables: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Every stage of `tiny`, from random weights, without interruption. Read it, never write into it."""
    from spar.recipes import recipe
    from spar.training.run import train

    path = tmp_path_factory.mktemp("tiny") / "run"
    reports: list[tuple[str, int, int, dict[str, float]]] = []
    tables: dict[str, list[tuple[str, int, int]]] = {}
    model = train(
        recipe("tiny"),
        path,
        report=lambda *line: reports.append(line),
        announce=lambda stage, table: tables.__setitem__(stage.name, table),
    )
    return TinyRun(path, recipe("tiny"), model, reports, tables)


@pytest.fixture(scope="session")
def start(tiny_run: TinyRun) -> Callable[..., Any]:
    """`start(stage, recipe=..., **changes)`: a step's Context as the loop has it before the stage's first step.

    The weights are those that `tiny_run` had there; each call makes its own. `changes` replace fields of the stage;
    `teacher` stands for a loaded external teacher.
    """
    import torch

    from spar.data.prompts import PromptEncoder
    from spar.training.loop import previous_weights
    from spar.training.material import ShapesMaterial
    from spar.training.run import build_workshop, prepare
    from spar.training.stages import freeze
    from spar.training.steps import Context
    from spar.worlds.shapes.words import build_tokenizer

    cpu, tiny = torch.device("cpu"), tiny_run.recipe
    prompts = PromptEncoder(build_tokenizer(), tiny.model.grid**2)
    fresh = build_workshop(tiny, cpu, prompts)
    material = ShapesMaterial(tiny.data, prompts, tiny.seed, tiny_run.path / "cache")

    def build(name: str, recipe: Any = tiny, teacher: Any = None, **changes: Any) -> Context:
        stage = replace(recipe.stage(name), **changes)
        workshop = copy.deepcopy(fresh)
        previous_weights(workshop, tiny_run.path, stage, recipe.stages)
        ctx = Context(workshop.train(), material, recipe, stage, cpu, external_teacher=teacher)
        prepare(ctx)
        freeze(workshop, stage)
        return ctx

    return build
