"""One thread that owns the pipeline, and its queue.

A job is one row of a batch. Where a sampler allows it, jobs join the running batch between two steps, oldest first as
far as there is room and as soon as that is worth it (`joining`), and each leaves it when it is finished, cancelled or
faulty. One that finds no memory beside others, and those of a step that fails, have a call of their own each, once the
batch has ended; until then none joins. A call of another task and a chat have their turns between two steps too, after
which the batch runs for as long as they took, so that none starves the others.

Jobs of other samplers and tasks share a call, which runs to its end: the worker takes the oldest one and all compatible
ones. A call whose jobs are all cancelled stops at its next step.
"""

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from spar.common.errors import Cancelled, InputError
from spar.inference.base import Pipeline
from spar.serving.batching import Drawing
from spar.serving.jobs import ChatJob, ImageJob, JoiningJob, fail, finish, free
from spar.serving.joining import BatchCosts
from spar.serving.limits import CHAT_TURN_TOKENS, GATHER_SECONDS, MAX_BATCH, MAX_CHATS, MAX_QUEUE
from spar.serving.running_batch import Jobs, RunningBatch, groups_of, run_apart

log = logging.getLogger(__name__)

MAX_COSTS = 64  # kinds of batches whose costs are remembered

Call = Callable[[Callable[[Pipeline], Any]], Future]


class Unavailable(Exception):
    """The worker does not accept this job now."""


class Busy(Unavailable):
    """The queue is full."""


class Stopped(Unavailable):
    """The worker accepts no more jobs."""


@dataclass
class Worker:
    """The queue and its thread. `observe(seconds, rows)` is called after each call and each step of a batch.

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
        self._called: list[ImageJob] = []  # those of the call that runs
        self._batch: RunningBatch | None = None
        self._costs: dict[Hashable, BatchCosts] = {}
        self._chat_turns = 0
        self._owed = 0.0  # seconds that the batch is to run before the next call or chat
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
            cancelled: list[ImageJob | ChatJob] = [*self._called, *self._waiting, *self._chats]
            self._changed.notify_all()
        for job in cancelled:
            job.future.cancel()
        self._thread.shutdown()

    @property
    def alive(self) -> bool:
        return self._running is not None and not self._running.done() and not self._stopping

    @property
    def waiting(self) -> int:
        """Number of jobs and chats in the queue, without those in a batch or a call but with running chats."""
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
        """Queue a function of a pipeline, which runs alone unless it is a `Drawing` that may join a batch; raises as
        `submit`.
        """
        job = function.job(self.pipe_of(model), model) if isinstance(function, Drawing) else None
        job = job or ImageJob(lambda pipe, _inputs, _step: [function(pipe)], None, None, model=model)
        self.submit(job)
        return job.future

    def _forget(self, future: Future) -> None:
        """Remove a waiting job from the queue; the thread removes a running chat."""
        with self._changed:
            self._waiting = [job for job in self._waiting if job.future is not future]
            self._chats = [chat for chat in self._chats if chat.started or chat.future is not future]

    def _loop(self) -> None:
        try:
            while self._run_once():  # a separate function, so that no result of the last turn is kept while idle
                pass
        except Exception:  # nobody reads the thread's own future
            log.exception("the worker has failed and takes no more jobs")
        finally:
            with self._changed:
                self._stopping = True
                running: list[JoiningJob] = self._batch.jobs if self._batch else []
                left: list[ImageJob | ChatJob] = [*running, *self._called, *self._waiting, *self._chats]
            self._batch, self._called = None, []
            for job in left:  # no effect on those that `stop` cancelled
                job.future.cancel()

    def _run_once(self) -> bool:
        """Wait for jobs, then let some join the batch and run its step, and for half of the time a call and some tokens
        of chats; False once the worker is stopped.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self._chats or self._batch)
            self._gather()
            if self._stopping:
                return False
            joining = self._take_joining()
        start = time.perf_counter()
        for group in groups_of(joining):
            run_apart(group, self._join, self._refuse)
        if self._batch:
            self._step(self._batch)
        end = time.perf_counter()
        self._owed -= end - start
        if not self._batch or self._owed <= 0:
            self._call()
            self._speak()
            self._owed = time.perf_counter() - end if self._batch or self._waiting else 0.0
        return True

    def _call(self) -> None:
        """Run the oldest job of a call, and all compatible ones."""
        with self._changed:
            jobs = self._called = [] if self._stopping else self._take_batch()
        if jobs:
            start = time.perf_counter()
            self._run(jobs)
            self._called = []
            self._answered_at = time.perf_counter()
            self.observe(self._answered_at - start, len(jobs))

    def _gather(self) -> None:
        """Wait for the next requests of clients that were just answered, which send them within milliseconds.

        The worker waits that long for as many as it answered last: without that, eight clients fall into two groups
        that wait for each other, or join one by one.
        """
        left = self._answered_at + GATHER_SECONDS - time.perf_counter()
        if left > 0 and self._waiting and not self._chats and not self._batch:
            enough = min(self._expected, self.max_batch)
            self._changed.wait_for(lambda: self._stopping or len(self._waiting) >= enough, left)

    def _take_joining(self) -> list[JoiningJob]:
        """Take the jobs that are to join the batch, or with the oldest one to begin it, as far as there is room.

        Nobody is overtaken by those that a running batch suits better: the first job of another batch, or for which
        there is no room, lets none after it join. One that waits for a call of its own lets nobody join at all.
        """
        if any(job.alone for job in self._waiting):
            return []
        running, jobs = self._batch, list[JoiningJob]()
        room = self.max_batch - (running.weight if running else 0)
        for job in self._waiting:
            if not isinstance(job, JoiningJob):
                continue
            name = running.name if running else jobs[0].batch if jobs else None  # None: it begins the batch
            if name is None or (job.batch == name and job.weight <= room):
                jobs.append(job)
                room -= job.weight
            elif running:
                break
        if running and jobs and not running.welcomes(jobs):
            return []
        self._waiting = [job for job in self._waiting if job not in jobs]
        return jobs

    def _take_batch(self) -> list[ImageJob]:
        """Take the oldest job of a call and all compatible ones, up to a full batch."""
        jobs: list[ImageJob] = []
        room = float(self.max_batch)
        for job in self._waiting:
            if isinstance(job, JoiningJob) or (job.alone and self._batch):
                continue
            if not jobs or (job.compatible(jobs[0]) and job.weight <= room):
                jobs.append(job)
                room -= job.weight
        self._waiting = [job for job in self._waiting if job not in jobs]
        return jobs

    def _join(self, jobs: Jobs) -> None:
        """Let jobs of one key join the batch, which begins with them where none runs."""
        first = jobs[0]
        running = self._batch
        if running is None:
            running = RunningBatch(first.batch, first.open(self.pipe_of(first.model)), self._costs_of(first.batch))
        running.join(jobs)
        self._batch = running

    def _refuse(self, job: JoiningJob, error: Exception) -> None:
        """Fail a job that could not join, unless that may be for want of memory beside those that run."""
        if self._batch is None or isinstance(error, InputError):
            fail(job.future, error)
            return
        log.warning("an image could not join and is run in a call of its own: %s", type(error).__name__)
        free(error)
        self._call_alone([job])

    def _call_alone(self, jobs: Jobs) -> None:
        """Let jobs that failed together wait again, before all others, each for a call of its own."""
        with self._changed:
            self._waiting = [*(job.as_call() for job in jobs if not job.future.done()), *self._waiting]

    def _costs_of(self, name: Hashable) -> BatchCosts:
        """What is known of the costs of a kind of batch; of MAX_COSTS kinds, which requests may invent."""
        while len(self._costs) >= MAX_COSTS and name not in self._costs:
            del self._costs[next(iter(self._costs))]
        return self._costs.setdefault(name, BatchCosts())

    def _step(self, running: RunningBatch) -> None:
        """Run a step of the batch; where it fails, the batch is over, and its jobs run one by one."""
        start = time.perf_counter()
        try:
            running.step()
            rows = len(running.jobs)
            if running.answer():
                self._expected = rows - len(running.jobs) + len(self._waiting)
                self._answered_at = time.perf_counter()
        except Exception as error:
            self._batch = None
            if len(running.jobs) > 1:
                log.warning("a step of %d failed, run one by one: %s", len(running.jobs), type(error).__name__)
                free(error)
                self._call_alone(running.jobs)
            else:
                for job in running.jobs:
                    fail(job.future, error)
            return
        if not running.jobs:
            self._batch = None
        if rows:
            self.observe(time.perf_counter() - start, rows)

    def _speak(self) -> None:
        """Generate a few tokens of each chat, or beside a batch of one, the next in turn."""
        with self._changed:
            running = self._chats[:MAX_CHATS]
            if running and self._batch:
                self._chat_turns += 1
                running = [running[self._chat_turns % len(running)]]
            for chat in running:
                chat.started = True
        for chat in running:
            self._advance(chat)
            if chat.future.done():
                chat.pieces = None  # frees the KV cache of the conversation
                with self._changed:
                    self._chats.remove(chat)

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
            answers = [*zip(jobs, results, strict=True)]
        except Cancelled:
            for job in jobs:
                job.future.cancel()
        except Exception as error:
            if len(jobs) > 1:
                log.warning("a batch of %d failed and is run one by one: %s", len(jobs), type(error).__name__)
                free(error)
                return False
            fail(jobs[0].future, error)
        else:
            self._expected = len(jobs) + len(self._waiting)
            for job, result in answers:
                finish(job.future, result)
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
                    finish(chat.future, chat.pieces)
                    return
                chat.emit(piece)
        except Exception as error:
            fail(chat.future, error)
