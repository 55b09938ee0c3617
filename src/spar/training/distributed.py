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
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
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


def wrap_modules(modules: nn.Module, parallel: DistributedContext) -> nn.Module:
    """The wrapper to call computations through; the modules' blocks are recomputed, compiled and sharded as asked.

    Call it after `freeze`: what is frozen exchanges no gradients, and may stay whole.
    """
    scale, frame = parallel.config, ForwardWrapper(modules)
    if scale.compile:  # a run that may differ in its last bits for speed's sake
        torch.backends.cudnn.benchmark = True  # its shapes are few: each is tried out once
        compile_blocks(modules)
    if scale.activation_checkpointing:
        apply_activation_checkpointing(modules)
    if parallel.sharded:
        mesh = init_device_mesh(parallel.device.type, (parallel.world,))
        held = {p for p in modules.parameters() if not p.dim() or not (p.requires_grad or scale.shard_frozen)}
        for block in repeated_blocks(modules):
            if any(p not in held for p in block.parameters()):
                fully_shard(block, mesh=mesh, ignored_params=held)
        fully_shard(frame, mesh=mesh, ignored_params=held)
        return frame
    if parallel.world > 1:
        # Generation and editing reach different parts, and check_unused_parameters says what none reaches.
        return DistributedDataParallel(frame, find_unused_parameters=True, broadcast_buffers=False)
    return frame


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
