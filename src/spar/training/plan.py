"""What a run will do, stage by stage: `read_run` looks, `resolve` decides, the trainer executes.

`read_run` is the only reader of files here. `resolve` is pure: from a recipe and what was read it says where each
stage's weights come from, what is prepared before its first step and what its training makes void, or refuses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spar.checkpoints.spar_format import has_pixel_encoder, has_teacher
from spar.common.config import read_json
from spar.common.errors import InputError
from spar.training.checkpoint import existing_checkpoint, group_keys, read_train_state
from spar.training.config import Recipe, StageConfig

RANDOM = "random weights"  # how a manifest's parts begin that no published checkpoint brought
MODEL_PARTS = ("model", "adapter")  # what a run's last stage leaves beside the stages

Source = Literal["random", "folder", "stage", "state", "done"]
Preparation = Literal[
    "teacher from encoder", "teacher from folder", "tag embeddings", "connector from LLM", "teacher mean"
]


@dataclass(frozen=True)
class StageStart:
    """Where a stage's weights come from: `random`, a `folder` that the caller named, the end of a `stage` of this run,
    its own saved `state` (after `step` steps), or its own end, `done`."""

    source: Source
    path: Path | None = None
    step: int = 0

    def __str__(self) -> str:
        words: dict[Source, str] = {
            "random": "random weights",
            "folder": str(self.path),
            "stage": f"the end of {self.path.parent.name}" if self.path else "",
            "state": f"its state after {self.step} steps",
            "done": "done already",
        }
        return words[self.source]


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run. `teacher_folder` is the SPAR folder whose teacher is taken, where one is."""

    config: StageConfig
    start: StageStart
    prepares: tuple[Preparation, ...] = ()
    invalidates: tuple[str, ...] = ()
    teacher_folder: Path | None = None

    @property
    def skipped(self) -> bool:
        return self.start.source == "done"


@dataclass(frozen=True)
class RunPlan:
    """The stages that are trained or skipped, in order; `fresh`: the run's folder must not hold a run yet."""

    recipe: Recipe
    run: Path
    stages: tuple[PlannedStage, ...]
    fresh: bool
    init_from: Path | None


@dataclass(frozen=True)
class InitFolder:
    """What a folder of weights holds that a stage may start from.

    Attributes:
        is_model: a SPAR folder, as against the end of a stage.
        step: the kind of step of that stage; None for a SPAR folder.
        parts: where each part of a model that `spar build` or `spar convert` made comes from, by its place in it;
            empty for a model that training made.
        pixel_encoder: whether a SPAR folder holds it.
        teacher: whether the folder holds a semantic teacher.
    """

    path: Path
    is_model: bool
    step: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    pixel_encoder: bool = False
    teacher: bool = False

    @property
    def random_streams(self) -> tuple[str, ...]:
        """The tokenizer's parts with random weights that its latent depends on. A random pixel stream alone is none: a
        converted tokenizer's fusion passes the semantic stream on."""
        decisive = ("tokenizer.semantic_stream", "tokenizer.fusion")
        return tuple(part for part in decisive if self.parts.get(part, "").startswith(RANDOM))


@dataclass(frozen=True)
class RunStatus:
    """The stages of a run that have ended, its saved states by their steps, and the folder to start from."""

    run: Path
    done: Mapping[str, int] = field(default_factory=dict)
    states: Mapping[str, int] = field(default_factory=dict)
    init: InitFolder | None = None


def read_run(recipe: Recipe, run: Path, init_from: Path | None = None) -> RunStatus:
    """Look at a run's folder, and at the folder that its first stage is to start from."""
    found: dict[str, dict[str, int]] = {"done": {}, "state": {}}
    for stage in recipe.stages:
        for kind, steps in found.items():
            state = read_train_state(run / stage.name / kind)
            if state:
                steps[stage.name] = state.step
    return RunStatus(run, found["done"], found["state"], None if init_from is None else read_init_folder(init_from))


def read_init_folder(folder: Path) -> InitFolder:
    """What a SPAR folder, or the end of a stage, holds.

    Raises:
        InputError: a folder that is neither.
    """
    if is_spar_folder(folder):
        manifest = folder / "manifest.json"
        parts: Any = read_json(manifest).get("parts", {}) if manifest.is_file() else {}
        parts = {str(part): str(origin) for part, origin in parts.items()} if isinstance(parts, dict) else {}
        return InitFolder(folder, True, None, parts, has_pixel_encoder(folder), has_teacher(folder))
    if not (existing_checkpoint(folder) / "meta.json").is_file():
        raise InputError(
            f"--init-from: expected a finished stage such as RUN/dit/done or a SPAR folder, got {str(folder)!r}"
        )
    config = read_json(existing_checkpoint(folder) / "meta.json").get("config", {})
    step = config.get("step") if isinstance(config, dict) else None
    return InitFolder(
        folder, False, step, teacher=any(key.startswith("teacher.") for key in group_keys(folder, "modules"))
    )


def is_spar_folder(folder: Path) -> bool:
    """Whether a folder is a SPAR folder, as against the end of a stage."""
    return (folder / "config.json").is_file()


def resolve(
    recipe: Recipe,
    status: RunStatus,
    *,
    stages: tuple[str, ...] = (),
    resume: bool = False,
    from_scratch: bool = False,
    teacher: Path | None = None,
) -> RunPlan:
    """The plan of a run.

    Args:
        stages: names of the stages to run, each but the first from the end of the one named before it; all when empty.
        resume: skip stages that are done and continue the one that is not.
        from_scratch: start from random weights what the recipe expects from published checkpoints.
        teacher: a SPAR folder whose encoder is the semantic teacher, in place of the one that the weights bring.

    Raises:
        InputError: stages that the recipe's data has nothing for, or whose weights are missing or do not suit them.
    """
    chosen = tuple(recipe.stage(name) for name in stages) or recipe.stages
    check_data(recipe, chosen)
    check_lora(recipe, chosen)
    begun = resume and (chosen[0].name in status.done or chosen[0].name in status.states)
    init = None if begun else status.init  # a run that has begun goes on from its own weights
    if not (init or from_scratch or begun):
        check_start(recipe, chosen)
    planned: list[PlannedStage] = []
    voided: set[str] = set()
    done, states = (set(status.done), set(status.states)) if resume else (set[str](), set[str]())
    for index, stage in enumerate(chosen):
        folder = status.run / stage.name
        if stage.name in done:
            planned.append(PlannedStage(stage, StageStart("done", folder / "done", stage.steps)))
            continue
        if stage.name in states:
            start = StageStart("state", folder / "state", status.states[stage.name])
        else:
            start = _start(recipe, status, init, chosen, index)
        own = init if start.source == "folder" else None
        if own:
            check_folder(own, stage)
        named = teacher if index == 0 else None
        prepares = preparations(recipe, stage, start, own, before=_before(recipe, chosen, index), teacher=named)
        taught = (named or start.path) if "teacher from folder" in prepares else None
        later = {one.name for one in recipe.stages[recipe.stages.index(stage) :]}
        void = tuple(name for name in status.done if name in later and name not in voided)
        voided |= later
        done, states = done - later, states - later
        planned.append(PlannedStage(stage, start, prepares, void, taught))
    return RunPlan(recipe, status.run, tuple(planned), not (resume or stages), init.path if init else None)


def _before(recipe: Recipe, chosen: tuple[StageConfig, ...], index: int) -> StageConfig | None:
    """The stage whose end a stage starts from, unless a folder is named: of those chosen the one before, for the first
    one the recipe's."""
    if index:
        return chosen[index - 1]
    position = recipe.stages.index(chosen[0])
    return recipe.stages[position - 1] if position else None


def _start(
    recipe: Recipe, status: RunStatus, init: InitFolder | None, chosen: tuple[StageConfig, ...], index: int
) -> StageStart:
    """Where a stage that is trained from its first step on starts from."""
    stage = chosen[index]
    if index == 0 and init:
        return StageStart("folder", init.path)
    before = _before(recipe, chosen, index)
    if before is None:
        return StageStart("random")
    if index == 0 and before.name not in status.done:
        raise InputError(f"stage {stage.name} starts from the end of {before.name}, which is not in {status.run}")
    return StageStart("stage", status.run / before.name / "done")


def preparations(
    recipe: Recipe,
    stage: StageConfig,
    start: StageStart,
    init: InitFolder | None = None,
    *,
    before: StageConfig | None = None,
    teacher: Path | None = None,
) -> tuple[Preparation, ...]:
    """What a stage takes over from other weights before its first step. A saved state holds all of it already.

    Args:
        init: what `start` names, where that is a folder.
        before: the stage of this run whose end it starts from.
        teacher: a SPAR folder that the caller names as the semantic teacher's.

    Raises:
        InputError: a folder without a semantic teacher where the encoder in it has already been trained.
    """
    if start.source in ("state", "done"):
        return ()
    found: list[Preparation] = []
    came_from = init.step if init else before.step if before else None
    model = init is not None and init.is_model
    if stage.step == "tokenizer" and any(one.losses.semantic for one in recipe.stages):
        found += _teacher(stage, init, came_from, teacher)
    first = next(one for one in recipe.stages if one.step == stage.step)
    if stage.step == "mllm" and stage.name == first.name and recipe.word_embeddings == "tags" and not model:
        found.append("tag embeddings")
    if stage.step == "unified" and came_from != "unified" and not model:  # a SPAR folder's connector is no blank one
        found.append("connector from LLM")
    if stage.step == "unified" and recipe.alignment_weight(stage) and recipe.alignment.center:
        found.append("teacher mean")
    return tuple(found)


def _teacher(
    stage: StageConfig, init: InitFolder | None, came_from: str | None, teacher: Path | None
) -> list[Preparation]:
    """The semantic teacher is the encoder as it was before the first tokenizer stage; later stages find it with the
    weights that they start from."""
    if teacher is not None or (init is not None and init.is_model and init.teacher):
        return ["teacher from folder"]
    model = init is not None and init.is_model
    # What spar build or spar convert made has parts: no tokenizer stage has trained its encoder yet.
    if (model and init.parts) or (not model and came_from not in ("tokenizer", "unified")):
        return ["teacher from encoder"]
    if init is None or (not model and init.teacher):
        return []
    raise InputError(
        f"stage {stage.name}: {init.path} keeps no semantic teacher (no teacher.*), and its encoder may have "
        "been trained since; name the SPAR folder that the tokenizer's training began with: --teacher FOLDER"
    )


def check_folder(init: InitFolder, stage: StageConfig) -> None:
    """Refuse a stage whose step reads what a folder does not hold, or holds as random weights alone."""
    if stage.step == "unified" and init.random_streams:
        raise InputError(
            f"stage {stage.name}: the tokenizer of {init.path} is not trained yet: {', '.join(init.random_streams)} "
            "have random weights, as its manifest says; train the tokenizer stages first"
        )
    reads = stage.step in ("autoencoder", "dit") or (stage.step == "tokenizer" and not init.pixel_encoder)
    if init.is_model and reads:
        raise InputError(
            f"stage {stage.name} needs the autoencoder's encoder, which {init.path} does not hold: give a stage's "
            "folder (RUN/STAGE/done), or for a tokenizer stage a folder that spar build made"
        )


def check_start(recipe: Recipe, stages: tuple[StageConfig, ...]) -> None:
    """Refuse to start from random weights, unasked, what the recipe has from published checkpoints."""
    if recipe.published and stages[0] == recipe.stages[0]:
        raise InputError(
            f"recipe {recipe.name}: {', '.join(recipe.published)} would start from random weights; expected "
            "--init-from a folder that holds the published ones (spar build makes it), or --from-scratch"
        )


def check_data(recipe: Recipe, stages: tuple[StageConfig, ...]) -> None:
    """Refuse stages that the recipe's source has nothing for."""
    if recipe.data.source == "none":
        raise InputError(f"recipe {recipe.name}: no data source given (data.source); it can be planned with --dry-run")
    strange = [stage.name for stage in stages if stage.step in ("encoder", "mllm", "dit")]
    if recipe.data.source == "files" and strange:
        raise InputError(f"data sets train tokenizer and unified stages, expected no {', '.join(strange)} (--stage)")


def check_lora(recipe: Recipe, stages: tuple[StageConfig, ...]) -> None:
    """Refuse LoRA in stages that have nothing to adapt: it adds to a connector and a DiT that are trained already."""
    first = next((stage for stage in recipe.stages if stage.step == "unified"), None)
    wrong = [stage.name for stage in stages if stage.step != "unified" or stage == first]
    if recipe.lora.rank and wrong:
        raise InputError(
            f"lora: expected unified stages after {first.name if first else 'the first'} alone (as in --stage "
            f"{recipe.stages[-1].name} --init-from MODEL), got {', '.join(wrong)}"
        )
