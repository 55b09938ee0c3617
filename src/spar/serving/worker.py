"""One thread that owns the pipeline, and the queue before it.

A job is one row of a batch. Jobs that do the same work with the same settings share a call: the worker takes the oldest
and whatever of the others goes with it. Chats speak by turns between the batches, so that neither starves the other.
A job whose future is cancelled leaves the queue; a batch that nobody waits for any more stops at its next step.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from spar.common.errors import InputError
from spar.flow.sampler import Cancelled
from spar.inference.pipeline import SparPipeline
from spar.serving.limits import CHAT_TURN_TOKENS, GATHER_SECONDS, MAX_BATCH, MAX_CHATS, MAX_QUEUE

log = logging.getLogger(__name__)

Step = Callable[[int, int, Any], bool]


class Unavailable(Exception):
    """The worker does not take this work now."""


class Busy(Unavailable):
    """The queue is full."""


class Stopped(Unavailable):
    """The worker takes no more work."""


@dataclass(eq=False)
class ImageJob:
    """One row.

    `work(pipe, inputs, callback)` gets the `inputs` of several jobs and returns a result for each; jobs of one `work`
    and one `key` may go in one call. `weight` is the row's size in pictures of the model's own size.
    """

    work: Callable[[SparPipeline, list[Any], Step], Sequence[Any]]
    key: Hashable
    inputs: Any
    weight: float = 1
    future: Future = field(default_factory=Future)

    def compatible(self, other: "ImageJob") -> bool:
        return self.work is other.work and self.key == other.key


@dataclass(eq=False)
class ChatJob:
    """One conversation: `begin(pipe)` gives an iterator over pieces of text, and each piece is handed to `say`.

    The future's result is that iterator, at its end.
    """

    start: Callable[[SparPipeline], Iterator[str]]
    emit: Callable[[str], None]
    future: Future = field(default_factory=Future)
    pieces: Iterator[str] | None = None
    started: bool = False


@dataclass
class Worker:
    """The queue and its thread. `observe(seconds, rows)` hears of each batch.

    `thread` is an executor of one thread, best of that which loaded the pipeline: OpenMP has a pool of threads for each
    thread that ever computed, and where another has one too, ours no longer spins between operations but sleeps, which
    makes a picture take nearly twice as long on two cores.
    """

    pipe: SparPipeline
    max_batch: int = MAX_BATCH
    max_queue: int = MAX_QUEUE
    observe: Callable[[float, int], None] = lambda seconds, rows: None
    thread: Executor | None = None

    def __post_init__(self) -> None:
        self._waiting: deque[ImageJob] = deque()
        self._chats: deque[ChatJob] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._stopping = False
        self._expected, self._answered_at = 0, 0.0
        self.thread = self.thread or ThreadPoolExecutor(1, "spar-worker")
        self._running: Future | None = None

    def start(self) -> None:
        self._running = self.thread.submit(self._loop)

    def stop(self) -> None:
        """Give up what waits and what runs, and wait for the thread's end."""
        with self._changed:
            self._stopping = True
            given_up = [*self._waiting, *self._chats]
            self._changed.notify_all()
        for job in given_up:
            job.future.cancel()
        self.thread.shutdown()

    @property
    def alive(self) -> bool:
        return self._running is not None and not self._running.done() and not self._stopping

    @property
    def waiting(self) -> int:
        """Jobs and chats in the queue, what runs now not counted (a chat that speaks is)."""
        return len(self._waiting) + len(self._chats)

    def submit(self, *jobs: ImageJob | ChatJob) -> None:
        """Put jobs in the queue, all or none.

        Raises:
            Busy: there is no room for all of them.
            Stopped: the worker has been stopped.
        """
        with self._changed:
            if not self.alive:
                raise Stopped
            if self.waiting + len(jobs) > self.max_queue:
                raise Busy
            for job in jobs:
                (self._chats if isinstance(job, ChatJob) else self._waiting).append(job)
                job.future.add_done_callback(self._forget)  # knows no job: with one it would be a circle, kept long
            self._changed.notify_all()

    def call(self, function: Callable[[SparPipeline], Any]) -> Future:
        """Run a function of the pipeline in its turn, alone; raises as `submit`."""
        job = ImageJob(lambda pipe, inputs, step: [function(pipe)], None, None)
        self.submit(job)
        return job.future

    def _forget(self, future: Future) -> None:
        """Take out of the queue what waits; a chat that speaks is the thread's own to end."""
        with self._changed:
            for job in [job for job in self._waiting if job.future is future]:
                self._waiting.remove(job)
            for chat in [chat for chat in self._chats if chat.future is future and not chat.started]:
                self._chats.remove(chat)

    def _loop(self) -> None:
        while (
            self._run_once()
        ):  # a function of its own, so that nothing of the last turn is kept while there is no work
            pass

    def _run_once(self) -> bool:
        """Wait for work, then do a batch and let each chat say a little; False once the worker is stopped."""
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
            speaking = list(self._chats)[:MAX_CHATS]
            for chat in speaking:
                chat.started = True
        for chat in speaking:
            self._advance(chat)
            if chat.future.done():
                chat.pieces = None  # and with it what the model remembers of the conversation
                with self._changed:
                    self._chats.remove(chat)
        return True

    def _take_batch(self) -> list[ImageJob]:
        """The oldest job and all that goes with it, up to a full batch.

        Clients that have just been answered come back one after another within milliseconds. The worker waits so long
        for as many as it answered last: without that, eight clients fall into two groups that wait for each other.
        """
        left = self._answered_at + GATHER_SECONDS - time.perf_counter()
        if left > 0 and self._waiting and not self._chats:
            enough = min(self._expected, self.max_batch)
            self._changed.wait_for(lambda: self._stopping or len(self._waiting) >= enough, left)
        if not self._waiting:  # there are only chats, or all were cancelled meanwhile
            return []
        head, room = self._waiting[0], self.max_batch - self._waiting[0].weight
        jobs = [head]
        for job in list(self._waiting)[1:]:
            if job.compatible(head) and job.weight <= room:
                jobs.append(job)
                room -= job.weight
        for job in jobs:
            self._waiting.remove(job)
        return jobs

    def _run(self, jobs: list[ImageJob]) -> None:
        """One call for all; if it fails, one for each, so that nobody pays for a neighbour."""

        def step(*_: Any) -> bool:
            return not self._stopping and not all(job.future.cancelled() for job in jobs)

        try:
            results = jobs[0].work(self.pipe, [job.inputs for job in jobs], step)
        except Cancelled:
            for job in jobs:
                job.future.cancel()
        except Exception as error:
            if len(jobs) == 1:
                _fail(jobs[0].future, error)
                return
            log.warning("a batch of %d failed and is done one by one: %s", len(jobs), type(error).__name__)
            for job in jobs:
                if not job.future.cancelled():
                    self._run([job])
        else:
            self._expected = len(jobs) + len(self._waiting)
            for job, result in zip(jobs, results, strict=True):
                _finish(job.future, result)

    def _advance(self, chat: ChatJob) -> None:
        """A few tokens of one conversation."""
        try:
            if chat.pieces is None and not chat.future.cancelled():
                chat.pieces = chat.start(self.pipe)
            for _ in range(CHAT_TURN_TOKENS):
                if self._stopping or chat.future.cancelled():
                    return
                piece = next(chat.pieces, None)
                if piece is None:
                    _finish(chat.future, chat.pieces)
                    return
                chat.emit(piece)
        except Exception as error:
            _fail(chat.future, error)


def _finish(future: Future, result: Any) -> None:
    try:
        future.set_result(result)
    except InvalidStateError:  # cancelled meanwhile
        pass


def _fail(future: Future, error: Exception) -> None:
    if not isinstance(error, InputError):
        log.error("the pipeline failed", exc_info=error)
    try:
        future.set_exception(error)
    except InvalidStateError:
        pass
