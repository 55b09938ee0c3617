"""What a run will do, stage by stage: `read_run` looks, `resolve` decides, the trainer executes.

`read_run` is the only reader of files here. `resolve` is pure, but that it follows links: from a recipe and what was
read it says where each stage's weights come from, what is prepared before its first step and what its training makes
void, or refuses.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from spar.common.errors import InputError
from spar.training.checkpoint import existing_checkpoint, find_state, group_keys, read_meta, read_train_state
from spar.training.config import Recipe, StageConfig
from spar.training.data import NoData
from spar.training.objectives.base import Objective

RANDOM = "random weights"  # how a manifest's parts begin that no published checkpoint brought
MODEL_PARTS = ("model", "adapter")  # what a run's last stage leaves beside the stages

Source = Literal["random", "folder", "stage", "state", "done"]


@dataclass(frozen=True)
class StageStart:
    """Where a stage's weights come from: `random`, a `folder` that the caller named, the end of a `stage` of this run,
    its own saved `state` (after `step` steps), or its own end, `done`.
    """

    source: Source
    path: Path | None = None
    step: int = 0

    @property
    def folder(self) -> Path:
        """`path`; ValueError where the weights are random."""
        if self.path is None:
            raise ValueError(f"a start from {self.source} has no folder")
        return self.path

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
    """One stage of a run.

    Attributes:
        prepares: what changes in its weights before its first step, in the objective's own words.
        invalidates: stages whose ends its training makes void.
        teacher_folder: the SPAR folder whose teacher is taken, where one is.
        reinitialize: patterns of parameters that keep random weights though the folder that it starts from has them.
    """

    config: StageConfig
    start: StageStart
    prepares: tuple[str, ...] = ()
    invalidates: tuple[str, ...] = ()
    teacher_folder: Path | None = None
    reinitialize: tuple[str, ...] = ()

    def require_teacher(self) -> Path:
        """`teacher_folder`; ValueError where there is none."""
        if self.teacher_folder is None:
            raise ValueError(f"stage {self.config.name} takes no teacher from a folder")
        return self.teacher_folder

    @property
    def skipped(self) -> bool:
        return self.start.source == "done"


@dataclass(frozen=True)
class RunPlan:
    """The stages that are trained or skipped, in order, and the `status` of the run for which that was decided;
    `fresh`: the run's folder must not hold a run yet.
    """

    recipe: Recipe
    status: "RunStatus"
    stages: tuple[PlannedStage, ...]
    fresh: bool
    init_from: Path | None

    @property
    def run(self) -> Path:
        return self.status.run


@dataclass(frozen=True)
class InitFolder:
    """What a folder of weights holds that a stage may start from.

    Attributes:
        is_model: a finished model's folder, as against the end of a stage.
        kind: of that stage's objective; None for a model's folder.
        parts: where each part of a model that `spar build` or `spar convert` made comes from, by its place in it;
            empty for a model that training made.
        holds: the modules in it beside the model, by their names among the training modules.
    """

    path: Path
    is_model: bool
    kind: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    holds: frozenset[str] = frozenset()

    @property
    def random_streams(self) -> tuple[str, ...]:
        """The tokenizer's parts with random weights that its latent depends on.

        A random pixel stream alone does not count: a converted tokenizer's fusion passes the semantic stream on.
        """
        decisive = ("tokenizer.semantic_stream", "tokenizer.fusion")
        return tuple(part for part in decisive if self.parts.get(part, "").startswith(RANDOM))

    def made_by(self, *objectives: type[Objective]) -> bool:
        """Whether it is the end of a stage with one of these objectives, or with one that extends it."""
        return self.kind in {kind for one in objectives for kind in _kinds(one)}


@dataclass(frozen=True)
class Origin:
    """Where a stage's weights come from, as its objective may ask.

    Attributes:
        init: the folder that the caller named, where it starts from that.
        before: the stage of this run whose end it starts from.
        teacher: a SPAR folder that the caller names as the semantic teacher's.
        reinitialize: patterns of parameters that keep random weights all the same.
    """

    init: InitFolder | None = None
    before: StageConfig | None = None
    teacher: Path | None = None
    reinitialize: tuple[str, ...] = ()

    @property
    def is_model(self) -> bool:
        return self.init is not None and self.init.is_model

    @property
    def kind(self) -> str | None:
        """Of the objective that trained the weights last, where it is known."""
        return self.init.kind if self.init else self.before.objective.kind if self.before else None

    def restarts(self, part: str) -> bool:
        """Whether some of a part's weights start anew though the folder has them."""
        return any(one.startswith(f"{part}.") or fnmatchcase(f"{part}.weight", one) for one in self.reinitialize)

    def made_by(self, *objectives: type[Objective]) -> bool:
        """Whether the weights were trained last with one of these objectives, or with one that extends it."""
        if self.init is not None:
            return self.init.made_by(*objectives)
        return self.before is not None and isinstance(self.before.objective, objectives)


def _kinds(objective: type[Objective]) -> set[str]:
    """The kinds of an objective and of those that extend it."""
    return {objective.kind}.union(*map(_kinds, objective.__subclasses__()))


@dataclass(frozen=True)
class RunStatus:
    """The stages of a run that have ended, its saved states by their steps, what its last stage left beside them, the
    folder to start from, and the stages whose end, or whose saved states all, are damaged, with the reason.

    `init_fault` says why a run cannot start from the folder that the caller named; one that has begun does not need it.
    """

    run: Path
    done: Mapping[str, int] = field(default_factory=dict)
    states: Mapping[str, int] = field(default_factory=dict)
    init: InitFolder | None = None
    model_parts: tuple[str, ...] = ()
    damaged: Mapping[str, str] = field(default_factory=dict)
    init_fault: str = ""

    def traces(self, stages: Iterable[StageConfig]) -> list[str]:
        """The names of those stages that have left an end or a saved state, whole or damaged."""
        return [one.name for one in stages if one.name in {*self.done, *self.states, *self.damaged}]


def read_run(recipe: Recipe, run: Path, init_from: Path | None = None) -> RunStatus:
    """Look at a run's folder, and at the folder that its first stage is to start from."""
    done, states, damaged = dict[str, int](), dict[str, int](), dict[str, str]()
    for stage in recipe.stages:
        try:
            ended = read_train_state(run / stage.name / "done")
        except InputError as error:
            ended = None
            damaged[stage.name] = (
                f"the end of stage {stage.name} is damaged ({error}): train the stage anew (--stage {stage.name}), or "
                "bring back a copy"
            )
        if ended:
            done[stage.name] = ended.step
            continue
        try:
            whole = find_state(run / stage.name / "state")
        except InputError as error:
            damaged.setdefault(stage.name, str(error))
            continue
        if whole:
            states[stage.name] = whole.state.step
    init, fault = None, ""
    try:
        init = None if init_from is None else read_init_folder(recipe, init_from)
    except InputError as error:
        fault = str(error)
    parts = tuple(part for part in MODEL_PARTS if (run / part).is_dir())
    return RunStatus(run, done, states, init, parts, damaged, fault)


def check_current(plan: RunPlan) -> None:
    """Refuse a run that another process has written since the plan was made; the caller holds the run's lock."""
    seen = plan.status
    if replace(read_run(plan.recipe, plan.run), init=seen.init, init_fault=seen.init_fault) != seen:
        raise InputError(
            f"{plan.run} was written by another process after this one had looked at it: give the same command again"
        )


def read_init_folder(recipe: Recipe, folder: Path) -> InitFolder:
    """What a finished model's folder, or the end of a stage, holds.

    Raises:
        InputError: a folder that is neither.
    """
    if is_model_folder(folder):
        return recipe.read_model(folder)
    if not (existing_checkpoint(folder) / "meta.json").is_file():
        raise InputError(
            f"--init-from: expected a finished stage such as RUN/dit/done or a SPAR folder, got {str(folder)!r}"
        )
    config = read_meta(existing_checkpoint(folder)).get("config", {})
    objective = config.get("objective") if isinstance(config, dict) else None
    kind = objective.get("kind") if isinstance(objective, dict) else None
    if not isinstance(kind, str):
        raise InputError(
            f"--init-from: {folder} was made by an earlier version of spar, and does not say by which objective; start "
            "from that run's finished model, or finish it with that version"
        )
    holds = frozenset(key.partition(".")[0] for key in group_keys(folder, "modules"))
    return InitFolder(folder, False, kind, holds=holds)


def is_model_folder(folder: Path) -> bool:
    """Whether a folder is a finished model's, as against the end of a stage."""
    return (folder / "config.json").is_file()


def resolve(
    recipe: Recipe,
    status: RunStatus,
    *,
    stages: tuple[str, ...] = (),
    resume: bool = False,
    from_scratch: bool = False,
    teacher: Path | None = None,
    reinitialize: tuple[str, ...] = (),
    only_shown: bool = False,
) -> RunPlan:
    """The plan of a run.

    Args:
        stages: names of the stages to run, each but the first from the end of the one named before it; all when empty.
        resume: skip stages that are done and continue the one that is not.
        from_scratch: start from random weights what the recipe expects from published checkpoints.
        teacher: a SPAR folder whose encoder is the semantic teacher, in place of the one that the weights bring.
        reinitialize: patterns of parameters that start from random weights though the folder to start from has them.
        only_shown: the plan is looked at, not executed: it may lack data and published weights.

    Raises:
        InputError: stages that the recipe's data has nothing for, whose weights are missing, damaged or do not suit
            them, or whose training would remove the folder that they start from; with `resume`, stages that would
            begin before what the run has trained.
    """
    chosen = tuple(recipe.stage(name) for name in stages) or recipe.stages
    check_chosen(recipe, chosen, teacher, only_shown=only_shown)
    if reinitialize and not (status.init or status.init_fault):
        raise InputError(f"--reinitialize: expected --init-from beside it, got {', '.join(reinitialize)} alone")
    if resume:
        check_resumed(recipe, status, chosen)
    begun = resume and chosen[0].name in {*status.done, *status.states}
    if not begun:
        check_start(recipe, status, chosen, resume=resume, from_scratch=from_scratch, only_shown=only_shown)
    init = None if begun else status.init  # a run that has begun goes on from its own weights
    planned = _plan_stages(recipe, status, chosen, Origin(init, None, teacher, reinitialize), resume=resume)
    check_kept(recipe, status.run, planned, {"--init-from": init.path if init else None, "--teacher": teacher})
    return RunPlan(recipe, status, planned, not (resume or stages), init.path if init else None)


def _plan_stages(
    recipe: Recipe, status: RunStatus, chosen: tuple[StageConfig, ...], given: Origin, *, resume: bool
) -> tuple[PlannedStage, ...]:
    """Each stage by what the run has of it and what the stages before it make void; `given` is for the first one."""
    planned: list[PlannedStage] = []
    voided: set[str] = set()
    done, states = (set(status.done), set(status.states)) if resume else (set[str](), set[str]())
    for index, stage in enumerate(chosen):
        folder = status.run / stage.name
        if stage.name in done:
            planned.append(PlannedStage(stage, StageStart("done", folder / "done", stage.steps)))
            continue
        resumed = stage.name in states
        if resumed:
            start = StageStart("state", folder / "state", status.states[stage.name])
        else:
            start = _start(recipe, status, given.init, chosen, index)
        own = given if start.source == "folder" else Origin(teacher=given.teacher if index == 0 else None)
        void = _void(recipe, status, stage, voided, resumed=resumed)
        planned.append(_plan_stage(recipe, stage, start, replace(own, before=_before(recipe, chosen, index)), void))
        later = {one.name for one in recipe.stages[recipe.stages.index(stage) :]}
        voided |= {*later, *status.model_parts}
        done, states = done - later, states - later
    return tuple(planned)


def _plan_stage(
    recipe: Recipe, stage: StageConfig, start: StageStart, origin: Origin, void: tuple[str, ...]
) -> PlannedStage:
    """A stage that is trained: what is prepared before its first step, of which a saved state needs nothing more."""
    if origin.init:
        stage.objective.check_folder(stage, origin.init)
    prepares = () if start.source == "state" else stage.objective.preparations(recipe, stage, origin)
    if origin.reinitialize:
        prepares = (f"random weights for {', '.join(origin.reinitialize)}", *prepares)
    taught = origin.teacher or (start.path if origin.is_model else None)
    return PlannedStage(stage, start, prepares, void, taught, origin.reinitialize)


def _void(recipe: Recipe, status: RunStatus, stage: StageConfig, voided: set[str], *, resumed: bool) -> tuple[str, ...]:
    """What the training of a stage makes void in a run's folder: ends and saved states from it on, and the model."""
    found = []
    for later in recipe.stages[recipe.stages.index(stage) :]:
        saved = later.name in status.states and not (resumed and later == stage)
        if later.name not in voided and (later.name in status.done or later.name in status.damaged or saved):
            kind = "" if later.name in status.done else " (state)" if saved else " (damaged)"
            found.append(f"{later.name}{kind}")
    return (*found, *(part for part in status.model_parts if part not in voided))


def _before(recipe: Recipe, chosen: tuple[StageConfig, ...], index: int) -> StageConfig | None:
    """The stage whose end a stage starts from, unless a folder is named: of those chosen the one before, for the first
    one the recipe's.
    """
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
        if before.name in status.damaged:
            raise InputError(status.damaged[before.name])
        raise InputError(f"stage {stage.name} starts from the end of {before.name}, which is not in {status.run}")
    return StageStart("stage", status.run / before.name / "done")


def check_chosen(recipe: Recipe, stages: tuple[StageConfig, ...], teacher: Path | None, *, only_shown: bool) -> None:
    """Refuse stages that cannot be trained in one run, on this data or with this teacher, whatever the run has."""
    check_order(recipe, stages)
    if teacher is not None and not stages[0].objective.takes_teacher:
        raise InputError(f"--teacher is for a run that begins with a tokenizer stage, not with {stages[0].name}")
    if not (only_shown and isinstance(recipe.data, NoData)):
        recipe.data.check(stages)
    recipe.check_stages(stages)


def check_order(recipe: Recipe, stages: tuple[StageConfig, ...]) -> None:
    """Refuse stages out of the recipe's order or named twice: the later one would remove the earlier one's end."""
    order = [recipe.stages.index(stage) for stage in stages]
    if order != sorted(set(order)):
        raise InputError(
            f"expected stages in the recipe's order, each once, got {', '.join(stage.name for stage in stages)}"
        )


def check_resumed(recipe: Recipe, status: RunStatus, stages: tuple[StageConfig, ...]) -> None:
    """Refuse to resume where the first stage to train has damaged files alone to go on from, or none while later stages
    have some: its training would remove them.
    """
    first = next((stage for stage in stages if stage.name not in status.done), None)
    if first is None or first.name in status.states:
        return
    if first.name in status.damaged:
        raise InputError(status.damaged[first.name])
    if begun := status.traces(recipe.stages[recipe.stages.index(first) + 1 :]):
        ahead = recipe.stages[recipe.stages.index(recipe.stage(begun[-1])) + 1 :]
        flags = [f"--stage {name}" for name in (*status.traces(recipe.stages), *(one.name for one in ahead))]
        raise InputError(
            f"{status.run} has an end or a state of {', '.join(begun)} but none of {first.name}, whose training would "
            f"remove them: to resume, name the stages that the run began with, such as {' '.join(flags)}; to train "
            f"{first.name} all the same, name it without --resume (--stage {first.name})"
        )


def check_kept(recipe: Recipe, run: Path, planned: Sequence[PlannedStage], given: Mapping[str, Path | None]) -> None:
    """Refuse to start from what the training removes before anything is in its place.

    Args:
        given: folders by the flags that name them.
    """
    first = next((one.config for one in planned if not one.skipped), None)
    if first is None:
        return
    void = [*(stage.name for stage in recipe.stages[recipe.stages.index(first) :]), *MODEL_PARTS]
    for flag, path in given.items():
        if path is not None and any(path.resolve().is_relative_to((run / name).resolve()) for name in void):
            raise InputError(
                f"{flag}: expected a folder that the training of {first.name} in {run} does not remove, got {path}; "
                "give the run another folder (--run)"
            )


def check_start(
    recipe: Recipe, status: RunStatus, stages: tuple[StageConfig, ...], *, resume: bool, from_scratch: bool,
    only_shown: bool,
) -> None:  # fmt: skip
    """Refuse to begin a run without the weights that its first stage needs: those of a folder that cannot be read; and
    random ones, unasked, in place of what the recipe has from published checkpoints.
    """
    first = stages[0]
    if status.init_fault:
        still = f"; {status.run} has no state of {first.name} yet, which still starts from it" if resume else ""
        raise InputError(f"{status.init_fault}{still}")
    if status.init or only_shown or first != recipe.stages[0]:
        return
    if first.objective.continues:
        raise InputError(f"stage {first.name} goes on from a trained model: expected --init-from, got none")
    if recipe.published and not from_scratch:
        raise InputError(
            f"recipe {recipe.name}: {', '.join(recipe.published)} would start from random weights; expected "
            "--init-from a folder that holds the published ones (spar build makes it), or --from-scratch"
        )
