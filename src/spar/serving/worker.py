"""One thread that owns the pipeline, and its queue.

A job is one row of a batch. Jobs of the same task and settings share a call: the worker takes the oldest job and all
compatible ones. Chats get turns between the batches, so that neither starves the other. A cancelled job leaves the
queue; a batch whose jobs are all cancelled stops at its next step.
"""

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from spar.common.errors import Cancelled, InputError
from spar.inference.base import Pipeline
from spar.serving.limits import CHAT_TURN_TOKENS, GATHER_SECONDS, MAX_BATCH, MAX_CHATS, MAX_QUEUE

log = logging.getLogger(__name__)

Step = Callable[[int, int, Any], bool]
Call = Callable[[Callable[[Pipeline], Any]], Future]


class Unavailable(Exception):
    """The worker does not accept this job now."""


class Busy(Unavailable):
    """The queue is full."""


class Stopped(Unavailable):
    """The worker accepts no more jobs."""


@dataclass(eq=False)
class ImageJob:
    """One row.

    `work(pipe, inputs, callback)` gets the `inputs` of several jobs and returns a result for each; jobs of the same
    `work`, `key` and `model` may share a call. `weight` is the row's size in images of the model's own size. `model`
    names one of the worker's `others`; None is its own pipeline.
    """

    work: Callable[[Pipeline, list[Any], Step], Sequence[Any]]
    key: Hashable
    inputs: Any
    weight: float = 1
    model: str | None = None
    future: Future = field(default_factory=Future)

    def compatible(self, other: "ImageJob") -> bool:
        return self.work is other.work and (self.key, self.model) == (other.key, other.model)


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


@dataclass
class Worker:
    """The queue and its thread. `observe(seconds, rows)` is called after each batch.

    `thread` is an executor of one thread, best the one that loaded the pipeline: OpenMP keeps a pool for each thread
    that ever computed, and with a second pool the threads sleep between operations instead of spinning, so that an
    image takes nearly twice as long on two cores. `others` are further pipelines by name, on the same thread.
    """

    pipe: Pipeline
    max_batch: int = MAX_BATCH
    max_queue: int = MAX_QUEUE
    observe: Callable[[float, int], None] = lambda _seconds, _rows: None
    thread: Executor | None = None
    others: Mapping[str, Pipeline] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting: list[ImageJob] = []
        self._chats: list[ChatJob] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._expected, self._answered_at = 0, 0.0
        self._thread = self.thread or ThreadPoolExecutor(1, "spar-worker")
        self._running: Future | None = None

    def start(self) -> None:
        self._running = self._thread.submit(self._loop)

    def stop(self) -> None:
        """Cancel waiting and running jobs, and wait for the thread to end."""
        with self._changed:
            self._stopping = True
            cancelled: list[ImageJob | ChatJob] = [*self._waiting, *self._chats]
            self._changed.notify_all()
        for job in cancelled:
            job.future.cancel()
        self._thread.shutdown()

    @property
    def alive(self) -> bool:
        return self._running is not None and not self._running.done() and not self._stopping

    @property
    def waiting(self) -> int:
        """Number of jobs and chats in the queue, without the running batch but with running chats."""
        return len(self._waiting) + len(self._chats)

    def submit(self, *jobs: ImageJob | ChatJob) -> None:
        """Queue all jobs or none.

        Raises:
            InputError: the queue never has room for so many.
            Busy: the queue has no room for all of them.
            Stopped: the worker has been stopped.
        """
        if len(jobs) > self.max_queue:
            raise InputError(f"n: expected at most {self.max_queue}, the length of the queue, got {len(jobs)}")
        with self._changed:
            if not self.alive:
                raise Stopped
            if self.waiting + len(jobs) > self.max_queue:
                raise Busy
            for job in jobs:
                if isinstance(job, ChatJob):
                    self._chats.append(job)
                else:
                    self._waiting.append(job)
                job.future.add_done_callback(self._forget)  # no reference to the job, which would be a cycle
            self._changed.notify_all()

    def pipe_of(self, model: str | None) -> Pipeline:
        """The pipeline of a name; None is the worker's own."""
        return self.pipe if model is None else self.others[model]

    def call(self, function: Callable[[Pipeline], Any], model: str | None = None) -> Future:
        """Queue a function of a pipeline, which runs alone; raises as `submit`."""
        job = ImageJob(lambda pipe, _inputs, _step: [function(pipe)], None, None, model=model)
        self.submit(job)
        return job.future

    def _forget(self, future: Future) -> None:
        """Remove a waiting job from the queue; the thread removes a running chat."""
        with self._changed:
            self._waiting = [job for job in self._waiting if job.future is not future]
            self._chats = [chat for chat in self._chats if chat.started or chat.future is not future]

    def _loop(self) -> None:
        while self._run_once():  # a separate function, so that no result of the last turn is kept while idle
            pass

    def _run_once(self) -> bool:
        """Wait for jobs, then run a batch and advance each chat; False once the worker is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self._chats)
            if self._stopping:
                return False
            jobs = self._take_batch()
        if jobs:
            start = time.perf_counter()
            self._run(jobs)
            self._answered_at = time.perf_counter()
            self.observe(self._answered_at - start, len(jobs))
        with self._changed:
            running = self._chats[:MAX_CHATS]
            for chat in running:
                chat.started = True
        for chat in running:
            self._advance(chat)
            if chat.future.done():
                chat.pieces = None  # frees the KV cache of the conversation
                with self._changed:
                    self._chats.remove(chat)
        return True

    def _take_batch(self) -> list[ImageJob]:
        """Take the oldest job and all compatible ones, up to a full batch.

        Clients that were just answered send their next requests within milliseconds. The worker waits that long for as
        many as it answered last: without that, eight clients fall into two groups that wait for each other.
        """
        left = self._answered_at + GATHER_SECONDS - time.perf_counter()
        if left > 0 and self._waiting and not self._chats:
            enough = min(self._expected, self.max_batch)
            self._changed.wait_for(lambda: self._stopping or len(self._waiting) >= enough, left)
        jobs: list[ImageJob] = []  # stays empty if there are only chats, or all jobs were cancelled meanwhile
        room = float(self.max_batch)
        for job in self._waiting:
            if not jobs or (job.compatible(jobs[0]) and job.weight <= room):
                jobs.append(job)
                room -= job.weight
        self._waiting = [job for job in self._waiting if job not in jobs]
        return jobs

    def _run(self, jobs: list[ImageJob]) -> None:
        """Run all jobs in one call; if it fails, each in its own, so that only the faulty ones fail."""
        if not self._run_together(jobs):
            for job in jobs:
                if not job.future.cancelled():
                    self._run_together([job])

    def _run_together(self, jobs: list[ImageJob]) -> bool:
        """Run all jobs in one call; False if that failed for several of them."""

        def step(*_: Any) -> bool:
            return not self._stopping and not all(job.future.cancelled() for job in jobs)

        try:
            results = jobs[0].work(self.pipe_of(jobs[0].model), [job.inputs for job in jobs], step)
        except Cancelled:
            for job in jobs:
                job.future.cancel()
        except Exception as error:
            if len(jobs) > 1:
                log.warning("a batch of %d failed and is run one by one: %s", len(jobs), type(error).__name__)
                _free(error)
                return False
            _fail(jobs[0].future, error)
        else:
            self._expected = len(jobs) + len(self._waiting)
            for job, result in zip(jobs, results, strict=True):
                _finish(job.future, result)
        return True

    def _advance(self, chat: ChatJob) -> None:
        """Generate a few tokens of one conversation."""
        try:
            if chat.pieces is None and not chat.future.cancelled():
                chat.pieces = chat.start(self.pipe_of(chat.model))
            for _ in range(CHAT_TURN_TOKENS):
                if chat.pieces is None or self._stopping or chat.future.cancelled():
                    return
                piece = next(chat.pieces, None)
                if piece is None:
                    _finish(chat.future, chat.pieces)
                    return
                chat.emit(piece)
        except Exception as error:
            _fail(chat.future, error)


def _finish(future: Future, result: Any) -> None:
    with suppress(InvalidStateError):  # cancelled meanwhile
        future.set_result(result)


def _fail(future: Future, error: Exception) -> None:
    if not isinstance(error, InputError):
        log.error("the pipeline failed", exc_info=error)
    _free(error)
    with suppress(InvalidStateError):
        future.set_exception(error)


def _free(error: Exception) -> None:
    """Free what a failed call holds, on the device too."""
    forget_frames(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()


def forget_frames(error: BaseException) -> None:
    """Drop the tracebacks of an error: their frames hold images and tensors, and the future that holds the error."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
