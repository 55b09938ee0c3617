"""Studies: variants of a recipe that differ in one thing, trained on several seeds and judged on the same prompts.

A study is a file (`read_study`); `study_run` trains, measures and compares. The arm `again` is the reference under
other seeds: an A/A test, in which nothing differs but chance.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar.checkpoints.bundled import BUNDLED_MODELS
from spar.common.config import Registry, from_dict
from spar.common.errors import InputError
from spar.common.settings_files import read_settings
from spar.evaluation.benchmarks import BENCHMARKS, Benchmark, suits
from spar.evaluation.options import EvalOptions
from spar.evaluation.shapes_frechet import shapes_frechet
from spar.evaluation.shapes_loss import shapes_loss
from spar.evaluation.shapes_probe import shapes_probe
from spar.evaluation.study_sharing import Training, training_keys
from spar.worlds.shapes.scene import SIDE

if TYPE_CHECKING:
    from spar.training.config import Recipe

STUDIES = Path(__file__).parent / "studies"
AGAIN, SHARED, SKIP = "again", "shared", "skip"
AGAIN_SEED = 1000  # what the arm `again` adds to the seeds
MAX_SEEDS, MAX_VARIANTS = 64, 64
LEAST_DRAWINGS = 100  # about as many as shapes-frechet has features
UNPAIRED = ("shapes-paraphrase", "shapes-codes")  # no mean over prompts
ENDPOINTS: dict[str, Benchmark] = {
    "shapes-loss": shapes_loss, "shapes-probe": shapes_probe, "shapes-frechet": shapes_frechet,
    **{name: run for name, run in BENCHMARKS.items() if name not in UNPAIRED},
}  # fmt: skip
RESERVED = (AGAIN, SHARED, "cache", "study.json", "results.json", "report.html")
Find = Callable[[str], "Recipe"]
Trainings = dict[tuple[str, int], Training]  # by arm and seed


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        name: of the study and of its folder.
        question: what it asks, in a sentence.
        recipe: the name of the recipe that all variants begin with.
        variants: by name the fields that differ from `recipe` and `settings`, as a recipe's file has them, also
            `recipe` itself, and in `skip` the stages that it leaves out; the first is the reference, to which the
            others are compared.
        shared: stages that are trained once a seed, for all variants: none may use what a variant changes.
        stages: those that each variant trains, in order; all after the shared ones when empty.
        settings: fields that all variants change.
        seeds: of training; `again` adds AGAIN_SEED to each.
        endpoints: of ENDPOINTS: benchmarks, and measures that are there for studies alone.
        limit: prompts of each task; None: all.
        images_per_prompt: as in `EvalOptions`.
        init_from: a bundled model that all trainings start from, unless the caller names another folder.
        reinitialize: patterns of parameters that start from random weights all the same, in every arm.
        teacher: a bundled model whose encoder is the semantic teacher of arms that begin with a tokenizer stage.
    """

    name: str
    question: str
    recipe: str
    variants: dict[str, dict[str, Any]]
    shared: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    endpoints: tuple[str, ...] = ("shapes-loss", "shapes-gen")
    limit: int | None = 20
    images_per_prompt: int = 1
    init_from: str = ""
    reinitialize: tuple[str, ...] = ()
    teacher: str = ""

    def __post_init__(self) -> None:
        for where, fields in (("settings", self.settings), ("variants", self.variants)):
            if not isinstance(fields, Mapping):
                raise InputError(f"{where}: expected an object with fields, got {type(fields).__name__}")
        for where, changes in (("settings", self.settings), *self.variants.items()):
            skip = changes.get(SKIP, []) if isinstance(changes, Mapping) else []
            if not isinstance(skip, list | tuple) or not all(isinstance(name, str) for name in skip):
                raise InputError(f"{where}.skip: expected a list of stages, got {skip!r}")
            if not isinstance(changes, Mapping) or "seed" in changes:
                got = "seed, which is the study's" if isinstance(changes, Mapping) else repr(changes)[:60]
                raise InputError(f"{where}: expected fields of a recipe that differ, got {got}")
        names = (self.name, *self.variants)
        for name in names:
            if not re.fullmatch(r"[\w][\w.-]{0,63}", name) or name in RESERVED:
                raise InputError(
                    f"study: expected names of letters, digits, '.', '_' and '-', none of {', '.join(RESERVED)}, got "
                    f"{name!r}"
                )
        if not 2 <= len(self.variants) <= MAX_VARIANTS:
            raise InputError(f"variants: expected 2 to {MAX_VARIANTS}, got {len(self.variants)}")
        trained = {seed + more for seed in self.seeds for more in (0, AGAIN_SEED)}
        if not 1 <= len(self.seeds) <= MAX_SEEDS or len(trained) < 2 * len(self.seeds):
            raise InputError(
                f"seeds: expected 1 to {MAX_SEEDS} that differ, and not by {AGAIN_SEED}, got {list(self.seeds)}"
            )
        for where, name in (("init_from", self.init_from), ("teacher", self.teacher)):
            if name and name not in BUNDLED_MODELS:
                raise InputError(f"{where}: expected one of {', '.join(BUNDLED_MODELS)}, got {name!r}")
        unknown = [name for name in self.endpoints if name not in ENDPOINTS]
        if unknown or not self.endpoints:
            raise InputError(f"endpoints: expected some of {', '.join(ENDPOINTS)}, got {', '.join(unknown) or 'none'}")
        self.options()

    @property
    def reference(self) -> str:
        return next(iter(self.variants))

    @property
    def arms(self) -> tuple[str, ...]:
        """The reference, its A/A arm, and the other variants."""
        reference, *others = self.variants
        return (reference, AGAIN, *others)

    def options(self) -> EvalOptions:
        return EvalOptions(limit=self.limit, images_per_prompt=self.images_per_prompt)

    def changes(self, arm: str) -> dict[str, Any]:
        """What an arm changes beside the settings of all."""
        given = {} if arm == SHARED else self.variants[self.reference if arm == AGAIN else arm]
        return {name: value for name, value in given.items() if name != SKIP}

    def skipped(self, arm: str) -> tuple[str, ...]:
        """The stages that an arm leaves out."""
        return tuple(self.variants[self.reference if arm == AGAIN else arm].get(SKIP, ()))


def read_study(path: Path) -> Study:
    """A study from a YAML or JSON file, or a bundled one by its name.

    Raises:
        InputError: an unreadable file, or a field or a value that a study does not have.
    """
    bundled = STUDIES / f"{path}.yaml"
    if not path.suffix and bundled.is_file():
        path = bundled
    values = read_settings(path, "STUDY", f"the file of a study, or one of {', '.join(bundled_studies())}")
    return from_dict(Study, {"name": path.stem, **values}, str(path))


def bundled_studies() -> list[str]:
    """Names of the studies that come with this installation."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def trainings(study: Study, folder: Path, registry: Registry, find: Find, start: str | None) -> Trainings:
    """The trainings of a study, the shared ones as SHARED, whether they are there yet or not.

    Args:
        start: what the first stages start from, as `study.json` has it.
    """
    found = {}
    for seed in study.seeds:
        first: Any = [start, list(study.reinitialize), *([study.teacher] if study.teacher else [])]
        shared = None
        arms = {arm: own_stages(study, base_recipe(study, arm, find), arm) for arm in study.arms}
        if study.shared:
            recipe = arm_recipe(study, SHARED, seed, registry, find)
            run = folder / SHARED / f"seed-{seed}"
            shared = Training(f"{study.name}/{SHARED}/seed-{seed}", run, study.shared, first, recipe)
            found[SHARED, seed] = shared
            first = list(training_keys(recipe, study.shared, first).values())
        for arm, stages in arms.items():
            recipe, run = arm_recipe(study, arm, seed, registry, find), folder / arm / f"seed-{seed}"
            found[arm, seed] = Training(f"{study.name}/{arm}/seed-{seed}", run, stages, first, recipe, shared)
    return found


def arm_recipe(study: Study, arm: str, seed: int, registry: Registry, find: Find) -> Recipe:
    """The recipe of an arm at a seed of the study, or of the shared stages."""
    from spar.training.changes import changed_recipe

    changes, where = study.changes(arm), f"study {study.name}, {arm}"
    changes.pop("recipe", None)
    base = changed_recipe(base_recipe(study, arm, find), study.settings, f"study {study.name}, settings", registry)
    return replace(changed_recipe(base, changes, where, registry), seed=seed + AGAIN_SEED * (arm == AGAIN))


def base_recipe(study: Study, arm: str, find: Find) -> Recipe:
    """The recipe that an arm begins with, unchanged."""
    return find(str(study.changes(arm).get("recipe", study.recipe)))


def own_stages(study: Study, base: Recipe, arm: str) -> tuple[str, ...]:
    """The stages that an arm trains."""
    names, skipped = [stage.name for stage in base.stages], study.skipped(arm)
    for name in (*study.shared, *study.stages):
        if name not in names:
            raise InputError(f"study {study.name}: expected stages of {base.name} ({', '.join(names)}), got {name!r}")
    first = max((names.index(name) + 1 for name in study.shared), default=0)
    own = study.stages or tuple(names[first:])
    if wrong := [name for name in skipped if name not in own]:
        raise InputError(f"study {study.name}, {arm}.skip: expected some of {', '.join(own)}, got {wrong[0]!r}")
    chosen = tuple(name for name in own if name not in skipped)
    if not chosen or any(names.index(name) < first for name in chosen):
        shown = ", ".join(chosen) or "none"
        raise InputError(f"study {study.name}: expected stages after {', '.join(study.shared)}, got {shown}")
    return chosen


def check_endpoints(study: Study, base: Recipe) -> None:
    """Refuse before the first training what could not be measured after the last."""
    from spar.inference.loading import tasks_of
    from spar.training.systems.spar import SparRecipe

    tasks = tasks_of(base.kind)
    if base.image_size != SIDE:
        raise InputError(f"study {study.name}: expected a recipe of {SIDE} pixels, got one of {base.image_size}")
    if "shapes-probe" in study.endpoints and not isinstance(base, SparRecipe):
        raise InputError(f"study {study.name}: shapes-probe reads SPAR's tokens, got a recipe of {base.kind}")
    if "shapes-frechet" in study.endpoints and study.limit is not None and study.limit < LEAST_DRAWINGS:
        raise InputError(
            f"study {study.name}: shapes-frechet compares sets of at least {LEAST_DRAWINGS} drawings, whose distance "
            f"fewer bias; got limit {study.limit}"
        )
    if left := [name for name in study.endpoints if name in BENCHMARKS and not suits(name, tasks)]:
        raise InputError(f"study {study.name}: {', '.join(left)} cannot be measured on a model of {base.kind}")
