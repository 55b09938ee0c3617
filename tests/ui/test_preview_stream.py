"""Work for the page: steps in order, previews in moderation, stopping, and errors that arrive."""

import time
from concurrent.futures import CancelledError
from threading import Event, Semaphore, Thread
from types import SimpleNamespace

import pytest

from spar.common.errors import Cancelled, InputError
from spar.ui.preview_stream import PREVIEW_SHARE, PreviewStep, PreviewStream, _callback


class SlowPipe:
    """Draws in `steps` steps of `pause` seconds each; what a preview costs is `preview_pause`."""

    def __init__(self, steps=5, pause=0.0, preview_pause=0.0):
        self.steps, self.pause, self.preview_pause = steps, pause, preview_pause
        self.done = 0

    def generate(self, prompt, *, callback, seed=None):
        if prompt == "bad":
            raise InputError("prompt: bad")
        for step in range(1, self.steps + 1):
            time.sleep(self.pause)
            self.done = step
            if callback(step, self.steps, step) is False:
                raise Cancelled("stopped")
        return SimpleNamespace(prompt=prompt, seed=seed)

    def preview(self, latent):
        time.sleep(self.preview_pause)
        return [f"preview of {latent}"]


def test_steps_come_in_order_and_the_output_last():
    *steps, out = PreviewStream(SlowPipe()).run("me", "generate", "a", seed=3)
    assert [(step.done, step.steps) for step in steps] == [(i, 5) for i in range(1, 6)]
    assert (out.prompt, out.seed) == ("a", 3)


def test_previews_are_of_the_steps_own_latent_and_take_their_share_at_most():
    began = time.monotonic()
    *steps, _ = PreviewStream(SlowPipe(steps=60, pause=0.03, preview_pause=0.05)).run("me", "generate", "a")
    seconds = time.monotonic() - began
    shown = [step for step in steps if step.image]
    assert shown and all(step.image == f"preview of {step.done}" for step in shown)
    assert len(shown) * 0.05 <= PREVIEW_SHARE * seconds + 0.05
    assert steps[-1].image is None  # the image itself comes next


def test_a_quick_image_has_no_preview():
    assert not any(
        step.image
        for step in PreviewStream(SlowPipe(steps=3)).run("me", "generate", "a")
        if isinstance(step, PreviewStep)
    )


def eager(monkeypatch):
    """Previews of all steps are due."""
    monkeypatch.setattr("spar.ui.preview_stream.PREVIEW_SECONDS", 0)
    monkeypatch.setattr("spar.ui.preview_stream.PREVIEW_SHARE", float("inf"))


def test_one_preview_at_a_time_however_slow_the_reader_is(monkeypatch):
    eager(monkeypatch)
    stream = PreviewStream(SlowPipe(steps=20))
    work = stream.run("me", "generate", "a")
    first = next(work)
    stream.call(lambda pipe: None).result()  # after all steps, of which the reader has read one
    assert [step.done for step in (first, *list(work)[:-1]) if step.image] == [1]


def test_a_preview_that_was_shown_makes_room_for_the_next(monkeypatch):
    eager(monkeypatch)
    steps, room = [], Semaphore()
    callback = _callback(SlowPipe(), Event(), room, steps.append)
    for done in (1, 2):
        callback(done, 9, done)
    room.release()
    for done in (3, 4):
        callback(done, 9, done)
    assert [step.done for step in steps] == [1, 2, 3, 4] and [step.done for step in steps if step.image] == [1, 3]


def test_stopping_ends_the_sessions_own_work_and_no_others():
    pipe = SlowPipe(steps=200, pause=0.01)
    jobs = PreviewStream(pipe)
    work = jobs.run("me", "generate", "a")
    next(work)
    jobs.stop("somebody else", "generate")
    jobs.stop("me", "edit")
    next(work)
    jobs.stop("me", "edit", "generate")
    with pytest.raises(Cancelled):
        list(work)
    assert pipe.done < 20
    jobs.stop("me", "generate")  # nothing runs any more
    assert list(jobs.run("me", "generate", "b"))[-1].prompt == "b"


def test_a_reader_that_leaves_stops_the_work():
    pipe = SlowPipe(steps=200, pause=0.01)
    jobs = PreviewStream(pipe)
    work = jobs.run("me", "generate", "a")
    next(work)
    work.close()
    list(jobs.run("you", "generate", "b"))  # its turn comes when the first has ended
    assert jobs._ends == {}


def test_errors_arrive_where_the_steps_are_read():
    with pytest.raises(InputError, match="prompt: bad"):
        list(PreviewStream(SlowPipe()).run("me", "generate", "bad"))


def test_one_piece_of_work_at_a_time():
    at_work, most = [], []

    def work(pipe):
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(0.02)
        at_work.pop()

    jobs = PreviewStream(SlowPipe())
    for future in [jobs.call(work) for _ in range(5)]:
        future.result()
    assert most == [1] * 5


def test_work_that_waits_for_its_turn_is_stopped_at_once():
    jobs, go, raised = PreviewStream(SlowPipe()), Event(), []
    first = jobs.call(lambda pipe: go.wait(5))

    def read():
        try:
            list(jobs.run("me", "generate", "a"))
        except CancelledError as error:
            raised.append(error)

    reader = Thread(target=read)
    reader.start()
    while not jobs._ends:
        time.sleep(0.001)
    jobs.stop("me", "generate")
    reader.join(5)
    assert raised and not first.done()
    go.set()
    assert first.result() is True
