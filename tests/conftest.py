"""What many tests share: one run of the `tiny` recipe through every stage, and the start of any of its stages.

Nothing heavy is imported here: a test that needs no torch pays nothing for it.
"""

import copy
import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def pytest_configure() -> None:
    """A suite that a script starts in the background, or nohup, inherits ignored signals, which a run respects.

    The tests compare numbers with those of a CPU, so they do not see a GPU unless the variable names one.
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Continuous integration has a limit, and machines differ by four times in speed: slow tests that would begin after
    that second of the clock (time.time) are skipped, and the run says so.
    """
    until = os.environ.get("SPAR_SLOW_TESTS_UNTIL")
    if until and item.get_closest_marker("slow") and time.time() > float(until):
        pytest.skip("no slow test begins this late (SPAR_SLOW_TESTS_UNTIL)")


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


@dataclass(frozen=True)
class Start:
    """A stage as the loop has it before its first step: what a step computes with, and the data."""

    ctx: Any
    data: Any

    @property
    def modules(self) -> Any:
        return self.ctx.modules

    @property
    def stage(self) -> Any:
        return self.ctx.stage

    @property
    def recipe(self) -> Any:
        return self.ctx.recipe

    def at(self, step: int) -> Any:
        """The context of a step."""
        return replace(self.ctx, step=step)

    def batch(self, step: int) -> Any:
        """The whole batch of a step."""
        return self.data.get_batch(self.stage, step, slice(None))

    def terms(self, step: int = 0) -> Any:
        """The terms of a step."""
        return self.stage.objective(self.at(step), self.batch(step))


@pytest.fixture(scope="session")
def start(tiny_run: TinyRun) -> Callable[..., Any]:
    """`start(stage, recipe=..., **changes)`: a Start of the stage with the weights that `tiny_run` had there.

    Each call makes its own. `changes` replace fields of the stage, of its objective or of its data; `teacher` stands
    for a loaded external teacher.
    """
    import torch

    from spar.recipes.shapes.data import ShapesTrainingData
    from spar.training.config import freeze
    from spar.training.initial_weights import load_previous_weights, random_modules
    from spar.training.objectives.base import StepContext
    from spar.training.plan import Origin, PlannedStage, StageStart
    from spar.worlds.shapes.tokenizer import build_tokenizer

    cpu, tiny = torch.device("cpu"), tiny_run.recipe
    prompts = tiny.prompts(build_tokenizer())
    fresh = random_modules(tiny, cpu, {})
    training_data = ShapesTrainingData(tiny.data, tiny.model.grid, tiny.seed, tiny_run.path / "cache")

    def build(name: str, recipe: Any = tiny, teacher: Any = None, **changes: Any) -> Start:
        stage = recipe.stage(name)
        for part in ("objective", "data"):
            own = {key: changes.pop(key) for key in [*changes] if key in field_names(getattr(stage, part))}
            changes[part] = replace(changes.get(part, getattr(stage, part)), **own)
        stage = replace(stage, **changes)
        modules = copy.deepcopy(fresh)
        names = [one.name for one in recipe.stages]
        before = recipe.stages[names.index(name) - 1] if names.index(name) else None
        begins = StageStart("random")
        if before:
            begins = StageStart("stage", tiny_run.path / before.name / "done")
            load_previous_weights(modules, begins.path)
        networks = {} if teacher is None else {"external_teacher": teacher}
        ctx = StepContext(modules.train(), prompts, recipe, stage, cpu, networks)
        prepares = stage.objective.preparations(recipe, stage, Origin(before=before))
        stage.objective.prepare(ctx, training_data, PlannedStage(stage, begins, prepares))
        freeze(modules, stage)
        return Start(ctx, training_data)

    return build


def field_names(config: Any) -> set[str]:
    return {item.name for item in fields(config)}


@pytest.fixture(scope="session")
def config() -> Any:
    """Far smaller than `tiny`: 16 visual tokens, 4 LLM layers with grouped keys, 2 ViT layers, 3 denoiser blocks.

    Its forms are the published ones: linear attention, and no states of the LLM at a reference's tokens.
    """
    from spar.recipes.tiny import TINY_MODEL

    return replace(
        TINY_MODEL,
        vision=replace(TINY_MODEL.vision, image_size=32, layers=2),
        connector=replace(TINY_MODEL.connector, reference="replaced"),
        denoiser=replace(
            TINY_MODEL.denoiser, layers=3, align_depth=2, self_attention="linear", reference_states=False
        ),
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
def write_captioned() -> Callable[[Path, int], None]:
    """Writes a new folder of so many images of the shapes world with captions, as a user's own data."""

    def write(folder: Path, count: int) -> None:
        import numpy as np
        from PIL import Image

        from spar.worlds.shapes.captions import caption
        from spar.worlds.shapes.dataset import sample_at

        rng, lines = np.random.default_rng(0), []
        folder.mkdir()
        for i in range(count):
            sample = sample_at("validation", i)
            Image.fromarray(sample.image).save(folder / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": caption(sample.scene, rng)}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))

    return write


@pytest.fixture(scope="session")
def foreign() -> ModuleType:
    """`checkpoints/foreign.py`: tiny random checkpoints in the published formats."""
    spec = importlib.util.spec_from_file_location("foreign", Path(__file__).parent / "checkpoints" / "foreign.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def dual_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Every stage of `dualtoken-tiny`, from random weights. Read it, never write into it."""
    from spar.recipes import recipe
    from spar.training.trainer import train

    path = tmp_path_factory.mktemp("dualtoken") / "run"
    reports: list[tuple[str, int, int, dict[str, float]]] = []
    tables: dict[str, list[tuple[str, int, int]]] = {}
    own = recipe("dualtoken-tiny")
    model = train(
        own, path, report=lambda *line: reports.append(line),
        announce=lambda stage, table: tables.__setitem__(stage.name, table),
    )
    return TinyRun(path, own, model, reports, tables)
