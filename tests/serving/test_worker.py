"""The queue, with a pipeline that only records its calls."""

import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from spar.common.errors import Cancelled, InputError
from spar.serving.jobs import ChatJob, ImageJob
from spar.serving.worker import Busy, Stopped, Worker

SOON = 5  # seconds


class Scribe:
    """Work that records its calls, and blocks until `open` is set."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def __call__(self, pipe: Any, inputs: list[Any], step: Any) -> list[Any]:
        self.calls.append(list(inputs))
        self.entered.set()
        while not self.open.wait(0.01):
            if step(1, 2, None) is False:
                raise Cancelled
        if "bad" in inputs:
            raise InputError("bad")
        return [f"{value}!" for value in inputs]


@pytest.fixture
def scribe() -> Scribe:
    return Scribe()


@pytest.fixture
def worker():
    worker = Worker(object(), max_batch=4, max_queue=8)
    worker.start()
    yield worker
    worker.stop()


def hold(worker: Worker, scribe: Scribe) -> ImageJob:
    """A job that runs until `scribe.open` is set, so that others queue up after it."""
    scribe.open.clear()
    job = ImageJob(scribe, "first", "held")
    worker.submit(job)
    assert scribe.entered.wait(SOON)
    return job


def test_compatible_jobs_share_a_call_oldest_first_up_to_a_batch(worker, scribe):
    hold(worker, scribe)
    jobs = [ImageJob(scribe, key, f"{key}{i}") for i in range(3) for key in "ab"]
    worker.submit(*jobs)
    scribe.open.set()
    assert [job.future.result(SOON) for job in jobs] == [f"{job.inputs}!" for job in jobs]
    assert scribe.calls == [["held"], ["a0", "a1", "a2"], ["b0", "b1", "b2"]]


def test_a_batch_is_full_by_the_size_of_its_images(worker, scribe):
    hold(worker, scribe)
    jobs = [ImageJob(scribe, "k", i, weight=weight) for i, weight in enumerate((2, 4, 1, 1, 1))]
    worker.submit(*jobs)
    scribe.open.set()
    for job in jobs:
        job.future.result(SOON)
    assert scribe.calls[1:] == [[0, 2, 3], [1], [4]]


def test_a_full_queue_takes_all_of_a_request_or_nothing(worker, scribe):
    hold(worker, scribe)
    worker.submit(*(ImageJob(scribe, "k", i) for i in range(6)))
    with pytest.raises(Busy):
        worker.submit(*(ImageJob(scribe, "k", i) for i in range(3)))
    assert worker.waiting == 6
    worker.submit(ImageJob(scribe, "k", 6), ImageJob(scribe, "k", 7))
    scribe.open.set()


def test_who_leaves_frees_its_place_before_its_turn(worker, scribe):
    hold(worker, scribe)
    jobs = [ImageJob(scribe, "k", i) for i in range(3)]
    worker.submit(*jobs)
    jobs[1].future.cancel()
    assert worker.waiting == 2
    scribe.open.set()
    assert [jobs[0].future.result(SOON), jobs[2].future.result(SOON)] == ["0!", "2!"]
    assert scribe.calls[1] == [0, 2]


def test_a_batch_that_nobody_waits_for_stops_and_one_that_somebody_does_goes_on(worker, scribe):
    first = hold(worker, scribe)
    jobs = [ImageJob(scribe, "k", i) for i in range(2)]
    worker.submit(*jobs)
    first.future.cancel()  # `open` stays unset: only stopping lets the next batch begin
    deadline = time.monotonic() + SOON
    while len(scribe.calls) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    jobs[0].future.cancel()
    time.sleep(0.05)
    scribe.open.set()
    assert jobs[1].future.result(SOON) == "1!"


def test_nobody_pays_for_a_neighbours_fault(worker, scribe):
    hold(worker, scribe)
    jobs = [ImageJob(scribe, "k", value) for value in ("good", "bad", "fine")]
    worker.submit(*jobs)
    scribe.open.set()
    assert jobs[0].future.result(SOON) == "good!" and jobs[2].future.result(SOON) == "fine!"
    with pytest.raises(InputError, match="bad"):
        jobs[1].future.result(SOON)


def test_an_error_does_not_end_the_worker(worker, scribe):
    def fail(*_: Any) -> None:
        raise RuntimeError("lost")

    job = ImageJob(fail, "k", 0)
    worker.submit(job)
    with pytest.raises(RuntimeError):
        job.future.result(SOON)
    later = ImageJob(scribe, "k", 1)
    worker.submit(later)
    assert later.future.result(SOON) == "1!" and worker.alive


def test_a_function_of_the_pipeline_has_its_turn(worker):
    assert worker.call(lambda pipe: pipe is worker.pipe).result(SOON) is True


def test_a_long_chat_and_images_take_turns(worker, scribe):
    emitted: list[str] = []
    heard = threading.Event()
    calls_when_chat_ended: list[int] = []

    def words(pipe: Any):
        for i in range(100):
            yield str(i)
            if i == 50:
                heard.set()
                time.sleep(0.05)
        calls_when_chat_ended.append(len(scribe.calls))

    chat = ChatJob(words, emitted.append)
    worker.submit(chat)
    for i in range(3):
        job = ImageJob(scribe, "k", i)
        worker.submit(job)
        job.future.result(SOON)
    chat.future.result(SOON)
    assert emitted == [str(i) for i in range(100)] and heard.is_set()
    assert calls_when_chat_ended[0] >= 1  # images did not wait for its end


def test_two_chats_speak_by_turns_and_one_that_is_left_falls_silent(worker, scribe):
    hold(worker, scribe)
    emitted: list[str] = []
    endless = ChatJob(lambda pipe: iter(lambda: "a", None), emitted.append)
    short = ChatJob(lambda pipe: iter("bb"), emitted.append)
    worker.submit(endless, short)
    scribe.open.set()
    short.future.result(SOON)
    endless.future.cancel()
    job = ImageJob(scribe, "k", 0)
    worker.submit(job)
    job.future.result(SOON)
    count = len(emitted)
    worker.call(lambda pipe: None).result(SOON)
    assert len(emitted) == count and worker.waiting == 0


def test_a_chat_that_is_left_before_its_turn_frees_its_place_at_once(worker, scribe):
    hold(worker, scribe)
    chats = [ChatJob(lambda pipe: iter("a"), print) for _ in range(8)]
    worker.submit(*chats)
    for chat in chats:
        chat.future.cancel()
    assert worker.waiting == 0
    scribe.open.set()
    worker.call(lambda pipe: None).result(SOON)


def test_a_chat_that_fails_says_so_to_its_own_client(worker):
    def fail(pipe: Any):
        raise InputError("messages: expected more")

    chat = ChatJob(fail, print)
    worker.submit(chat)
    with pytest.raises(InputError, match="expected more"):
        chat.future.result(SOON)
    assert worker.alive and worker.waiting == 0


def test_stopping_gives_up_what_waits_and_what_runs(scribe):
    worker = Worker(object(), max_batch=4, max_queue=8)
    worker.start()
    running = hold(worker, scribe)
    waiting = ImageJob(scribe, "other", 1)
    worker.submit(waiting)
    worker.stop()
    for job in (running, waiting):
        with pytest.raises(CancelledError):
            job.future.result(0)
    with pytest.raises(Stopped):
        worker.submit(ImageJob(scribe, "k", 1))


def test_stopping_ends_a_function_that_watches_its_future():
    """As the page does, whose sampling goes on until its future is cancelled."""
    worker, entered, futures = Worker(object(), max_batch=4, max_queue=8), threading.Event(), []

    def draw(_: Any) -> None:
        entered.set()
        deadline = time.monotonic() + SOON
        while not futures[0].cancelled() and time.monotonic() < deadline:
            time.sleep(0.01)

    worker.start()
    hold = threading.Event()
    worker.call(lambda _: hold.wait(SOON))
    futures.append(worker.call(draw))
    hold.set()
    assert entered.wait(SOON)
    worker.stop()
    with pytest.raises(CancelledError):
        futures[0].result(0)


def test_work_with_too_few_results_fails_and_the_worker_goes_on(worker, scribe):
    hold(worker, scribe)
    jobs = [ImageJob(lambda _pipe, inputs, _step: inputs[1:], "k", value) for value in "ab"]
    same = jobs[0].work
    for one in jobs:
        one.work = same
    worker.submit(*jobs)
    scribe.open.set()
    for one in jobs:
        with pytest.raises(ValueError):
            one.future.result(SOON)
    later = ImageJob(scribe, "k", 1)
    worker.submit(later)
    assert later.future.result(SOON) == "1!" and worker.alive


def test_who_waits_for_a_worker_that_has_failed_itself_is_given_up(scribe, caplog):
    def lost(seconds: float, rows: int) -> None:
        raise RuntimeError("lost")

    worker = Worker(object(), max_batch=4, max_queue=8, observe=lost)
    worker.start()
    running, waiting, chat = hold(worker, scribe), ImageJob(scribe, "k", 1), ChatJob(lambda _: iter("a"), print)
    worker.submit(waiting, chat)
    scribe.open.set()
    assert running.future.result(SOON) == "held!"
    for job in (waiting, chat):
        with pytest.raises(CancelledError):
            job.future.result(SOON)
    assert not worker.alive and "the worker has failed" in caplog.text
    with pytest.raises(Stopped):
        worker.submit(ImageJob(scribe, "k", 2))
    worker.stop()


def test_after_a_batch_of_several_the_worker_waits_a_moment_for_as_many(worker, scribe, monkeypatch):
    monkeypatch.setattr("spar.serving.worker.GATHER_SECONDS", 60)
    for numbers in ((0, 1), (10, 11)):
        jobs = [ImageJob(scribe, "k", number) for number in numbers]
        if numbers[0]:
            worker.submit(jobs[0])
            time.sleep(0.05)
            worker.submit(jobs[1])
        else:
            worker.submit(*jobs)
        for job in jobs:
            job.future.result(SOON)
    assert scribe.calls == [[0, 1], [10, 11]]


def test_one_client_alone_never_waits_for_others(worker, scribe, monkeypatch):
    monkeypatch.setattr("spar.serving.worker.GATHER_SECONDS", 60)
    for number in range(3):
        job = ImageJob(scribe, "k", number)
        worker.submit(job)
        assert job.future.result(SOON) == f"{number}!"


def test_more_jobs_than_the_queue_ever_holds_are_refused_for_good(worker, scribe):
    with pytest.raises(InputError, match="n: expected at most 8, the length of the queue, got 9"):
        worker.submit(*(ImageJob(scribe, "k", i) for i in range(9)))
    assert worker.waiting == 0


class Tensor:
    """What a call holds on the device; `alive` has those that are not free."""


@pytest.fixture
def alive():
    gc.collect()
    gc.disable()
    yield weakref.WeakSet()
    gc.enable()


def test_a_failed_batch_is_free_before_its_jobs_run_one_by_one(worker, scribe, alive, monkeypatch):
    emptied, before = [], []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(len(alive)))
    hold(worker, scribe)

    def work(pipe: Any, inputs: list[Any], step: Any) -> list[Any]:
        before.append(len(alive))
        held = Tensor()
        alive.add(held)
        if len(inputs) > 1:
            raise torch.cuda.OutOfMemoryError("too much")
        return inputs

    jobs = [ImageJob(work, "k", value) for value in "ab"]
    worker.submit(*jobs)
    scribe.open.set()
    assert [job.future.result(SOON) for job in jobs] == ["a", "b"]
    assert before == [0, 0, 0] and emptied == [0]


@pytest.mark.parametrize("chat", [False, True])
def test_a_job_that_failed_keeps_nothing_of_its_call(worker, alive, chat):
    def fail(*_: Any) -> None:
        held = Tensor()
        alive.add(held)
        try:
            int("x")
        except ValueError as error:
            raise InputError("no") from error

    job = ChatJob(fail, print) if chat else ImageJob(fail, "k", 0)
    alive.add(job)
    worker.submit(job)
    future = job.future
    del job
    assert isinstance(future.exception(SOON), InputError)
    worker.call(lambda pipe: None).result(SOON)  # the turn of the job is over
    assert not alive
