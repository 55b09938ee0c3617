"""A run: the stages of a recipe one behind the other, in one folder, resumable at any step."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from spar.checkpoints.lora import merge_lora, save_adapter
from spar.checkpoints.safetensors_io import load_weights
from spar.checkpoints.spar_format import (
    load_teacher,
    save_model,
)
from spar.common.errors import InputError
from spar.losses.perceptual import PerceptualLoss
from spar.models.spar import SparModel
from spar.processing.prompts import PromptEncoder
from spar.training.bundle import build_bundle
from spar.training.checkpoint import load_group
from spar.training.config import Recipe, StageConfig, freeze, freezing_table
from spar.training.data import FilesTrainingData
from spar.training.distributed import DistributedContext, ParallelismConfig
from spar.training.initial_weights import load_initial_weights, load_previous_weights
from spar.training.loop import Report, measure_teacher_mean, run_stage, tune_allocator
from spar.training.modules import TrainingModules, build_modules
from spar.training.plan import PlannedStage, RunPlan, read_run, resolve
from spar.training.run_folder import (
    find_text_tokenizer,
    invalidate_later_stages,
    note_origin,
    open_run,
    prompt_encoder,
    remove_folders,
)
from spar.training.shapes_data import ShapesTrainingData, TrainingData
from spar.training.steps import StepContext
from spar.training.teacher import ExternalTeacher, build_perceptual_losses, build_teacher
from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES
from spar.worlds.shapes.tokenizer import PLURALS

log = logging.getLogger("spar.training")


TAG_NAMES = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
}

Announce = Callable[[StageConfig, list[tuple[str, int, int]]], None]


def train(
    recipe: Recipe,
    run: Path,
    *,
    stages: tuple[str, ...] = (),
    resume: bool = False,
    init_from: Path | None = None,
    teacher: Path | None = None,
    device: str = "cpu",
    parallelism: ParallelismConfig = ParallelismConfig(),  # noqa: B008 (frozen)
    from_scratch: bool = False,
    report: Report | None = None,
    announce: Announce | None = None,
) -> SparModel | None:
    """Plan a run and execute it; under a launcher every process calls this alike.

    Args:
        run: the folder of the run.
        stages: names of the stages to run, each but the first from the end of the one named before it; all when empty.
            A stage that trains anew makes its own end, all later ones and the run's model void: they are removed.
        resume: skip stages that are done and continue the one that is not.
        init_from: a stage's folder (`RUN/STAGE/done`) or a SPAR folder whose weights the first stage starts from; a
            run that has begun and is resumed ignores it.
        teacher: a SPAR folder whose encoder is the semantic teacher, where the starting weights keep none.
        device, parallelism: where, and how several processes share the work; a run may be resumed with others.
        from_scratch: start from random weights what the recipe expects from published checkpoints.
        report, announce: as in `execute`.

    Returns:
        As `execute`.

    Raises:
        InputError: as `resolve` and `execute`.
    """
    plan = resolve(
        recipe, read_run(recipe, run, init_from), stages=stages, resume=resume, from_scratch=from_scratch,
        teacher=teacher,
    )  # fmt: skip
    return execute(plan, device=device, parallelism=parallelism, report=report, announce=announce)


def execute(
    plan: RunPlan,
    *,
    device: str = "cpu",
    parallelism: ParallelismConfig = ParallelismConfig(),  # noqa: B008 (frozen)
    report: Report | None = None,
    announce: Announce | None = None,
) -> SparModel | None:
    """Train the stages of a plan, in order, and decide nothing.

    Args:
        report: called at every logged step.
        announce: called before each stage with its freezing table; both by the main process alone.

    Returns:
        The trained model, or None when a signal stopped the run (its state is saved). After the recipe's last stage
        the model is written to `RUN/model`; with LoRA its additions alone to `RUN/adapter`, and merged to `RUN/model`.
    """
    recipe, run, chosen = plan.recipe, plan.run, tuple(stage.config for stage in plan.stages)
    parallel = DistributedContext.initialize(parallelism, device)
    check_parallelism(chosen, parallel)
    networks = load_networks(recipe, chosen, parallel.device)
    with parallel.main_first():
        open_run(run, recipe, fresh=plan.fresh and parallel.main, main=parallel.main)
    tune_allocator()
    prompts = prompt_encoder(find_text_tokenizer(recipe, run, plan.init_from, parallel), recipe.model)
    build = partial(build_modules, recipe, prompts=prompts, teacher_width=networks.teacher_width)
    modules = build(parallel.device)
    with parallel.main_first():
        training_data = build_training_data(recipe, prompts, run, parallel)
    for planned in plan.stages:
        if parallel.micro_batches > 1 and planned != plan.stages[0]:  # the stage before may have wrapped these
            modules = build(parallel.device)
        load_start(modules, plan, planned)
        if planned.skipped:
            log.info("stage %s is done", planned.config.name)
            continue
        parallel.barrier()
        if parallel.main:
            note_origin(plan, planned)
            invalidate_later_stages(run, recipe, planned.config, resume=planned.start.source == "state")
        parallel.barrier()
        ctx = StepContext(
            modules, training_data, recipe, planned.config, parallel.device, external_teacher=networks.teacher,
            perceptual=networks.perceptual, parallel=parallel,
        )  # fmt: skip
        if not run_planned(ctx, planned, run, report, announce):
            return None
    if parallel.sharded:
        modules = build(torch.device("cpu"))
        load_weights(modules, load_group(run / chosen[-1].name / "done", "modules"), chosen[-1].name)
    if chosen[-1] == recipe.stages[-1] and parallel.main:
        save_run_model(modules, recipe, run, prompts)
    parallel.barrier()
    return modules.model


@dataclass(frozen=True)
class FrozenNetworks:
    """What a run reads that is no part of its modules: the external teacher, and the networks of L_perc."""

    teacher: ExternalTeacher | None
    perceptual: tuple[tuple[float, PerceptualLoss], ...]

    @property
    def teacher_width(self) -> int | None:
        return self.teacher.width() if self.teacher else None


def load_networks(recipe: Recipe, stages: tuple[StageConfig, ...], device: torch.device) -> FrozenNetworks:
    """Load what the stages read, before anything is written."""
    teacher = build_teacher(recipe.alignment)
    asked = any(stage.losses.perceptual for stage in stages)
    perceptual = build_perceptual_losses(recipe.perceptual) if asked else ()
    return FrozenNetworks(
        teacher.to(device) if teacher else None, tuple((weight, loss.to(device)) for weight, loss in perceptual)
    )


def run_planned(
    ctx: StepContext, planned: PlannedStage, run: Path, report: Report | None, announce: Announce | None
) -> bool:
    """Prepare one stage, announce it and train it; False where a signal stopped it."""
    if ctx.recipe.data.cache is not None and ctx.stage.step == "unified":
        ctx.data.open_cache(ctx.modules.model.tokenizer)
    prepare(ctx, planned)
    freeze(ctx.modules, ctx.stage)
    main = ctx.parallel.main
    if announce and main:
        announce(ctx.stage, freezing_table(ctx.modules))
    if not run_stage(ctx, run, resume=planned.start.source == "state", report=report if main else None):
        return False
    if main:
        remove_folders(run / ctx.stage.name, "state", "state.old")
    return True


def load_start(modules: TrainingModules, plan: RunPlan, planned: PlannedStage) -> None:
    """Load the weights that a stage starts from; random ones are there already."""
    start = planned.start
    if start.source == "folder":
        load_initial_weights(modules, start.path, planned.config, plan.recipe.stages, plan.recipe.published)
    elif start.source in ("state", "done"):
        load_weights(modules, load_group(start.path, "modules"), planned.config.name)
    elif start.source == "stage":
        load_previous_weights(modules, start.path)


def save_run_model(modules: TrainingModules, recipe: Recipe, run: Path, prompts: PromptEncoder) -> None:
    """Write the model of a run that has ended; with LoRA the adapter too, then merged."""
    bundle = build_bundle(modules, recipe, run, prompts, recipe.stages[-1].name)
    if recipe.lora.rank:
        save_adapter(bundle.model, recipe.lora, run / "adapter", bundle.manifest)
        merge_lora(bundle.model)
    save_model(bundle, run / "model")


def check_parallelism(stages: tuple[StageConfig, ...], parallel: DistributedContext) -> None:
    """Refuse stages that cannot be shared as asked, before anything is written.

    Raises:
        InputError: a batch that does not divide, a step whose loss is a mean over its own batch's tokens, or Muon on
            sharded matrices.
    """
    for stage in stages:
        try:
            parallel.rows(stage.batch, 0)
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from None
        if parallel.micro_batches > 1 and stage.step in ("encoder", "mllm"):
            raise InputError(
                f"stage {stage.name}: a step of kind {stage.step} weighs its whole batch's tokens against each other; "
                f"expected one process and parallelism.grad_accum_steps 1, got {parallel.world} and "
                f"{parallel.config.grad_accum_steps}"
            )
        if parallel.sharded and stage.optimizer == "muon":
            raise InputError(
                f"stage {stage.name}: Muon wants whole matrices, which parallelism.strategy fsdp shards; expected "
                f"--stages.{stage.name}.optimizer adamw, or ddp"
            )


def build_training_data(
    recipe: Recipe, prompts: PromptEncoder, run: Path, parallel: DistributedContext
) -> TrainingData:
    """The images and words that a recipe names."""
    if recipe.data.source == "shapes":
        return ShapesTrainingData(recipe.data, prompts, recipe.seed, run / "cache")
    model = recipe.model
    return FilesTrainingData(
        recipe.data, prompts, recipe.seed, side=model.image_size, stride=model.token_stride,
        max_prompt_tokens=recipe.max_prompt_tokens, run=run, parallel=parallel,
    )


def prepare(ctx: StepContext, planned: PlannedStage) -> None:
    """What a stage takes over before its first step, as its plan says."""
    modules = ctx.modules
    if "teacher from encoder" in planned.prepares:
        modules.teacher.load_state_dict(modules.model.tokenizer.encoder.state_dict())
    if "teacher from folder" in planned.prepares:
        weights = load_teacher(planned.teacher_folder).state_dict()
        load_weights(modules.teacher, weights, f"the teacher of {planned.teacher_folder}")
    if "tag embeddings" in planned.prepares:
        init_tag_embeddings(modules, ctx.data.prompts)
    if "connector from LLM" in planned.prepares:
        modules.model.connector.initialize_from(modules.model.language)
    if "teacher mean" in planned.prepares:
        measure_teacher_mean(ctx)


@torch.no_grad()
def init_tag_embeddings(modules: TrainingModules, prompts: PromptEncoder) -> None:
    """Start each tag's word (and a shape's plural) at the tag's read-out vector, at the usual size of a word."""
    table = modules.model.language.network.embed_tokens.weight
    size = table.norm(dim=-1).mean()
    for tag, names in TAG_NAMES.items():
        rows = modules.dense_head.tags[tag].weight[-len(names) :]  # the first row of most tags is "none"
        for name, row in zip(names, rows - rows.mean(0), strict=True):
            for word in (name, PLURALS.get(name, name)):
                (token,) = prompts.encode(word)
                table[token] = row / row.norm() * size
