"""Several processes, one run: who computes which rows of a batch, and how weights and gradients are shared.

A step is defined on the whole batch. Each process draws the same indices, words and noise for all of it and computes
its own rows; gradients are means over rows, so that the loss and the step are those of one process, up to rounding.
Launch with `torchrun` or `accelerate launch --multi_gpu`; both tell each process its rank through the environment.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from spar.common.errors import InputError
from spar.models.blocks import compile_blocks, repeated_blocks

T = TypeVar("T")

LAUNCHERS = (
    "start them with `torchrun --nproc-per-node N -m -- spar train ...` or `accelerate launch --multi_gpu "
    "--num_processes N -m -- spar train ...`"
)
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
PEER_FAILURE_SIGNS = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "nccl", "socket")


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
        precision: of matrix products; weights stay float32.
        shard_frozen: under fsdp, whether frozen weights are sharded too (less memory) or held whole (less traffic).
    """

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    grad_accum_steps: int = 1
    activation_checkpointing: bool = False
    compile: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    shard_frozen: bool = True

    def __post_init__(self) -> None:
        if self.grad_accum_steps < 1:
            raise InputError(f"parallelism.grad_accum_steps: expected at least 1, got {self.grad_accum_steps}")


class PeerFailure(RuntimeError):
    """Another process of the run has ended, so this one cannot go on; the last saved state is whole."""


@dataclass(frozen=True)
class DistributedContext:
    """The processes of a run as one of them sees them. `rank` 0 writes the files that all share."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    config: ParallelismConfig = ParallelismConfig()
    sharded: bool = False

    @classmethod
    def initialize(cls, config: ParallelismConfig, device: torch.device | str) -> "DistributedContext":
        """Meet the other processes that a launcher has started; without a launcher, be alone.

        Raises:
            InputError: a strategy or a launcher's number of several processes, where there is one.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            _check_launcher()
            if config.strategy != "auto":
                raise InputError(
                    f"parallelism.strategy: {config.strategy} is for several processes, got one: {LAUNCHERS}"
                )
            return cls(device=torch.device(device), config=config)
        state = PartialState(cpu=torch.device(device).type == "cpu")
        asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        sharded = config.strategy == "fsdp" or (config.strategy == "auto" and asked)
        return cls(state.process_index, state.num_processes, state.device, config, sharded)

    @property
    def main(self) -> bool:
        return self.rank == 0

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

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.world == 1:
            return value
        total = value.detach().clone()
        with wrap_distributed_errors():
            dist.all_reduce(total)
        return total / self.world

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        return self.mean(value) * self.world

    def gather(self, rows: Tensor) -> Tensor:
        """The rows `[n, ...]` of all processes, as many of each, one process after the other."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self.world)]
        with wrap_distributed_errors():
            dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def any_process(self, *flags: bool) -> list[bool]:
        """Which flags are up on any process: all processes then do the same."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.float32, device=self.device)
        return [bool(flag) for flag in self.mean(raised) > 0]

    def barrier(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            with wrap_distributed_errors():
                dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through alone; the others follow, and find what it wrote."""
        if not self.main:
            self.barrier()
        try:
            yield
        finally:
            if self.main:
                self.barrier()

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """What fails on one process fails on all, so that none waits for ever; for writing files.

        Raises:
            OSError: this process's own, or one that says that another process failed.
        """
        failure = None
        try:
            yield
        except (OSError, SafetensorError) as error:  # the latter where a disk is full
            failure = error if isinstance(error, OSError) else OSError(str(error))
        (failed,) = self.any_process(failure is not None)
        if failure:
            raise failure
        if failed:
            raise OSError("another process of this run could not write its part; its own error says why")


SINGLE_PROCESS = DistributedContext()


def _check_launcher() -> None:
    """Refuse to be alone where a launcher was told to start several processes: each would train the whole run."""
    for name in MPI_SIZES:
        if os.environ.get(name, "1") not in ("", "1"):
            raise InputError(f"{name}: expected processes of torchrun or accelerate, got those of MPI: {LAUNCHERS}")
    # accelerate names a meeting place for several processes, and without several GPUs starts one that has no rank
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise InputError(
            "accelerate launch: expected several processes, got one, as always without --multi_gpu and several GPUs: "
            f"{LAUNCHERS}, or one without a launcher"
        )


@contextmanager
def wrap_distributed_errors() -> Iterator[None]:
    """Turn the libraries' errors about a lost process into one that says so."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error).lower() for sign in PEER_FAILURE_SIGNS):
            raise
        raise PeerFailure(
            "another process of this run has ended (its own error stands above, or the machine stopped it); the state "
            "that was saved last is whole: start the run again with --resume auto"
        ) from error


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
