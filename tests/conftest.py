"""What many tests share: one run of the `tiny` recipe through every stage, and the start of any of its stages.

Nothing heavy is imported here: a test that needs no torch pays nothing for it.
"""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
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
    from spar.training.trainer import train

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

    from spar.processing.prompts import PromptEncoder
    from spar.training.config import freeze
    from spar.training.initial_weights import load_previous_weights
    from spar.training.modules import build_modules
    from spar.training.plan import PlannedStage, StageStart, preparations
    from spar.training.shapes_data import ShapesTrainingData
    from spar.training.steps import StepContext
    from spar.training.trainer import prepare
    from spar.worlds.shapes.tokenizer import build_tokenizer

    cpu, tiny = torch.device("cpu"), tiny_run.recipe
    prompts = PromptEncoder(build_tokenizer(), tiny.model.grid**2)
    fresh = build_modules(tiny, cpu, prompts)
    training_data = ShapesTrainingData(tiny.data, prompts, tiny.seed, tiny_run.path / "cache")

    def build(name: str, recipe: Any = tiny, teacher: Any = None, **changes: Any) -> StepContext:
        stage = replace(recipe.stage(name), **changes)
        modules = copy.deepcopy(fresh)
        names = [one.name for one in recipe.stages]
        before = recipe.stages[names.index(name) - 1] if names.index(name) else None
        begins = StageStart("random")
        if before:
            begins = StageStart("stage", tiny_run.path / before.name / "done")
            load_previous_weights(modules, begins.path)
        ctx = StepContext(modules.train(), training_data, recipe, stage, cpu, external_teacher=teacher)
        prepares = preparations(recipe, stage, begins, before=before)
        prepare(ctx, PlannedStage(stage, begins, prepares))
        freeze(modules, stage)
        return ctx

    return build


@pytest.fixture(scope="session")
def config() -> Any:
    """Far smaller than `tiny`: 16 visual tokens, 4 LLM layers with grouped keys, 2 ViT layers, 3 denoiser blocks."""
    from spar.recipes.tiny import TINY_MODEL

    return replace(
        TINY_MODEL,
        vision=replace(TINY_MODEL.vision, image_size=32, layers=2),
        denoiser=replace(TINY_MODEL.denoiser, layers=3, align_depth=2),
    )


@pytest.fixture(scope="session")
def randomize() -> Callable[..., Any]:
    """Fill a module with random weights that keep activations near unit size; frozen, in evaluation mode.

    The libraries initialise biases and position embeddings to zero, norms and layer scales to one: weights under which
    many a mistake is invisible.
    """
    import torch

    def fill(module: Any, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() > 1:
                    parameter.copy_(noise / min(parameter[0].numel(), 64) ** 0.5)
                elif name.endswith("bias"):  # torch draws these at random
                    parameter.copy_(0.3 * noise)
                else:
                    parameter.add_(0.3 * noise)
        return module.eval().requires_grad_(False)

    return fill


@pytest.fixture(scope="session")
def foreign() -> ModuleType:
    """`checkpoints/foreign.py`: tiny random checkpoints in the published formats."""
    spec = importlib.util.spec_from_file_location("foreign", Path(__file__).parent / "checkpoints" / "foreign.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
