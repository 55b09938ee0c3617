"""Several processes, one run: who computes which rows of a batch, and how weights and gradients are shared.

A step is defined on the whole batch. Each process draws the same indices, words and noise for all of it and computes
its own rows; gradients are means over rows, so that the loss and the step are those of one process, up to rounding.
Launch with `torchrun` or `accelerate launch --multi_gpu`; both tell each process its rank through the environment.
"""

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from spar.common.device import native_dtype
from spar.common.errors import InputError
from spar.common.process_group import LAUNCHERS, PATIENCE, ProcessGroup
from spar.models.blocks import compile_blocks, repeated_blocks

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelismConfig:
    """How a run uses its machine; never part of its mathematics, so a run may be resumed at another scale.

    Attributes:
        strategy: ddp holds all weights on every process, fsdp shards them (FSDP2); auto is fsdp under `accelerate
            launch --use_fsdp`, else ddp.
        grad_accum_steps: micro-batches that a process's share of a batch is split into. LeCam's anchors then move with
            each of them.
        activation_checkpointing: the backward pass computes the activations of blocks again instead of keeping them.
        compile: blocks go through torch.compile.
        precision: of matrix products; weights stay float32. auto is bf16 if the device has it in hardware, else fp32.
        shard_frozen: under fsdp, whether frozen weights are sharded too (less memory) or held whole (less traffic).
    """

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    grad_accum_steps: int = 1
    activation_checkpointing: bool = False
    compile: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    shard_frozen: bool = True

    def __post_init__(self) -> None:
        if self.grad_accum_steps < 1:
            raise InputError(f"parallelism.grad_accum_steps: expected at least 1, got {self.grad_accum_steps}")

    def dtype(self, device: torch.device) -> torch.dtype:
        """The type of matrix products on a device."""
        return {"auto": native_dtype(device), "bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]


@dataclass(frozen=True)
class DistributedContext(ProcessGroup):
    """The processes of a run, and how they use the machine."""

    config: ParallelismConfig = ParallelismConfig()
    sharded: bool = False

    @classmethod
    def initialize(cls, config: ParallelismConfig, device: torch.device | str) -> "DistributedContext":
        """Meet the other processes that a launcher has started; without a launcher, be alone.

        Raises:
            InputError: a strategy or a launcher's number of several processes, where there is one.
        """
        asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        sharded = config.strategy == "fsdp" or (config.strategy == "auto" and asked)
        met = cls.meet(device, patience=PATIENCE, config=config)  # the main process works alone at times
        if met.world == 1 and config.strategy != "auto":
            raise InputError(f"parallelism.strategy: {config.strategy} is for several processes, got one: {LAUNCHERS}")
        return replace(met, sharded=sharded and met.world > 1)

    @property
    def dtype(self) -> torch.dtype:
        """The type of matrix products."""
        return self.config.dtype(self.device)

    @property
    def micro_batches(self) -> int:
        """How many parts a batch is computed in."""
        return self.world * self.config.grad_accum_steps

    def rows(self, count: int, micro_step: int) -> slice:
        """Which of `count` rows this process computes in one of its micro-steps: every `micro_batches`-th.

        Raises:
            InputError: a batch that the processes and micro-steps do not divide.
        """
        if count % self.micro_batches:
            raise InputError(
                f"expected a batch that {self.world} processes of {self.config.grad_accum_steps} micro-batches divide, "
                f"got {count}"
            )
        return slice(self.rank + self.world * micro_step, count, self.micro_batches)


SINGLE_PROCESS = DistributedContext()


class ForwardWrapper(nn.Module):
    """Training modules whose every computation passes one `forward`: what DDP and FSDP hang their work on."""

    def __init__(self, modules: nn.Module) -> None:
        super().__init__()
        self.wrapped = modules

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(*arguments)


def wrap_modules(modules: nn.Module, parallel: DistributedContext, sharded: nn.Module | None = None) -> nn.Module:
    """The wrapper to call computations through; the modules' blocks are recomputed, compiled and sharded as asked.

    Call it after `freeze`: what is frozen exchanges no gradients, and may stay whole. `sharded` is what `shard_modules`
    has given already.
    """
    scale = parallel.config
    if scale.compile:  # a run that may differ in its last bits for speed's sake
        torch.backends.cudnn.benchmark = True  # its shapes are few: each is tried out once
        compile_blocks(modules)
    if scale.activation_checkpointing:
        apply_activation_checkpointing(modules)
    if parallel.sharded:
        return sharded or shard_modules(modules, parallel)
    frame = ForwardWrapper(modules)
    if parallel.world > 1:
        # Generation and editing reach different parts, and check_unused_parameters says what none reaches.
        return DistributedDataParallel(frame, find_unused_parameters=True, broadcast_buffers=False)
    return frame


def shard_modules(
    modules: nn.Module, parallel: DistributedContext, rows: dict[str, Tensor] | None = None
) -> ForwardWrapper:
    """The wrapper of modules whose weights FSDP2 shards by rows, block by block; call it after `freeze`.

    Scalars stay whole on every process, and so does what is frozen where `shard_frozen` is off.

    Args:
        rows: where the modules' parameters are on the meta device, this process's rows of each by name
            (`spar.training.sharded_build`); they are taken out of it.
    """
    frame = ForwardWrapper(modules)
    mesh = init_device_mesh(parallel.device.type, (parallel.world,))
    if rows is not None:
        _hold_whole(modules, parallel, mesh, rows)
    held = {p for p in modules.parameters() if _stays_whole(p, parallel)}
    for block in repeated_blocks(modules):
        if any(p not in held for p in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=held)
    fully_shard(frame, mesh=mesh, ignored_params=held)
    if rows is not None:
        device = parallel.device
        frame._apply(lambda one: torch.empty_like(one, device=device) if one.is_meta else one.to(device))
        with torch.no_grad():
            for name, parameter in modules.named_parameters():
                if isinstance(parameter, DTensor):
                    parameter.to_local().copy_(rows.pop(name))
    return frame


def _stays_whole(parameter: nn.Parameter, parallel: DistributedContext) -> bool:
    return not parameter.dim() or not (parameter.requires_grad or parallel.config.shard_frozen)


def _hold_whole(modules: nn.Module, parallel: DistributedContext, mesh: DeviceMesh, rows: dict[str, Tensor]) -> None:
    """Give parameters that stay whole their values, from the rows of all processes."""
    wholes: dict[nn.Parameter, nn.Parameter] = {}
    for name, outline in modules.named_parameters():
        if _stays_whole(outline, parallel):
            own = rows.pop(name).to(parallel.device)
            if outline.dim():
                shape, stride = outline.shape, outline.stride()
                own = DTensor.from_local(own, mesh, [Shard(0)], shape=shape, stride=stride).full_tensor()
            wholes[outline] = nn.Parameter(own, outline.requires_grad)
    for owner in modules.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter in wholes:
                owner._parameters[key] = wholes[parameter]


def own_rows(count: int, rank: int, world: int) -> slice:
    """Which of `count` rows of a tensor FSDP gives a process: `count / world` of them, rounded up, while there are."""
    each = -(-count // world)
    return slice(min(count, rank * each), min(count, (rank + 1) * each))


def whole_tensor(value: Tensor) -> Tensor:
    """All of a tensor, where each process may have its rows alone; all processes call it together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def copy_weights(module: nn.Module, source: nn.Module) -> None:
    """Copy a module's weights and buffers from another that has the same, and maybe more; all processes together.

    Either may be sharded and the other whole.
    """
    given = source.state_dict()
    for name, own in module.state_dict().items():
        value = given[name]
        if own.shape != value.shape:
            raise ValueError(f"expected {name} of {tuple(own.shape)}, got {tuple(value.shape)}")
        if not isinstance(own, DTensor):
            own.copy_(whole_tensor(value))
        elif isinstance(value, DTensor):
            own.to_local().copy_(value.to_local())
        else:
            mesh = own.device_mesh
            own.to_local().copy_(value[own_rows(len(value), mesh.get_local_rank(), mesh.size())])


def apply_activation_checkpointing(modules: nn.Module) -> None:
    """Blocks keep their inputs alone; the backward pass computes them once more (activation checkpointing).

    A block that does so already, since an earlier stage, is left as it is.
    """
    for block in repeated_blocks(modules):
        if not isinstance(block.forward, RecomputedForward):
            block.forward = RecomputedForward(block.forward)


class RecomputedForward:
    """A block's `plain` forward, whose activations the backward pass computes again."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.plain(*arguments, **keywords)
        return checkpoint(functools.partial(self.plain, **keywords), *arguments, use_reentrant=False)


def all_reduce_replicated_grads(modules: nn.Module, parallel: DistributedContext) -> None:
    """Average the gradients of what FSDP leaves whole: scalars, which have no rows to shard."""
    if parallel.sharded:
        for parameter in modules.parameters():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                parameter.grad = parallel.mean(parameter.grad)


def no_sync(frame: nn.Module, last: bool) -> Any:
    """A context for one piece of a step: gradients are exchanged with its last piece only."""
    if isinstance(frame, FSDPModule):
        frame.set_requires_gradient_sync(last)
    if isinstance(frame, DistributedDataParallel) and not last:
        return frame.no_sync()
    return nullcontext()
