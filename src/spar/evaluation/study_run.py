"""A study's run: it trains what is missing, measures what is missing, and compares.

Its folder has `study.json`, `shared/seed-S` with the stages that all variants share, `VARIANT/seed-S` with a run each
and its `results/`, and at the end `results.json`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar.checkpoints.bundled import bundled_folder
from spar.common.config import Registry, from_dict, read_json, to_dict, write_json
from spar.common.errors import InputError
from spar.evaluation.results import write_result
from spar.evaluation.study import ENDPOINTS, SHARED, Find, Study, Trainings, check_endpoints, own_stages, trainings
from spar.evaluation.study_results import ARM, StudyResult, collect, finished_stages, result_path, results_file
from spar.evaluation.study_sharing import ORIGIN, Training, alike_stages, take_over

if TYPE_CHECKING:
    from spar.inference.base import Pipeline

MEMORY = "memory.json"  # in a run that took stages over: the most that training them took of a GPU
Say = Callable[[str], None]


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
    own = trainings(study, folder, registry, find, start_name(study, init_from))
    _check(study, own, registry, init_from)
    others = [training for other in reuse for training in _of_another_study(other, registry, find, init_from)]
    _open_folder(study, folder, init_from)
    chosen = replace(study, seeds=study.seeds[:first])
    if reuse:
        alike = sum(alike_stages(training, others) for (_, seed), training in own.items() if seed in chosen.seeds)
        say(f"{alike} stages are trained alike in {', '.join(map(str, reuse))}")
    runner = StudyRun(chosen, folder, own, others, registry, device, init_from, say)
    if not all(runner.run_seed(seed) for seed in chosen.seeds):
        return None
    found = collect(chosen, folder)
    write_json(folder / "results.json", {**results_file(found), "holds": found.holds})
    return found


def _check(study: Study, own: Trainings, registry: Registry, init_from: Path | None) -> None:
    """Refuse before the first training what could not be trained, measured or compared."""
    for (arm, _), training in own.items():
        if arm != SHARED:
            own_stages(study, training.recipe, arm)
            check_endpoints(study, training.recipe)
        _check_trained(training, registry)
    arms = [training for (arm, _), training in own.items() if arm != SHARED]
    skips = any(one.stages[0] != one.recipe.stages[0].name for one in arms)
    if init_from is None and not study.shared and skips and len({one.stages[0] for one in arms}) > 1:
        raise InputError(f"study {study.name}: an arm that skips the first stage needs what it starts from: init_from")


@dataclass(frozen=True)
class StudyRun:
    """A study while it runs: `own` are its trainings, `others` those that stages may be taken from."""

    study: Study
    folder: Path
    own: Trainings
    others: Sequence[Training]
    registry: Registry
    device: str | None
    init_from: Path | None
    say: Say

    def run_seed(self, seed: int) -> bool:
        """Train and measure what a seed lacks; False when a signal stopped a training."""
        if self.study.shared and not self._train(SHARED, seed):
            return False
        for arm in self.study.arms:
            if not self._train(arm, seed):
                return False
            self._measure(arm, seed)
        return True

    def _train(self, arm: str, seed: int) -> bool:
        """Train an arm, or the shared stages, where that is not done; False when a signal stopped it."""
        study, training = self.study, self.own[arm, seed]
        run, begins = training.run, arm == SHARED or not study.shared
        if (run / ARM).is_file() and (run / training.stages[-1] / "done").is_dir():
            return True
        shutil.rmtree(run / "results", ignore_errors=True)  # of weights that are gone
        _share_cache(self.folder, run)
        sources = self.others if arm == SHARED else [*self.own.values(), *self.others]
        _take_over(training, sources, self.registry, self.say)
        self.say(f"{arm}, seed {seed}: training")
        if not begins:
            start = self.own[SHARED, seed].run / study.shared[-1] / "done"
            return train_run(training, self.device, start)
        teacher = bundled_folder(study.teacher) if study.teacher else None
        return train_run(training, self.device, self.init_from, study.reinitialize, teacher)

    def _measure(self, arm: str, seed: int) -> None:
        """Measure the endpoints that an arm lacks."""
        training = self.own[arm, seed]
        missing = [name for name in self.study.endpoints if not result_path(training.run, name).is_file()]
        if not missing:
            return
        self.say(f"{arm}, seed {seed}: {', '.join(missing)}")
        pipe = arm_pipeline(training.run, training.stages[-1], self.registry, self.device)
        for name in missing:
            write_result(result_path(training.run, name), ENDPOINTS[name](pipe, self.study.options(), None))


def _check_trained(training: Training, registry: Registry) -> None:
    """Refuse ends of stages that another form of the recipe has trained: arms would differ in more than they say."""
    keys = training.keys()
    done = [name for name in keys if (training.run / name / "done").is_dir()]
    found = training.trained_keys(registry) if done else {}
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


def _open_folder(study: Study, folder: Path, init_from: Path | None) -> None:
    """Write `study.json`, or find the same study there: a changed one would compare unlike runs.

    The order of the variants counts: the first is the reference.
    """
    start = start_name(study, init_from)
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


def start_name(study: Study, init_from: Path | None) -> str | None:
    """What a study starts from, as `study.json` has it; a bundled model by its name, as an installation may move."""
    if study.init_from and init_from == bundled_folder(study.init_from):
        return study.init_from
    return None if init_from is None else str(init_from.absolute())


def train_run(
    training: Training, device: str | None, init_from: Path | None, reinitialize: tuple[str, ...] = (),
    teacher: Path | None = None,
) -> bool:  # fmt: skip
    """Train a run to the end of its stages; False when a signal stopped it."""
    import torch

    from spar.common.device import choose_device
    from spar.training.trainer import train

    where, run = choose_device(device), training.run
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    model = train(
        training.recipe, run, stages=training.stages, resume=True, device=device, init_from=init_from,
        reinitialize=reinitialize, teacher=teacher,
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


def arm_pipeline(run: Path, stage: str, registry: Registry, device: str | None) -> Pipeline:
    """The model of a run: its finished one, or as it is at the end of a stage."""
    from spar.inference.loading import load_pipeline, open_bundle
    from spar.training.run_folder import read_recipe
    from spar.training.stage_model import load_stage_model

    if (run / "model" / "config.json").is_file():
        return load_pipeline(run / "model", device=device, progress=False)
    system = read_recipe(run / "recipe.json", registry).kind
    return open_bundle(system, load_stage_model(run, registry, stage), device)


def sample_grids(
    found: StudyResult, folder: Path, prompts: Sequence[str], registry: Registry, device: str | None = None
) -> Iterator[tuple[str, Sequence[Any]]]:
    """By arm the images of some prompts, at equal seeds, of the first seed's model."""
    for arm in found.study.arms:
        run = folder / arm / f"seed-{found.study.seeds[0]}"
        pipe = arm_pipeline(run, finished_stages(run)[-1], registry, device)
        yield arm, pipe.generate(list(prompts), seed=0).images


def read_back(values: Any) -> Any:
    """Values as JSON gives them back: lists for tuples."""
    if isinstance(values, Mapping):
        return {key: read_back(value) for key, value in values.items()}
    return [read_back(value) for value in values] if isinstance(values, list | tuple) else values
