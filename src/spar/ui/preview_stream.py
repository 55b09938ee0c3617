"""Drawing for the page: with previews as it goes, and a way to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image

    from spar.inference.pipeline import GenerateOutput, SparPipeline

    Call = Callable[[Callable[[SparPipeline], Any]], Future]
    Task = Literal["generate", "edit"]

PREVIEW_SECONDS = 0.2  # at least between two previews
PREVIEW_SHARE = 0.2  # of the time at most goes into previews


@dataclass(frozen=True)
class PreviewStep:
    """A step done, of how many; with a preview now and then."""

    done: int
    steps: int
    image: Image.Image | None = None


class PreviewStream:
    """The pipeline's work for the sessions of a page.

    Args:
        pipe: does the work, on a thread of its own.
        call: runs a function of the pipeline alone, in its turn, where somebody else owns the pipeline's thread.
    """

    def __init__(self, pipe: SparPipeline, call: Call | None = None) -> None:
        thread = None if call else ThreadPoolExecutor(1, "spar-page")
        self.call = call or (lambda function: thread.submit(function, pipe))
        self._ends: dict[tuple[str, str], Callable[[], None]] = {}

    def run(self, session: str, task: Task, *args: Any, **keywords: Any) -> Iterator[PreviewStep | GenerateOutput]:
        """The steps of a task of the pipeline as they are done, at last its output. A reader that leaves stops it.

        Raises:
            Cancelled, CancelledError: it was stopped at work, or before its turn came.
            Exception: whatever the task raises.
        """
        stop, told = Event(), Queue()
        future = self.call(
            lambda pipe: getattr(pipe, task)(*args, callback=_callback(pipe, stop, told.put), **keywords)
        )

        def end() -> None:
            stop.set()
            future.cancel()

        self._ends[session, task] = end
        future.add_done_callback(told.put)
        try:
            while isinstance(item := told.get(), PreviewStep):
                yield item
            yield item.result()
        finally:
            end()
            if self._ends.get((session, task)) is end:
                del self._ends[session, task]

    def stop(self, session: str, *tasks: Task) -> None:
        """End what is being drawn for a session: at the end of its step, or at once where it waits for its turn."""
        for task in tasks:
            if end := self._ends.get((session, task)):
                end()


def _callback(pipe: SparPipeline, stop: Event, tell: Callable[[PreviewStep], None]) -> Callable[[int, int, Any], bool]:
    """The pipeline's callback that tells of each step, with a preview where there is time for one."""
    due = time.monotonic() + PREVIEW_SECONDS

    def callback(done: int, steps: int, latent: Any) -> bool:
        nonlocal due
        image, began = None, time.monotonic()
        if began >= due and done < steps and not stop.is_set():
            image = pipe.preview(latent)[0]
            ended = time.monotonic()
            due = ended + max(PREVIEW_SECONDS, (ended - began) / PREVIEW_SHARE)
        tell(PreviewStep(done, steps, image))
        return not stop.is_set()

    return callback
