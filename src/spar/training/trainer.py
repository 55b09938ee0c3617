"""A run: the stages of a recipe one after the other, in one folder, resumable at any step."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spar.common.device import choose_device
from spar.common.errors import InputError
from spar.training.checkpoint import find_state, remove_states
from spar.training.config import Recipe, StageConfig, freeze, freezing_table, matches
from spar.training.data import TrainingData
from spar.training.distributed import DistributedContext, ParallelismConfig, shard_modules
from spar.training.initial_weights import (
    load_initial_weights,
    load_previous_weights,
    random_modules,
    random_rows,
    stored_modules,
)
from spar.training.interruption import Interruption, listening
from spar.training.loop import Report, run_stage, tune_allocator
from spar.training.objectives.base import StepContext
from spar.training.plan import PlannedStage, RunPlan, check_current, read_run, resolve
from spar.training.run_folder import check_run, find_text_tokenizer, invalidate_later_stages, note_origin, open_run
from spar.training.run_lock import run_lock
from spar.training.teacher import FrozenNetworks

log = logging.getLogger("spar.training")

Announce = Callable[[StageConfig, list[tuple[str, int, int]]], None]


def train(
    recipe: Recipe,
    run: Path,
    *,
    stages: tuple[str, ...] = (),
    resume: bool = False,
    init_from: Path | None = None,
    teacher: Path | None = None,
    reinitialize: tuple[str, ...] = (),
    device: str | torch.device | None = None,
    parallelism: ParallelismConfig = ParallelismConfig(),  # noqa: B008 (frozen)
    from_scratch: bool = False,
    report: Report | None = None,
    announce: Announce | None = None,
) -> nn.Module | None:
    """Plan a run and execute it; under a launcher every process calls this alike.

    Args:
        run: the folder of the run.
        stages: names of the stages to run, each but the first from the end of the one named before it; all when empty.
            A stage that trains anew makes its own end, all later ones and the run's model void: they are removed.
        resume: skip stages that are done and continue the one that is not.
        init_from: a stage's folder (`RUN/STAGE/done`) or a SPAR folder whose weights the first stage starts from; a
            run that has begun and is resumed does not need it: it may have been removed since.
        teacher: a SPAR folder whose encoder is the semantic teacher, where the starting weights keep none.
        reinitialize: patterns of parameters that start from random weights though `init_from` has them.
        device: where to train, by default CUDA if available; a run may be resumed on another.
        parallelism: how several processes share the work; a run may be resumed with another.
        from_scratch: start from random weights what the recipe expects from published checkpoints.
        report: as in `execute`.
        announce: as in `execute`.

    Returns:
        As `execute`.

    Raises:
        InputError: as `resolve` and `execute`.
    """
    plan = resolve(
        recipe, read_run(recipe, run, init_from), stages=stages, resume=resume, from_scratch=from_scratch,
        teacher=teacher, reinitialize=reinitialize,
    )  # fmt: skip
    return execute(plan, device=device, parallelism=parallelism, report=report, announce=announce)


def execute(
    plan: RunPlan,
    *,
    device: str | torch.device | None = None,
    parallelism: ParallelismConfig = ParallelismConfig(),  # noqa: B008 (frozen)
    report: Report | None = None,
    announce: Announce | None = None,
) -> nn.Module | None:
    """Train the stages of a plan, in order, and decide nothing.

    Args:
        report: called at every logged step.
        announce: called before each stage with its freezing table; both by the main process alone.

    Returns:
        The trained model, or None when a signal stopped the run: what it has trained is saved, and a stage that has not
        begun has removed nothing. After the recipe's last stage its system writes the model to `RUN/model`. Of a
        sharded run each process gets its own rows.

    Raises:
        InputError: what the machine, the recipe or the run's folder does not allow, such as a folder that another
            process writes, or has written since the plan was made.
    """
    with listening() as interruption, ExitStack() as held:
        return _execute(plan, interruption, held, device, parallelism, report, announce)


def _execute(
    plan: RunPlan, interruption: Interruption, held: ExitStack, device: str | torch.device | None,
    parallelism: ParallelismConfig, report: Report | None, announce: Announce | None,
) -> nn.Module | None:  # fmt: skip
    recipe, run, chosen = plan.recipe, plan.run, tuple(stage.config for stage in plan.stages)
    parallel = DistributedContext.initialize(parallelism, choose_device(device))
    check_parallelism(chosen, parallel)
    if plan.status.init_fault and parallel.main:
        log.warning("the run has begun and goes on without what it started from: %s", plan.status.init_fault)
    networks = FrozenNetworks(recipe, parallel)
    networks.load(chosen)
    modules, rows = starting_modules(recipe, parallel, networks)
    check_patterns(modules, plan)
    if stopped_before(plan.stages[0], interruption, parallel):  # nothing is written yet
        return None
    with parallel.main_first():
        check_run(run, recipe, fresh=plan.fresh and parallel.main)
        if parallel.main:
            held.enter_context(run_lock(run))
        check_current(plan)
        open_run(run, recipe, fresh=plan.fresh and parallel.main, main=parallel.main)
    prompts = recipe.prompts(find_text_tokenizer(recipe, run, plan.init_from, parallel))
    with parallel.main_first():
        data = recipe.data.open(recipe, prompts, run, parallel)
        data.check_captions([planned.config for planned in plan.stages if not planned.skipped])
    for planned in plan.stages:
        if stopped_before(planned, interruption, parallel):  # in the set-up, or as the last stage's end was written
            return None
        if parallel.micro_batches > 1 and planned != plan.stages[0]:  # the stage before may have wrapped these
            del modules, rows
            modules, rows = starting_modules(recipe, parallel, networks)
        ctx = StepContext(modules, prompts, recipe, planned.config, parallel.device, networks, parallel=parallel)
        if not execute_stage(ctx, rows, data, plan, planned, interruption, report, announce):
            return None
        del ctx
    if chosen[-1] == recipe.stages[-1] and parallel.main:
        if parallel.sharded:
            recipe.save_stored(*stored_modules(recipe, run / chosen[-1].name / "done", networks), run, prompts)
        else:
            recipe.save(modules, run, prompts)
    parallel.barrier()
    return modules.get_submodule("model")


def stopped_before(planned: PlannedStage, interruption: Interruption, parallel: DistributedContext) -> bool:
    """Whether a signal came to some process before a stage has begun; what that would remove is still there then."""
    (stopped,) = parallel.any_process(interruption.stopped)
    if stopped:
        log.info("stopped before stage %s, of which nothing was removed", planned.config.name)
    return stopped


def execute_stage(
    ctx: StepContext, rows: dict[str, Tensor] | None, data: TrainingData, plan: RunPlan, planned: PlannedStage,
    interruption: Interruption, report: Report | None, announce: Announce | None,
) -> bool:  # fmt: skip
    """Put one stage's start in place, prepare and train it; False where a signal stopped it.

    Of one that is done the end is put in place. `rows` are those of `random_rows`, where the run is sharded.
    """
    ctx, run = placed(ctx, planned, rows), plan.run
    tune_allocator()
    if planned.skipped:
        log.info("stage %s is done", ctx.stage.name)
        return True
    ctx.stage.objective.prepare(ctx, data, planned)  # what it refuses leaves the run's folder as it was
    if stopped_before(planned, interruption, ctx.parallel):
        return False
    if ctx.parallel.main:
        note_origin(plan, planned)
        invalidate_later_stages(run, plan.recipe, planned)
    ctx.parallel.barrier()
    return run_planned(ctx, data, planned, run, interruption, report, announce)


def run_planned(
    ctx: StepContext, data: TrainingData, planned: PlannedStage, run: Path, interruption: Interruption,
    report: Report | None, announce: Announce | None,
) -> bool:  # fmt: skip
    """Announce one stage and train it; False where a signal stopped it."""
    freeze(ctx.modules, ctx.stage)
    main = ctx.parallel.main
    if announce and main:
        announce(ctx.stage, freezing_table(ctx.modules))
    resume = planned.start.source == "state"
    if not run_stage(
        ctx, data, run, resume=resume, report=report if main else None, interruption=interruption
    ):  # fmt: skip
        return False
    if main:
        remove_states(run / ctx.stage.name / "state")
    return True


def starting_modules(
    recipe: Recipe, parallel: DistributedContext, networks: FrozenNetworks
) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """The modules of a recipe with random weights on the device; of a sharded run as `random_rows` gives them."""
    if parallel.sharded:
        tune_allocator(keep=False)
        return random_rows(recipe, parallel, networks)
    return random_modules(recipe, parallel.device, networks), None


def placed(ctx: StepContext, planned: PlannedStage, rows: dict[str, Tensor] | None) -> StepContext:
    """The context of a stage whose start is in place: frozen, sharded where there are `rows` to do it with, loaded."""
    freeze(ctx.modules, ctx.stage)
    if rows is not None:
        ctx = replace(ctx, sharded=shard_modules(ctx.modules, ctx.parallel, rows))
    load_start(ctx.modules, ctx.recipe, planned, ctx.parallel)
    return ctx


def load_start(modules: nn.Module, recipe: Recipe, planned: PlannedStage, parallel: DistributedContext) -> None:
    """Load the weights that a stage starts from; random ones are there already."""
    start = planned.start
    folder = start.path
    if start.source == "state" and (found := parallel.main_only(lambda: find_state(start.folder))):
        folder = found.path
    with parallel.fail_together():
        if start.source == "folder":
            load_initial_weights(modules, start.folder, planned.config, recipe, planned.reinitialize)
        elif folder is not None:
            load_previous_weights(modules, folder)


def check_patterns(modules: nn.Module, plan: RunPlan) -> None:
    """Refuse patterns of what trains, or of what is to start from random weights, that mean nothing here.

    Raises:
        InputError: such a pattern, or any of random weights with LoRA, whose additions alone train.
    """
    for planned in plan.stages:
        freeze(modules, planned.config)
    trainable = [pattern for planned in plan.stages for pattern in planned.config.trainable]
    trained = [name for name, _ in modules.named_parameters() if matches(name, trainable)]
    for pattern in (pattern for planned in plan.stages for pattern in planned.reinitialize):
        if getattr(getattr(plan.recipe, "lora", None), "rank", 0):
            raise InputError(f"--reinitialize: expected no LoRA, whose additions alone train, beside {pattern!r}")
        if not any(matches(name, (pattern,)) for name in trained):
            raise InputError(
                f"--reinitialize: expected patterns of parameters that these stages train, such as model.denoiser.*, "
                f"got {pattern!r}"
            )


def check_parallelism(stages: tuple[StageConfig, ...], parallel: DistributedContext) -> None:
    """Refuse stages that cannot be shared as asked, before anything is written.

    Raises:
        InputError: a batch that does not divide, an objective whose loss is a mean over its own batch's tokens, or
            Muon on sharded matrices.
    """
    for stage in stages:
        try:
            parallel.rows(stage.batch, 0)
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from None
        if parallel.micro_batches > 1 and not stage.objective.may_split(stage):
            raise InputError(
                f"stage {stage.name}: the objective {stage.objective.kind} weighs its whole batch's tokens against "
                f"each other; expected one process and parallelism.grad_accum_steps 1, got {parallel.world} and "
                f"{parallel.config.grad_accum_steps}"
            )
        if parallel.sharded and stage.optimizer == "muon":
            raise InputError(
                f"stage {stage.name}: Muon wants whole matrices, which parallelism.strategy fsdp shards; expected "
                f"--stages.{stage.name}.optimizer adamw, or ddp"
            )
