"""Processes that a launcher has started together: `torchrun` or `accelerate launch --multi_gpu`, which tell each its
rank through the environment.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from spar.common.errors import InputError, PeerFailure
from spar.common.files import atomic_directory

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # of processes whose shares take unequal time

LAUNCHERS = (
    "start them with `torchrun --nproc-per-node N -m -- spar VERB ...` or `accelerate launch --multi_gpu "
    "--num_processes N -m -- spar VERB ...`"
)
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
PEER_FAILURE_SIGNS = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "nccl", "socket")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a command as one of them sees them. `rank` 0 writes the files that all share."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def meet(cls, device: torch.device | str, *, patience: timedelta | None = None, **fields: Any) -> Self:
        """Meet the other processes that a launcher has started; without a launcher, be alone.

        Args:
            device: by whose kind the processes meet.
            patience: how long one waits for the others, by default torch's minutes.
            fields: further ones of a subclass.

        Raises:
            InputError: a launcher's number of several processes, where there is one.
        """
        world = os.environ.get("WORLD_SIZE") or "1"
        if world == "1":
            _check_launcher()
            return cls(device=torch.device(device), **fields)
        from accelerate import PartialState  # which takes a second to import, and one process does not need

        waiting = {} if patience is None else {"timeout": patience}
        state = PartialState(cpu=torch.device(device).type == "cpu", **waiting)
        if str(state.num_processes) != world:  # a scheduler has set WORLD_SIZE alone: each would do all the work
            raise InputError(f"WORLD_SIZE {world}: expected processes that know their ranks, got one: {LAUNCHERS}")
        return cls(rank=state.process_index, world=state.num_processes, device=state.device, **fields)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather_objects(self, own: T) -> list[T]:
        """What each process has, by rank; Python objects travel between processes of one command alone."""
        if self.world == 1:
            return [own]
        parts: list[Any] = [None] * self.world
        with wrap_distributed_errors():
            dist.all_gather_object(parts, own)
        return parts

    def share(self, items: Sequence[T]) -> list[T]:
        """What this process does of a list: every `world`-th, from its rank on."""
        return list(items[self.rank :: self.world])

    def gather_shares(self, own: Sequence[T]) -> list[T]:
        """The list that all processes have done their `share` of, on each of them."""
        parts = self.gather_objects(list(own))
        return [parts[index % self.world][index // self.world] for index in range(sum(map(len, parts)))]

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

    def main_only(self, work: Callable[[], T]) -> T:
        """What the main process's work gives, on all; what it raises of a user's errors, all raise."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.main:
            try:
                outcome = (work(), None)
            except (InputError, OSError) as error:
                outcome = (None, error)
        result, failure = self.gather_objects(outcome)[0]
        if failure is not None:
            raise failure
        return result

    @contextmanager
    def directory(self, folder: Path) -> Iterator[Path]:
        """An `atomic_directory` that all processes fill."""
        with atomic_directory(folder) if self.main else nullcontext() as own:
            shared: Any = self.main_only(lambda: own)
            yield shared
            self.barrier()

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
        """What fails on one process fails on all, so that none waits forever; for reading and writing files.

        Raises:
            InputError: this process's own.
            OSError: this process's own, or one that says that another process failed.
        """
        failure: InputError | OSError | None = None
        try:
            yield
        except (InputError, OSError) as error:
            failure = error
        except SafetensorError as error:  # where a disk is full
            failure = OSError(str(error))
        (failed,) = self.any_process(failure is not None)
        if failure:
            raise failure
        if failed:
            raise OSError("another process of this run could not read or write its part; its own error says why")


ONE_PROCESS = ProcessGroup()


def leave_processes() -> None:
    """Leave the processes that were met, at the end of a command: a group whose threads still run when the interpreter
    ends may abort it.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


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
            "another process of this run has ended (its own error stands above, or the machine stopped it); what was "
            "saved last is whole: start the run again, a training with --resume auto"
        ) from error
