"""Sampling for the page, with previews and a way to stop."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from threading import Event, Semaphore
from typing import Any, Literal
from weakref import WeakSet

from PIL import Image

from spar.inference.base import Pipeline
from spar.inference.outputs import GenerateOutput
from spar.serving.batching import Drawing
from spar.serving.worker import Call

Task = Literal["generate", "edit"]

PREVIEW_SECONDS = 0.2  # at least between two previews
PREVIEW_SHARE = 0.2  # largest share of the time spent on previews, of all sessions together


@dataclass(frozen=True)
class PreviewStep:
    """A finished step, the number of steps, and sometimes a preview."""

    done: int
    steps: int
    image: Image.Image | None = None


class PreviewStream:
    """Runs the pipeline for the sessions of a page.

    Args:
        pipe: runs on a thread of its own.
        call: queues a function of the pipeline, for a pipeline whose thread belongs to a server; a `Drawing` may share
            a batch with others' images.
    """

    def __init__(self, pipe: Pipeline, call: Call | None = None) -> None:
        self.pipe, self.call = pipe, call or _own_thread(pipe)
        self._ends: dict[tuple[str | None, str], Callable[[], None]] = {}
        self._running = WeakSet[Event]()  # of each task that has begun, what stops its previews

    def run(
        self, session: str | None, task: Task, *args: Any, **keywords: Any
    ) -> Iterator[PreviewStep | GenerateOutput]:
        """Yield the steps of a task of the pipeline, then its output. Closing the iterator stops the task.

        Raises:
            Cancelled, CancelledError: the task was stopped while it ran, or before it began.
            Exception: as raised by the task.
        """
        stop, room = Event(), Semaphore()
        items: Queue[PreviewStep | Future[GenerateOutput]] = Queue()
        future = self.call(Drawing(task, args, keywords, _callback(self.pipe, stop, room, items.put, self._running)))

        def end() -> None:
            stop.set()
            future.cancel()

        self._ends[session, task] = end
        future.add_done_callback(items.put)
        try:
            while isinstance(item := items.get(), PreviewStep):
                yield item
                if item.image:
                    room.release()
            yield item.result()
        finally:
            end()
            self._running.discard(stop)
            if self._ends.get((session, task)) is end:
                del self._ends[session, task]

    def stop(self, session: str | None, *tasks: Task) -> None:
        """Stop a session's tasks: a running one after its current step, a waiting one at once."""
        for task in tasks:
            if end := self._ends.get((session, task)):
                end()


def _own_thread(pipe: Pipeline) -> Call:
    """A `call` that runs each function on one new thread."""
    thread = ThreadPoolExecutor(1, "spar-page")
    return lambda function: thread.submit(function, pipe)


def _callback(
    pipe: Pipeline, stop: Event, room: Semaphore, emit: Callable[[PreviewStep], None], running: WeakSet[Event]
) -> Callable[[int, int, Any], bool]:
    """Callback of the pipeline that emits each step, with a preview when one is due and the last one has been shown.

    The tasks that are `running`, of which it is one from its first step on, share the time of previews.
    """
    due = time.monotonic() + PREVIEW_SECONDS

    def callback(done: int, steps: int, latent: Any) -> bool:
        nonlocal due
        image, began = None, time.monotonic()
        if not stop.is_set():
            running.add(stop)
        if began >= due and done < steps and not stop.is_set() and room.acquire(blocking=False):
            image = pipe.preview(latent)[0]
            ended = time.monotonic()
            due = ended + max(PREVIEW_SECONDS, (ended - began) / PREVIEW_SHARE * len(running))
        emit(PreviewStep(done, steps, image))
        return not stop.is_set()

    return callback
