"""Jobs of the worker: images, which may join running batches, and chats; and how they end."""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from spar.common.errors import InputError
from spar.inference.base import Pipeline

log = logging.getLogger(__name__)

Step = Callable[[int, int, Any], bool]


class SteppedBatch(Protocol):
    """Rows in the order of joining, which advance together, each at its own step."""

    def join(self, inputs: list[Any]) -> None:
        """Append a row of each input, all or, after an error, none, and return when they are prepared."""

    def step(self) -> None:
        """Advance every row, and return when that is done."""

    def left(self) -> list[int]:
        """The steps that each row has left."""

    def previews(self) -> list[int]:
        """The rows that have a preview to show after this step."""

    def show(self, rows: list[int]) -> None:
        """Show the previews of these rows."""

    def finished(self) -> list[int]:
        """The rows that have no steps left."""

    def finish(self, rows: list[int]) -> Sequence[Any]:
        """The results of rows, which then leave; after an error they are still there."""

    def leave(self, rows: list[int]) -> None:
        """Take rows out."""


@dataclass(eq=False)
class ImageJob:
    """One row.

    `work(pipe, inputs, callback)` gets the `inputs` of several jobs and returns a result for each; jobs of the same
    `work`, `key` and `model` may share a call. `weight` is the row's size in images of the model's own size. `model`
    names one of the worker's `others`; None is its own pipeline. `alone`: never while a batch rests between its
    steps, which keeps its memory.
    """

    work: Callable[[Pipeline, list[Any], Step], Sequence[Any]]
    key: Hashable
    inputs: Any
    weight: float = 1
    model: str | None = None
    future: Future = field(default_factory=Future)
    alone: bool = False

    def compatible(self, other: "ImageJob") -> bool:
        return self.work is other.work and (self.key, self.model) == (other.key, other.model)


@dataclass(eq=False, kw_only=True)
class JoiningJob(ImageJob):
    """A row of so many `steps`, which shares a running batch with others of its `batch_key` and `model`, and joins it
    together with those of the same `key`.

    `open(pipe)` returns an empty batch. `work` runs the row alone where the batch has failed with it.
    """

    open: Callable[[Any], SteppedBatch]
    batch_key: Hashable
    steps: int

    @property
    def batch(self) -> Hashable:
        return self.model, self.batch_key

    def as_call(self) -> ImageJob:
        """The row as a job of a call of its own, which has all of the memory."""
        return ImageJob(self.work, object(), self.inputs, self.weight, self.model, self.future, alone=True)


@dataclass(eq=False)
class ChatJob:
    """One conversation: `start(pipe)` returns an iterator over pieces of text, and `emit` gets each piece.

    The future's result is the exhausted iterator. `model` as in `ImageJob`.
    """

    start: Callable[[Pipeline], Iterator[str]]
    emit: Callable[[str], None]
    model: str | None = None
    future: Future = field(default_factory=Future)
    pieces: Iterator[str] | None = None
    started: bool = False


def finish(future: Future, result: Any) -> None:
    """Give a job its result, unless it was cancelled meanwhile."""
    with suppress(InvalidStateError):
        future.set_result(result)


def fail(future: Future, error: Exception) -> None:
    """Give a job its error, which goes to the log unless it is the request's own, and holds nothing of the call."""
    if not isinstance(error, InputError):
        log.error("the pipeline failed", exc_info=error)
    free(error)
    with suppress(InvalidStateError):
        future.set_exception(error)


def free(error: Exception) -> None:
    """Free what a failed call holds, on the device too."""
    forget_frames(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()


def forget_frames(error: BaseException) -> None:
    """Drop the tracebacks of an error: their frames hold images and tensors, and the future that holds the error."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
