"""Work for the page: steps in order, previews in moderation, stopping, and errors that arrive."""

import time
from concurrent.futures import CancelledError
from threading import Event, Semaphore, Thread
from types import SimpleNamespace
from weakref import WeakSet

import numpy as np
import pytest

from spar.common.errors import Cancelled, InputError
from spar.serving.batching import Drawing, sampling_jobs
from spar.serving.schema import GenerationRequest
from spar.serving.worker import Worker
from spar.ui.examples import scene_images
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


@pytest.mark.parametrize("count", [1, 8])
def test_the_previews_of_all_tasks_that_share_a_batch_take_their_share_at_most(monkeypatch, count):
    """The time is a clock of the test's; each preview was shown."""
    clock, spent = SimpleNamespace(now=0.0), []

    class Pipe:
        def preview(self, latent):
            clock.now += 0.05
            spent.append(0.05)
            return [latent]

    monkeypatch.setattr("spar.ui.preview_stream.time.monotonic", lambda: clock.now)
    running = WeakSet()
    callbacks = [_callback(Pipe(), Event(), Semaphore(1000), lambda step: None, running) for _ in range(count)]
    for done in range(1, 1000):
        clock.now += 0.03
        for callback in callbacks:
            callback(done, 1000, done)
    assert 0.5 * PREVIEW_SHARE < sum(spent) / clock.now <= PREVIEW_SHARE


def test_a_preview_that_was_shown_makes_room_for_the_next(monkeypatch):
    eager(monkeypatch)
    steps, room = [], Semaphore()
    callback = _callback(SlowPipe(), Event(), room, steps.append, WeakSet())
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
    assert jobs._ends == {} and not jobs._running


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


# ---- drawings among the images of others -----------------------------------------------------------------------------

KEYWORDS = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 4.5, "negative_prompt": None}


@pytest.fixture
def worker(pipe, monkeypatch):
    """A worker of the bundled pipeline, in whose `rows` are the numbers of images of its steps."""
    monkeypatch.setattr("spar.serving.joining.BatchCosts.worth_joining", lambda *_: True)
    worker = Worker(pipe, max_batch=4)
    worker.rows = []
    worker.observe = lambda _, rows: worker.rows.append(rows)
    worker.start()
    yield worker
    worker.stop()


def arguments(task):
    return (scene_images()[0], "change the background to navy") if task == "edit" else ("a red circle",)


def same(one, other):
    assert np.array_equal(np.asarray(one.images[0]), np.asarray(other.images[0]))
    assert (one.seeds, one.metadata) == (other.seeds, other.metadata) and len(one.images) == len(one.routing) == 1
    assert one.routing[0].tokens == other.routing[0].tokens
    assert np.array_equal(one.routing[0].weights, other.routing[0].weights)


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_a_drawing_of_the_worker_is_that_of_the_pipeline_with_all_its_steps(worker, pipe, monkeypatch, task):
    eager(monkeypatch)
    given = arguments(task)
    wanted = getattr(pipe, task)(*given, **KEYWORDS)
    *steps, out = PreviewStream(pipe, worker.call).run("me", task, *given, **KEYWORDS)
    same(out, wanted)
    assert [(step.done, step.steps) for step in steps] == [(done, 4) for done in range(1, 5)]
    assert steps[0].image.size == out.images[0].size and steps[-1].image is None
    assert worker.rows == [1] * 4  # steps of a batch and no call


def test_a_drawing_shares_the_steps_of_the_images_of_the_api(worker, pipe):
    entered, hold, seen = Event(), Event(), []
    worker.call(lambda _: (entered.set(), hold.wait(60)))
    assert entered.wait(60)
    asked = GenerationRequest(prompt="a blue star", num_inference_steps=9, seed=1)
    (job,) = sampling_jobs(pipe, asked, pipe.output_size())
    worker.submit(job)
    drawing = worker.call(Drawing("generate", arguments("generate"), KEYWORDS, lambda *step: seen.append(step[:2])))
    hold.set()
    out, alone = drawing.result(120), pipe.generate(*arguments("generate"), **KEYWORDS)
    assert job.future.result(120).seed == 1
    assert worker.rows == [1, *[2] * 4, *[1] * 5] and seen == [(done, 4) for done in range(1, 5)]
    assert np.abs(np.asarray(out.images[0], int) - np.asarray(alone.images[0], int)).mean() < 1
    assert out.metadata == alone.metadata


def test_a_drawing_that_is_stopped_leaves_the_batch(worker, pipe):
    stream = PreviewStream(pipe, worker.call)
    work = stream.run("me", "generate", "a red circle", **KEYWORDS | {"num_inference_steps": 1000})
    next(work)
    stream.stop("me", "generate")
    with pytest.raises(CancelledError):
        list(work)
    worker.call(lambda _: None).result(120)
    same(worker.call(Drawing("generate", ("a red circle",), KEYWORDS, lambda *_: True)).result(120),
         pipe.generate("a red circle", **KEYWORDS))
    assert len(worker.rows) < 1000


def test_a_drawing_that_must_run_alone_is_the_same(pipe):
    seen, given = [], arguments("generate")
    job = Drawing("generate", given, KEYWORDS, lambda *step: seen.append(step[:2])).job(pipe, None).as_call()
    (out,) = job.work(pipe, [job.inputs], lambda *_: True)
    same(out, pipe.generate(*given, **KEYWORDS))
    assert seen == [(done, 4) for done in range(1, 5)]
    assert Drawing("generate", given, KEYWORDS, print).job(SlowPipe(), None) is None  # whose images cannot join


def test_a_drawing_that_cannot_be_fails_with_its_reason(worker):
    drawing = Drawing("generate", ("an elephant",), KEYWORDS, lambda *_: True)
    with pytest.raises(InputError, match="elephant"):
        worker.call(drawing).result(120)
