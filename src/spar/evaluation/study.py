"""Studies: variants of a recipe that differ in one thing, trained on several seeds and judged on the same prompts.

A study is a file (`read_study`); `run_study` trains what is missing, measures what is missing and compares. Its folder:
`study.json`, `shared/seed-S` with the stages that all variants share, `VARIANT/seed-S` with a run each and its
`results/`, and at the end `results.json`. The arm `again` is the reference under other seeds: an A/A test, in which
nothing differs but chance.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spar.checkpoints.bundled import BUNDLED_MODELS, bundled_folder
from spar.common.config import Registry, from_dict, read_json, to_dict, write_json
from spar.common.errors import InputError
from spar.common.settings_files import read_settings
from spar.evaluation.benchmarks import BENCHMARKS, Benchmark, suits
from spar.evaluation.options import EvalOptions
from spar.evaluation.results import Result, read_result, write_result
from spar.evaluation.shapes_frechet import shapes_frechet
from spar.evaluation.shapes_loss import shapes_loss
from spar.evaluation.shapes_probe import shapes_probe
from spar.evaluation.study_sharing import (
    METRICS,
    ORIGIN,
    TAKEN,
    Training,
    alike_stages,
    metric_rows,
    take_over,
    training_keys,
)
from spar.evaluation.study_statistics import StudyDifference, study_differences
from spar.worlds.shapes.scene import SIDE

if TYPE_CHECKING:
    from spar.inference.base import Pipeline
    from spar.training.config import Recipe

STUDIES = Path(__file__).parent / "studies"
AGAIN, SHARED, SKIP = "again", "shared", "skip"
ARM = "arm.json"  # in an arm's run, once it is trained
MEMORY = "memory.json"  # in a run that took stages over: the most that training them took of a GPU
AGAIN_SEED = 1000  # what the arm `again` adds to the seeds
MAX_SEEDS, MAX_VARIANTS = 64, 64
LEAST_DRAWINGS = 100  # about as many as shapes-frechet has features
UNPAIRED = ("shapes-paraphrase", "shapes-codes")  # no mean over prompts
ENDPOINTS: dict[str, Benchmark] = {
    "shapes-loss": shapes_loss, "shapes-probe": shapes_probe, "shapes-frechet": shapes_frechet,
    **{name: run for name, run in BENCHMARKS.items() if name not in UNPAIRED},
}  # fmt: skip
RESERVED = (AGAIN, SHARED, "cache", "study.json", "results.json", "report.html")
Say = Callable[[str], None]
Find = Callable[[str], "Recipe"]


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


@dataclass(frozen=True)
class StudyResult:
    """What a study has found: every arm's results by endpoint and seed, the differences, and what the arms cost.

    `memory` is the most that a training's tensors took of a GPU, in bytes; 0 on a CPU, as all arms share one process.
    `reached` has of each arm the share of its last stage's steps after which the reference's flow loss in training was
    down to what the arm's was at its end, and None if it never was; arms without such a loss, or with other steps, are
    not in it. `taken` has of each run of the study, ARM/seed-S, the stages that were trained elsewhere, and where.
    """

    study: Study
    results: dict[str, dict[str, list[Result]]]
    differences: tuple[StudyDifference, ...]
    seconds: dict[str, float]
    parameters: dict[str, int]
    memory: dict[str, int]
    reached: dict[str, float | None]
    taken: dict[str, dict[str, str]]

    @property
    def outside(self) -> list[str]:
        """Where the A/A arm's interval does not contain 0, so that chance is larger than the others say."""
        own = (one for one in self.differences if one.arm == AGAIN)
        return [one.endpoint for one in own if not one.low <= 0 <= one.high]

    @property
    def holds(self) -> bool:
        """Whether every interval of the A/A arm contains 0, so that the others may be believed."""
        return not self.outside


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


def run_study(
    study: Study, folder: Path, registry: Registry, find: Find, *, device: str | None = None,
    init_from: Path | None = None, first: int | None = None, reuse: Sequence[Path] = (), say: Say = lambda _: None,
) -> StudyResult | None:  # fmt: skip
    """Train and measure what is not there yet, and compare; a repeated call goes on where the last one ended.

    Stages that arms train alike, at the same seed, are trained once.

    Args:
        find: gives the recipe of a name.
        init_from: what the first stage of every run, or of the shared ones, starts from; by default `study.init_from`.
        first: only so many of the study's seeds; a later call may go on with more.
        reuse: folders of other studies, whose stages count like those of this one's arms.
        say: is told what happens next, a line at a time.

    Returns:
        The result, also in `results.json`; None when a signal stopped a training, whose state is saved.

    Raises:
        InputError: a folder that holds another study, or what training or a benchmark refuses.
    """
    if init_from is None and study.init_from:
        init_from = bundled_folder(study.init_from)
    own = trainings(study, folder, registry, find, _start_name(study, init_from))
    stages = {arm: own[arm, study.seeds[0]].stages for arm in study.arms}
    for (arm, _), training in own.items():
        if arm != SHARED:
            _own_stages(study, training.recipe, arm)
            _check_endpoints(study, training.recipe)
    skips = any(names[0] != own[arm, study.seeds[0]].recipe.stages[0].name for arm, names in stages.items())
    if init_from is None and not study.shared and skips and len({names[0] for names in stages.values()}) > 1:
        raise InputError(f"study {study.name}: an arm that skips the first stage needs what it starts from: init_from")
    _check_trained(own.values(), registry)
    others = [training for other in reuse for training in _of_another_study(other, registry, find, init_from)]
    _open_folder(study, folder, init_from)
    chosen = replace(study, seeds=study.seeds[:first])
    begin = study.reinitialize, bundled_folder(study.teacher) if study.teacher else None
    if reuse:
        alike = sum(alike_stages(training, others) for (_, seed), training in own.items() if seed in chosen.seeds)
        say(f"{alike} stages are trained alike in {', '.join(map(str, reuse))}")
    for seed in chosen.seeds:
        start = init_from
        if study.shared:
            run = folder / SHARED / f"seed-{seed}"
            start = run / study.shared[-1] / "done"
            if not (run / ARM).is_file():
                _share_cache(folder, run)
                _take_over(own[SHARED, seed], others, registry, say)
                say(f"{SHARED}, seed {seed}: training")
                if not _train(own[SHARED, seed].recipe, run, study.shared, device, init_from, *begin):
                    return None
        for arm in study.arms:
            run, last = own[arm, seed].run, stages[arm][-1]
            if not (run / ARM).is_file() or not (run / last / "done").is_dir():
                shutil.rmtree(run / "results", ignore_errors=True)  # of weights that are gone
                _share_cache(folder, run)
                _take_over(own[arm, seed], [*own.values(), *others], registry, say)
                say(f"{arm}, seed {seed}: training")
                how = ((), None) if study.shared else begin
                if not _train(own[arm, seed].recipe, run, stages[arm], device, start, *how):
                    return None
            if missing := [name for name in study.endpoints if not _result_path(run, name).is_file()]:
                say(f"{arm}, seed {seed}: {', '.join(missing)}")
                _measure(study, run, last, missing, registry, device)
    found = collect(chosen, folder)
    write_json(folder / "results.json", {**_shown(found), "holds": found.holds})
    return found


def _check_trained(trained: Iterable[Training], registry: Registry) -> None:
    """Refuse ends of stages that another form of the recipe has trained: arms would differ in more than they say."""
    for training in trained:
        keys = training.keys()
        if done := [name for name in keys if (training.run / name / "done").is_dir()]:
            found = training.trained_keys(registry)
            if wrong := [name for name in done if found.get(name) != keys[name]]:
                raise InputError(
                    f"{training.run} has trained {wrong[0]} by another form of the recipe, of an earlier installation "
                    "perhaps: remove that folder, or give a new one to the study"
                )


def _take_over(training: Training, others: Sequence[Training], registry: Registry, say: Say) -> None:
    """`take_over`, told; the most memory that the sources' trainings took becomes the run's."""
    memory = []
    for stage, source in take_over(training, others, registry).items():
        say(f"{training.name.partition('/')[2].replace('/seed-', ', seed ')}: {stage} as in {source.name}")
        facts = source.run / ARM
        memory.append(int(read_json(facts).get("memory", 0)) if facts.is_file() else 0)
    path = training.run / MEMORY
    if memory:
        before = int(read_json(path)["memory"]) if path.is_file() else 0
        write_json(path, {"memory": max(before, *memory)})


def trainings(
    study: Study, folder: Path, registry: Registry, find: Find, start: str | None
) -> dict[tuple[str, int], Training]:
    """The trainings of a study by arm and seed, the shared ones as SHARED, whether they are there yet or not.

    Args:
        start: what the first stages start from, as `study.json` has it.
    """
    found = {}
    for seed in study.seeds:
        first: Any = [start, list(study.reinitialize), *([study.teacher] if study.teacher else [])]
        shared = None
        arms = {arm: _own_stages(study, _base(study, arm, find), arm) for arm in study.arms}
        if study.shared:
            recipe = _recipe(study, SHARED, seed, registry, find)
            run = folder / SHARED / f"seed-{seed}"
            shared = Training(f"{study.name}/{SHARED}/seed-{seed}", run, study.shared, first, recipe)
            found[SHARED, seed] = shared
            first = list(training_keys(recipe, study.shared, first).values())
        for arm, stages in arms.items():
            recipe, run = _recipe(study, arm, seed, registry, find), folder / arm / f"seed-{seed}"
            found[arm, seed] = Training(f"{study.name}/{arm}/seed-{seed}", run, stages, first, recipe, shared)
    return found


def _of_another_study(
    folder: Path, registry: Registry, find: Find, init_from: Path | None
) -> Iterator[Training]:
    """The trainings in another study's folder that started from this very model, which its manifest tells, or from
    random weights as this study does; InputError where there is no study.
    """
    path = folder / "study.json"
    values = read_json(path)
    order, start = values.pop("order", None), values.pop("start", None)
    if isinstance(order, list) and isinstance(values.get("variants"), dict):
        values["variants"] = {name: values["variants"].get(name) for name in order}
    study = from_dict(Study, values, str(path))
    manifest = None if init_from is None else init_from / "manifest.json"
    if manifest is not None and not manifest.is_file():
        return  # the end of a stage: what is at its path may have been trained anew since
    expected = None if manifest is None else read_json(manifest)
    for training in trainings(study, folder, registry, find, start).values():
        home = folder / SHARED / training.run.name if study.shared else training.run
        origin = read_json(home / ORIGIN) if (home / ORIGIN).is_file() else None
        if origin is not None:
            origin.pop("reinitialized", None)
        if origin == expected:
            yield training


def collect(study: Study, folder: Path) -> StudyResult:
    """The result of a study whose runs and measurements are all there."""
    runs = {arm: [folder / arm / f"seed-{seed}" for seed in study.seeds] for arm in study.arms}
    results = {
        arm: {name: [read_result(_result_path(run, name)) for run in places] for name in study.endpoints}
        for arm, places in runs.items()
    }
    places = {**runs, SHARED: [folder / SHARED / f"seed-{seed}" for seed in study.seeds]} if study.shared else runs
    stages = [(arm, meta) for arm, own in places.items() for run in own for meta in run.glob("*/done/meta.json")]
    seconds = dict.fromkeys(places, 0.0)
    for arm, meta in stages:
        seconds[arm] += float(read_json(meta).get("seconds", 0.0)) / len(study.seeds)
    facts = {arm: [read_json(place / ARM) for place in places] for arm, places in runs.items()}
    parameters = {arm: int(one[0]["parameters"]) for arm, one in facts.items()}
    memory = {arm: max(int(each.get("memory", 0)) for each in one) for arm, one in facts.items()}
    differences = study_differences(study.reference, results)
    curves = {arm: _mean_curve(places) for arm, places in runs.items()}
    first = curves[study.reference]
    reached = {
        arm: share_until(np.array([*first.values()]), np.array([*curve.values()]))
        for arm, curve in curves.items() if arm != study.reference and curve and [*curve] == [*first]
    }  # fmt: skip
    taken = {
        f"{arm}/{place.name}": read_json(place / TAKEN)
        for arm, own in places.items() for place in own if (place / TAKEN).is_file()
    }  # fmt: skip
    return StudyResult(study, results, tuple(differences), seconds, parameters, memory, reached, taken)


def _mean_curve(runs: Sequence[Path]) -> dict[int, float]:
    """The mean flow loss of an arm's runs by the logged steps of their last stage; empty where these differ, or where
    the stage has none.
    """
    curves: list[dict[int, float]] = []
    for run in runs:
        last = finished_stages(run)[-1]
        rows = [row for row in metric_rows(run / METRICS) if row.get("stage") == last]
        curves.append({row["step"]: row["flow"] for row in rows if "flow" in row})
    if any([*curve] != [*curves[0]] for curve in curves):
        return {}
    return {step: float(np.mean([curve[step] for curve in curves])) for step in curves[0]}


def share_until(reference: np.ndarray, other: np.ndarray) -> float | None:
    """The share of its steps after which a curve stays at most at another's end, both as means over a fifth of them;
    None if it never does. Both have the same steps.
    """
    width = max(1, len(other) // 5)
    own = np.convolve(reference, np.ones(width) / width, "valid")
    above = np.flatnonzero(own > other[-width:].mean())
    first = 0 if not len(above) else int(above[-1]) + 1
    return None if first == len(own) else (first + width) / len(other)


def _difference_shown(one: StudyDifference) -> dict[str, Any]:
    """JSON has no infinity: what one seed can detect is null."""
    detectable = one.detectable if np.isfinite(one.detectable) else None
    return {**to_dict(one), "detectable": detectable, "verdict": one.verdict}


def _shown(found: StudyResult) -> dict[str, Any]:
    scores = {
        arm: {name: [[*map(to_dict, one.scores)] for one in results] for name, results in endpoints.items()}
        for arm, endpoints in found.results.items()
    }
    first = next(iter(next(iter(found.results.values())).values()))[0]
    return {
        "study": to_dict(found.study), "seconds": found.seconds, "parameters": found.parameters,
        "memory": found.memory, "reached": found.reached, "taken": found.taken,
        "differences": [_difference_shown(one) for one in found.differences], "scores": scores,
        "machine": first.settings.get("machine"), "versions": first.settings.get("versions"),
    }  # fmt: skip


def _recipe(study: Study, arm: str, seed: int, registry: Registry, find: Find) -> Recipe:
    from spar.training.changes import changed_recipe

    changes, where = study.changes(arm), f"study {study.name}, {arm}"
    changes.pop("recipe", None)
    base = changed_recipe(_base(study, arm, find), study.settings, f"study {study.name}, settings", registry)
    return replace(changed_recipe(base, changes, where, registry), seed=seed + AGAIN_SEED * (arm == AGAIN))


def _base(study: Study, arm: str, find: Find) -> Recipe:
    """The recipe that an arm begins with, unchanged."""
    return find(str(study.changes(arm).get("recipe", study.recipe)))


def _own_stages(study: Study, base: Recipe, arm: str) -> tuple[str, ...]:
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


def _check_endpoints(study: Study, base: Recipe) -> None:
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


def _open_folder(study: Study, folder: Path, init_from: Path | None) -> None:
    """Write `study.json`, or find the same study there: a changed one would compare unlike runs.

    The order of the variants counts: the first is the reference.
    """
    start = _start_name(study, init_from)
    values = read_back({**to_dict(study), "order": list(study.variants), "start": start})
    path = folder / "study.json"
    if path.is_file():
        if (kept := read_json(path)) != values:
            fields = sorted(key for key in kept.keys() | values.keys() if kept.get(key) != values.get(key))
            raise InputError(f"{folder} holds another study: {', '.join(fields)} differ; give another folder")
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} has other contents; expected a new folder, or one of this study")
    write_json(path, values)


def _start_name(study: Study, init_from: Path | None) -> str | None:
    """What a study starts from, as `study.json` has it; a bundled model by its name, as an installation may move."""
    if study.init_from and init_from == bundled_folder(study.init_from):
        return study.init_from
    return None if init_from is None else str(init_from.absolute())


def read_back(values: Any) -> Any:
    """Values as JSON gives them back: lists for tuples."""
    if isinstance(values, Mapping):
        return {key: read_back(value) for key, value in values.items()}
    return [read_back(value) for value in values] if isinstance(values, list | tuple) else values


def _train(
    recipe: Recipe, run: Path, stages: tuple[str, ...], device: str | None, init_from: Path | None,
    reinitialize: tuple[str, ...], teacher: Path | None,
) -> bool:  # fmt: skip
    """Train a run to the end of its stages; False when a signal stopped it."""
    import torch

    from spar.common.device import choose_device
    from spar.training.trainer import train

    where = choose_device(device)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    model = train(
        recipe, run, stages=stages, resume=True, device=device, init_from=init_from, reinitialize=reinitialize,
        teacher=teacher,
    )  # fmt: skip
    if model is None:
        return False
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memory = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else 0
    if (run / MEMORY).is_file():
        memory = max(memory, int(read_json(run / MEMORY)["memory"]))
    write_json(run / ARM, {"parameters": parameters, "memory": memory})
    return True


def _share_cache(folder: Path, run: Path) -> None:
    """Let a run use what the first one has prepared of the data: it is the same for all."""
    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "cache").exists():
        (run / "cache").symlink_to(Path("..") / ".." / "cache", target_is_directory=True)


def _measure(
    study: Study, run: Path, stage: str, endpoints: Sequence[str], registry: Registry, device: str | None
) -> None:
    pipe = arm_pipeline(run, stage, registry, device)
    for name in endpoints:
        write_result(_result_path(run, name), ENDPOINTS[name](pipe, study.options(), None))


def arm_pipeline(run: Path, stage: str, registry: Registry, device: str | None) -> Pipeline:
    """The model of a run: its finished one, or as it is at the end of a stage."""
    from spar.inference.loading import load_pipeline, open_bundle
    from spar.training.run_folder import read_recipe
    from spar.training.stage_model import load_stage_model

    if (run / "model" / "config.json").is_file():
        return load_pipeline(run / "model", device=device, progress=False)
    system = read_recipe(run / "recipe.json", registry).kind
    return open_bundle(system, load_stage_model(run, registry, stage), device)


def _result_path(run: Path, name: str) -> Path:
    return run / "results" / f"{name}.json"


def sample_grids(
    found: StudyResult, folder: Path, prompts: Sequence[str], registry: Registry, device: str | None = None
) -> Iterator[tuple[str, Sequence[Any]]]:
    """By arm the images of some prompts, at equal seeds, of the first seed's model."""
    for arm in found.study.arms:
        run = folder / arm / f"seed-{found.study.seeds[0]}"
        pipe = arm_pipeline(run, finished_stages(run)[-1], registry, device)
        yield arm, pipe.generate(list(prompts), seed=0).images


def finished_stages(run: Path) -> list[str]:
    """The stages that a run has finished, in order."""
    done = {path.parent.name for path in run.glob("*/done") if path.is_dir()}
    return [stage["name"] for stage in read_json(run / "recipe.json")["stages"] if stage["name"] in done]
