"""The one training loop. It reads top to bottom; what differs between stages is their objective."""

import ctypes
import fnmatch
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from spar.common.config import to_dict
from spar.common.device import dtype_name
from spar.common.errors import InputError
from spar.common.process_group import wrap_distributed_errors
from spar.data.batches import Images
from spar.training.checkpoint import (
    TrainState,
    discard,
    find_state,
    load_into,
    optimizer_tensors,
    read_meta,
    save_folder,
)
from spar.training.config import StageConfig, freeze
from spar.training.data import TrainingData
from spar.training.distributed import all_reduce_replicated_grads, no_sync, wrap_modules
from spar.training.interruption import Interruption, listening
from spar.training.metrics import MetricsLogger
from spar.training.objectives.base import StepContext, Terms
from spar.training.optimizer import build_optimizers

log = logging.getLogger("spar.training")

Report = Callable[[str, int, int, dict[str, float]], None]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
MMAP_THRESHOLDS = (2**30, 2**25)  # bytes; glibc before 2.35 takes none above the second one


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is not finite; nothing was written over, and the last saved state is intact."""


def learning_rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up, then a cosine from `lr` to `lr_end`."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    share = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.lr_end + (stage.lr - stage.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class EMA:
    """Exponential moving average of the trainable parameters, with a short memory at the start."""

    def __init__(self, modules: nn.Module, decay: float) -> None:
        self.decay = decay
        self.params = {name: p for name, p in modules.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.params.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), [p.detach() for p in self.params.values()], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """The averaged weights become the weights."""
        for name, parameter in self.params.items():
            parameter.copy_(self.averages[name])


def tune_allocator(*, keep: bool = True) -> None:
    """glibc: keep freed memory instead of returning it to the kernel; steps on a CPU gain a fifth or more.

    Without `keep`, tensors of a MiB and more are returned at once: while weights come and go whose rows alone stay.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        log.debug("no glibc: allocator left as it is")
        return
    if not keep:
        mallopt(M_MMAP_THRESHOLD, 2**20)
    elif any(mallopt(M_MMAP_THRESHOLD, size) for size in MMAP_THRESHOLDS):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # alone it would do harm: it fixes the other threshold where it is


def clip_grad_norm(modules: nn.Module, limit: float, *, apart: str | None = None) -> Tensor:
    """Clip the gradient of the parameters whose names begin with `apart`, and everything else's; return the latter's
    norm.

    One norm over both sides of an adversarial game would let the discriminator's gradient, tens of times larger, set
    the size of the tokenizer's step. A norm of either side that is not finite is what is returned.
    """
    sides: dict[bool, list[Tensor]] = {}
    for name, parameter in modules.named_parameters():
        if parameter.requires_grad:
            sides.setdefault(apart is not None and name.startswith(apart), []).append(parameter)
    norms = {side: torch.nn.utils.clip_grad_norm_(parameters, limit) for side, parameters in sides.items()}
    norms = {side: norm.full_tensor() if isinstance(norm, DTensor) else norm for side, norm in norms.items()}
    broken = [norm for norm in norms.values() if not bool(torch.isfinite(norm))]
    return broken[0] if broken else norms[min(norms)]


def check_unused_parameters(ctx: StepContext) -> None:
    """Refuse trainable parts that the loss has not reached at all: they would stay as they are, unsaid."""
    reached = [name for name, parameter in ctx.modules.named_parameters() if parameter.grad is not None]
    resting = ctx.stage.objective.may_rest(ctx.recipe)
    for pattern in ctx.recipe.must_reach(ctx.stage):
        if pattern not in resting and not fnmatch.filter(reached, pattern):
            raise InputError(f"stage {ctx.stage.name}: {pattern!r} is trainable, but its loss does not reach it")


@dataclass
class StageRun:
    """One stage while it runs: what computes, what is averaged, where its state goes, and how long it has taken."""

    folder: Path
    wrapper: nn.Module
    optimizers: list[torch.optim.Optimizer]
    names: dict[int, str]
    average: EMA | None
    metrics: MetricsLogger | None
    start: int = 0
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.seconds + time.monotonic() - self.began

    def meta(self, ctx: StepContext, step: int) -> dict[str, Any]:
        """What is saved beside the tensors after `step` steps."""
        state = vars(TrainState(ctx.stage.name, step, self.spent))
        return {**state, "dtype": dtype_name(ctx.parallel.dtype), "config": to_dict(ctx.stage)}

    def save_state(self, ctx: StepContext, step: int) -> None:
        """Write what a resumed run goes on from."""
        groups = {
            "modules": ctx.modules.state_dict(), "optimizer": optimizer_tensors(self.optimizers, self.names),
            **({"average": self.average.averages} if self.average else {}),
        }  # fmt: skip
        check_finite_groups(ctx, groups, step)
        save_folder(self.folder, groups, self.meta(ctx, step), ctx.parallel, keep=ctx.recipe.keep_states)
        self.saved_at = time.monotonic()


def begin_stage(ctx: StepContext, run: Path, *, resume: bool) -> StageRun:
    """Freeze, wrap and give optimizers to a stage's modules; with `resume` load its saved state, where there is one."""
    stage, modules = ctx.stage, ctx.modules
    trainable = freeze(modules, stage)
    wrapper = wrap_modules(modules, ctx.parallel, ctx.sharded)
    optimizers = build_optimizers(modules, stage)
    names = {id(parameter): name for name, parameter in modules.named_parameters()}
    average = EMA(modules, stage.ema) if stage.ema else None
    folder = run / stage.name / "state"
    found = ctx.parallel.main_only(lambda: find_state(folder)) if resume else None  # all go on from the same one
    if found:
        if found.passed:
            passed = ", ".join(found.passed)
            log.warning("stage %s: passed over %s; going on from %s", stage.name, passed, found.path.name)
            if ctx.parallel.main:  # else the next save would put one in the whole state's place
                discard(found.damaged)
        warn_of_other_dtype(ctx, found.path)
        load_into(modules.state_dict(), found.path, "modules")
        load_into(optimizer_tensors(optimizers, names), found.path, "optimizer")
        if average:
            load_into(average.averages, found.path, "average")
    start, seconds = (found.state.step, found.state.seconds) if found else (0, 0.0)
    modules.train()
    metrics = MetricsLogger(run, stage.name, start) if ctx.parallel.main else None
    log.info("stage %s: steps %d to %d, %d trainable tensors", stage.name, start, stage.steps, len(trainable))
    return StageRun(folder, wrapper, optimizers, names, average, metrics, start, seconds)


def warn_of_other_dtype(ctx: StepContext, state: Path) -> None:
    """Log that the steps before a saved state had matrix products of another type, where the state says so."""
    before, own = read_meta(state).get("dtype"), dtype_name(ctx.parallel.dtype)
    if before not in (None, own):
        log.warning(
            "stage %s: its steps so far were computed in %s, the others will be in %s: the end is not that of a run in "
            "one piece (--parallelism.precision)", ctx.stage.name, before, own,
        )  # fmt: skip


def run_stage(
    ctx: StepContext, data: TrainingData, run: Path, *, resume: bool, report: Report | None = None,
    interruption: Interruption | None = None,
) -> bool:  # fmt: skip
    """Train one stage of a run to its end.

    Args:
        ctx: modules, recipe, stage and device.
        run: the run's folder.
        resume: continue from `run/STAGE/state` when it is there.
        report: called with (stage, step, steps, values) at every step that is logged.
        interruption: where the caller notes signals; by default the stage listens itself. One that comes after the last
            step does not keep the stage's end from being written.

    Returns:
        True when the stage ended, False when a signal stopped it; its state is saved in both cases.

    Raises:
        NonFiniteLoss: before the optimizer touched any weight.
        InputError: a saved state that does not fit, or a trainable part that the loss does not reach.
    """
    stage, going = ctx.stage, begin_stage(ctx, run, resume=resume)
    batches = data.batches(stage, going.start, ctx.parallel)
    with nullcontext(interruption) if interruption else listening() as signals:
        for step, micro_batches in enumerate(batches, start=going.start):
            ctx = replace(ctx, step=step)
            terms, norm = train_step(ctx, going.wrapper, micro_batches, going.optimizers, first=step == going.start)
            if going.average:
                going.average.update(step)
            if step % ctx.recipe.log_every == 0 or step == stage.steps - 1:
                log_step(ctx, going, step, terms, norm, report)
            late = time.monotonic() - going.saved_at > 60 * ctx.recipe.save_minutes
            asked = signals.take_save()
            stopped, due = ctx.parallel.any_process(signals.stopped, late or asked)
            if stopped or due:
                going.save_state(ctx, step + 1)
            if stopped:
                break
        else:
            stopped = False
        if going.metrics:
            going.metrics.close()
        if not stopped:
            end_stage(ctx, data, going, run)
    return not stopped


def log_step(ctx: StepContext, going: StageRun, step: int, terms: Terms, norm: Tensor, report: Report | None) -> None:
    """Write one step's terms, averaged over the processes, and report them."""
    means = ctx.parallel.mean(torch.stack([value.detach().float() for value in terms.values()])).tolist()
    values = dict(zip(terms, means, strict=True))
    values |= {"grad_norm": float(norm), "lr": learning_rate(ctx.stage, step), "seconds": going.spent}
    if going.metrics:
        going.metrics.write(ctx.stage.name, step, values)
    if report:
        report(ctx.stage.name, step, ctx.stage.steps, values)


def end_stage(ctx: StepContext, data: TrainingData, going: StageRun, run: Path) -> None:
    """The averaged weights become the weights; what later stages must know of them is measured, and all is saved."""
    if going.average:
        going.average.apply()
    meta = going.meta(ctx, ctx.stage.steps)
    with torch.no_grad():
        going.wrapper(ctx.stage.objective.finish, ctx, data)
    if isinstance(going.wrapper, FSDPModule):
        going.wrapper.reshard()
    groups = {"modules": ctx.modules.state_dict()}
    check_finite_groups(ctx, groups, ctx.stage.steps)
    save_folder(run / ctx.stage.name / "done", groups, meta, ctx.parallel)


def check_finite_groups(ctx: StepContext, groups: dict[str, dict[str, Tensor]], step: int) -> None:
    """Refuse to write numbers that are not finite over ones that are: an update may overflow though its loss did not.

    Raises:
        NonFiniteLoss: on all processes; it names the first tensors.
    """
    wrong = [
        f"{name} of {group}" for group, tensors in groups.items() for name, value in tensors.items()
        if value.is_floating_point() and not bool(torch.isfinite(local_rows(value)).all())
    ]
    (broken,) = ctx.parallel.any_process(bool(wrong))
    if broken:
        shown = ", ".join(wrong[:3]) or "those of another process"
        raise NonFiniteLoss(
            f"stage {ctx.stage.name}: after step {step} weights are not finite ({shown}); nothing was written, and "
            "what was saved before is intact"
        )


def local_rows(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def sample_names(batches: Sequence[Images], most: int = 8) -> str:
    """The first samples of a step, for a message: their names, or their numbers among the data's."""
    names = [name for batch in batches for name in batch.names or [str(key) for key in batch.keys.tolist() if key >= 0]]
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"; this process's samples: {', '.join(names[:most])}{more}"


def train_step(
    ctx: StepContext, wrapper: nn.Module, micro_batches: Sequence[Images], optimizers: list[torch.optim.Optimizer], *,
    first: bool,
) -> tuple[Terms, Tensor]:  # fmt: skip
    """One step of the stage: its loss terms and the gradient's norm; the `first` one checks what the loss reaches.

    Raises:
        NonFiniteLoss: on all processes, before the optimizer touched any weight.
    """
    stage, modules, micro_steps = ctx.stage, ctx.modules, len(micro_batches)
    modules.zero_grad(set_to_none=True)
    total: Terms = {}
    for micro_step, batch in enumerate(micro_batches):
        own = replace(ctx, micro_step=micro_step)
        with no_sync(wrapper, micro_step == micro_steps - 1), wrap_distributed_errors():
            with ctx.autocast():
                terms = wrapper(stage.objective, own, batch.to(ctx.device))
            (terms["loss"] / micro_steps).backward()
        total = {name: total.get(name, 0) + value.detach() / micro_steps for name, value in terms.items()}
    all_reduce_replicated_grads(modules, ctx.parallel)
    if first:
        check_unused_parameters(ctx)
    norm = clip_grad_norm(modules, stage.max_grad_norm, apart=stage.objective.clipped_apart)
    bad_loss, bad_norm = ctx.parallel.any_process(*(not torch.isfinite(value) for value in (total["loss"], norm)))
    if bad_loss or bad_norm:
        what = f"loss is {float(total['loss'])}" if bad_loss else "the gradient is not finite"
        named = ", ".join(f"{name} {float(value):.4g}" for name, value in total.items())
        samples = sample_names(micro_batches)
        raise NonFiniteLoss(f"stage {stage.name}, step {ctx.step}: {what}; {named}{samples}")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, ctx.step) * group["factor"]
        optimizer.step()
    with torch.no_grad(), wrap_distributed_errors():
        stage.objective.after_step(ctx)
    return total, norm
