"""Batches that jobs join and leave between steps: who takes part in which step, and who fails, leaves or waits."""

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spar.common.errors import Cancelled, InputError
from spar.serving.batching import RunningRows, sampling_jobs
from spar.serving.jobs import ChatJob, ImageJob, JoiningJob
from spar.serving.schema import GenerationRequest
from spar.serving.worker import Worker

SOON = 10  # seconds
PROMPT = "a large red circle on a gray background"


class Walk:
    """The pipeline of a worker whose batches only count: what steps had which rows, and what was tried.

    A step with a number in `stops` waits at its end until it is let go, so that a test can act between two steps.
    """

    def __init__(self, *stops: int) -> None:
        self.steps: list[str] = []
        self.joined: list[str] = []
        self.tried: list[str] = []
        self.shown: list[str] = []
        self.stops = {stop: (threading.Event(), threading.Event()) for stop in stops}

    def step(self, rows: str) -> None:
        self.steps.append(rows)
        if len(self.steps) in self.stops:
            here, go = self.stops[len(self.steps)]
            here.set()
            assert go.wait(SOON)

    def at(self, stop: int) -> None:
        """Wait until a step is at its end."""
        assert self.stops[stop][0].wait(SOON)

    def go(self, stop: int) -> None:
        self.stops[stop][1].set()


class Rows:
    """A batch of a walk: an input is (name, steps); a name with a capital letter fails at the event of that letter."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.names, self.rest = walk, "", list[int]()

    def left(self) -> list[int]:
        return self.rest

    def join(self, inputs: list[Any]) -> None:
        names = "".join(name for name, _ in inputs)
        self.walk.joined.append(names)
        if "J" in names:
            raise InputError("cannot join")
        if "M" in names:
            raise torch.cuda.OutOfMemoryError("too much")
        self.names += names
        self.rest += [steps for _, steps in inputs]

    def step(self) -> None:
        if "S" in self.names and len(self.names) > 1:
            self.walk.tried.append(self.names)
            raise RuntimeError("too much at once")
        self.rest = [left - 1 for left in self.rest]
        self.walk.step(self.names)

    def previews(self) -> list[int]:
        return [row for row, left in enumerate(self.rest) if left == 1]

    def show(self, rows: list[int]) -> None:
        names = "".join(self.names[row] for row in rows)
        if "P" in names:
            raise InputError("cannot be shown")
        self.walk.shown.append(names)

    def finished(self) -> list[int]:
        return [row for row, left in enumerate(self.rest) if not left]

    def finish(self, rows: list[int]) -> list[str]:
        names = [self.names[row] for row in rows]
        self.walk.tried.append("".join(names))
        if "F" in names:
            raise InputError("cannot be decoded")
        self.leave(rows)
        return [f"{name}!" for name in names]

    def leave(self, rows: list[int]) -> None:
        kept = [row for row in range(len(self.rest)) if row not in rows]
        self.names, self.rest = "".join(self.names[row] for row in kept), [self.rest[row] for row in kept]


def work(walk: Walk, inputs: list[Any], step: Any) -> list[str]:
    walk.tried.append("".join(name for name, _ in inputs))
    if any(name == "S" for name, _ in inputs):
        raise RuntimeError("too much alone")
    return [f"{name} alone!" for name, _ in inputs]


def job(name: str, steps: int, weight: float = 1, batch: str = "", key: str = "") -> JoiningJob:
    return JoiningJob(work, key, (name, steps), weight, open=Rows, batch_key=batch, steps=steps)


class Clock:
    """Seconds that pass only where a test lets them: while none does, everything is free, and joining worth it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in ("worker", "running_batch"):
        monkeypatch.setattr(f"spar.serving.{module}.time", clock)
    return clock


@pytest.fixture
def begun(clock):
    """Starts a worker of a walk; all end with the test."""
    workers = []

    def begin(walk: Walk, **settings: Any) -> Worker:
        worker = Worker(walk, **{"max_batch": 4, "max_queue": 16, **settings})
        workers.append(worker)
        worker.start()
        return worker

    yield begin
    for worker in workers:
        worker.stop()


def results(*jobs: ImageJob) -> list[Any]:
    return [one.future.result(SOON) for one in jobs]


def test_a_job_that_arrives_joins_at_the_next_step(begun):
    walk = Walk(3)
    worker, first, second = begun(walk), job("a", 8), job("b", 8)
    worker.submit(first)
    walk.at(3)
    worker.submit(second)
    walk.go(3)
    assert results(first, second) == ["a!", "b!"]
    assert walk.steps == ["a"] * 3 + ["ab"] * 5 + ["b"] * 3  # 11 and not 16
    assert walk.joined == ["a", "b"]


def test_who_has_fewer_steps_leaves_early_and_is_answered_at_once(begun):
    walk = Walk(2, 5)
    worker, long, short = begun(walk), job("a", 6), job("b", 2)
    worker.submit(long)
    walk.at(2)
    worker.submit(short)
    walk.go(2)
    assert results(short) == ["b!"] and not long.future.done()
    walk.at(5)
    walk.go(5)
    assert results(long) == ["a!"] and walk.steps == ["a", "a", "ab", "ab", "a", "a"]


def test_a_batch_is_never_larger_than_allowed_and_places_go_to_the_oldest(begun):
    walk = Walk(1)
    worker, first = begun(walk, max_batch=3), job("a", 4)
    worker.submit(first)
    walk.at(1)
    later = [job(name, steps) for name, steps in zip("bcdef", (1, 2, 1, 1, 2), strict=True)]
    worker.submit(*later)
    walk.go(1)
    assert results(first, *later) == [f"{name}!" for name in "abcdef"]
    assert walk.steps == ["a", "abc", "acd", "aef", "f"]


def test_a_large_image_is_not_overtaken_until_there_is_room_for_it(begun):
    walk = Walk(1)
    worker, first = begun(walk), job("a", 2)
    worker.submit(first)
    walk.at(1)
    large, small, huge = job("b", 1, weight=4), job("c", 1), job("d", 1, weight=9)
    worker.submit(large, small, huge)
    walk.go(1)
    results(first, large, small, huge)
    assert walk.steps == ["a", "a", "b", "c", "d"]


def test_who_suits_the_running_batch_does_not_overtake_who_does_not(begun):
    walk = Walk(1)
    worker, first = begun(walk), job("a", 3, batch="x")
    worker.submit(first)
    walk.at(1)
    others = [job("b", 1, batch="x"), job("c", 2, batch="y"), job("d", 1, batch="x"), job("e", 1, batch="y")]
    worker.submit(*others)
    walk.go(1)
    results(first, *others)
    assert walk.steps == ["a", "ab", "a", "ce", "c", "d"]


def test_who_would_make_the_others_later_than_himself_earlier_waits_for_their_end(begun, clock, monkeypatch):
    """Steps that cost as much as their rows: only who has fewer steps gains more by joining than the other loses."""
    walk = Walk(4, 6, 11)
    step = walk.step

    def takes(rows: str) -> None:
        clock.now += len(rows)
        step(rows)

    monkeypatch.setattr(walk, "step", takes)
    worker, known = begun(walk), [job("a", 1), job("b", 2), job("c", 4)]
    worker.submit(*known)
    walk.at(4)
    equal = job("d", 6)
    worker.submit(equal)
    walk.go(4)
    results(*known)
    walk.at(6)
    other = job("e", 6)
    worker.submit(other)
    walk.go(6)
    walk.at(11)
    assert walk.steps == ["abc", "bc", "c", "c", *"dddddd", "e"]
    short = job("f", 1)
    worker.submit(short)
    walk.go(11)
    results(equal, other, short)
    assert walk.steps[11:] == ["ef", *"eeee"]


def test_jobs_of_one_key_join_together_and_of_others_apart(begun):
    walk = Walk(1)
    worker, first = begun(walk), job("a", 2)
    worker.submit(first)
    walk.at(1)
    later = [job("b", 1, key="x"), job("c", 1, key="y"), job("d", 1, key="x")]
    worker.submit(*later)
    walk.go(1)
    results(first, *later)
    assert walk.joined == ["a", "bd", "c"] and walk.steps == ["a", "abdc"]


def test_who_is_cancelled_leaves_at_the_next_step_and_the_others_go_on(begun):
    walk = Walk(2, 4)
    worker, jobs = begun(walk), [job("a", 4), job("b", 9), job("c", 5)]
    worker.submit(*jobs)
    walk.at(2)
    assert jobs[1].future.cancel()
    walk.go(2)
    walk.at(4)
    jobs[2].future.cancel()
    walk.go(4)
    assert results(jobs[0]) == ["a!"]
    worker.call(lambda _: None).result(SOON)
    assert walk.steps == ["abc", "abc", "ac", "ac"] and worker.waiting == 0


@pytest.mark.parametrize("letter", "JFP")
def test_nobody_pays_for_a_neighbour_that_cannot_join_be_shown_or_be_decoded(begun, letter):
    walk = Walk(1)
    worker, first = begun(walk), job("a", 3)
    worker.submit(first)
    walk.at(1)
    later = [job("b", 2), job(letter, 2), job("c", 2)]
    worker.submit(*later)
    walk.go(1)
    with pytest.raises(InputError, match="cannot"):
        later[1].future.result(SOON)
    assert results(first, later[0], later[2]) == ["a!", "b!", "c!"]
    assert walk.steps[-1] == {"J": "abc", "F": "abFc", "P": "abc"}[letter] and len(walk.steps) == 3
    assert "".join(walk.shown).count("c") == 1


def test_after_a_step_that_fails_each_job_runs_alone(begun):
    walk = Walk(1)
    worker, first = begun(walk), job("a", 3)
    worker.submit(first)
    walk.at(1)
    later = [job("S", 3), job("b", 2)]
    worker.submit(*later)
    walk.go(1)
    assert results(first, later[1]) == ["a alone!", "b alone!"]
    with pytest.raises(RuntimeError, match="alone"):
        later[0].future.result(SOON)
    assert walk.tried == ["aSb", "a", "S", "b"]
    again = job("c", 1)
    worker.submit(again)
    assert results(again) == ["c!"] and worker.alive


def test_who_finds_no_memory_beside_others_is_run_alone_and_who_finds_none_at_all_fails(begun):
    walk = Walk(1)
    worker, first = begun(walk), job("a", 3)
    worker.submit(first)
    walk.at(1)
    later = [job("b", 2), job("M", 2), job("c", 2)]
    worker.submit(*later)
    walk.go(1)
    assert results(first, *later) == ["a!", "b!", "M alone!", "c!"]
    assert walk.joined == ["a", "bMc", "b", "M", "c"] and walk.steps == ["a", "abc", "abc"]
    alone = job("M", 2)
    worker.submit(alone)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        alone.future.result(SOON)


def test_who_is_to_run_alone_waits_until_the_batch_has_ended_and_is_not_overtaken(begun):
    """Between two steps a batch keeps its memory, of which there was too little beside it."""
    walk, beside = Walk(1, 2), []

    def alone(walk: Walk, inputs: list[Any], step: Any) -> list[str]:
        beside.append(worker._batch)
        return work(walk, inputs, step)

    worker, first = begun(walk), job("a", 3)
    worker.submit(first)
    walk.at(1)
    large, small = job("M", 2), job("b", 1)
    large.work = alone
    worker.submit(large, small)
    walk.go(1)
    walk.at(2)
    later, call = job("c", 1), worker.call(lambda _: walk.tried.append("call"))
    worker.submit(later)
    walk.go(2)
    assert results(first, large, small, later) == ["a!", "M alone!", "b!", "c!"]
    call.result(SOON)
    assert beside == [None] and walk.steps == ["a", "ab", "a", "c"]
    assert [name for name in walk.tried if name != "call"] == ["b", "a", "M", "c"]


def test_who_is_to_run_alone_and_leaves_holds_nobody_up(begun):
    walk = Walk(1, 2)
    worker, first = begun(walk), job("a", 3)
    worker.submit(first)
    walk.at(1)
    large = job("M", 2)
    worker.submit(large)
    walk.go(1)
    walk.at(2)
    later = job("b", 1)
    worker.submit(later)
    large.future.cancel()
    walk.go(2)
    assert results(first, later) == ["a!", "b!"] and walk.steps == ["a", "a", "ab"]


def test_jobs_of_a_step_that_fails_take_turns_with_chats(begun):
    walk = Walk(1)
    worker, jobs = begun(walk), [job(name, 3) for name in "aSb"]
    chat = ChatJob(lambda _: iter("w" * 3 * 8), walk.tried.append)
    worker.submit(jobs[0])
    walk.at(1)
    worker.submit(*jobs[1:], chat)
    walk.go(1)
    results(jobs[0], jobs[2], chat)
    turn = ["w"] * 8
    assert walk.tried == [*turn, "aSb", "a", *turn, "S", *turn, "b"]


def test_a_job_that_is_to_run_alone_may_be_cancelled_and_stopped(begun, monkeypatch):
    monkeypatch.setattr(Rows, "step", lambda _: (_ for _ in ()).throw(RuntimeError("lost")))
    entered, gone = threading.Event(), threading.Event()

    def waits(walk: Walk, inputs: list[Any], step: Any) -> list[str]:
        walk.tried += [name for name, _ in inputs]
        entered.set()
        while step(1, 2, None):
            gone.wait(0.01)
        raise Cancelled

    walk = Walk()
    worker, jobs = begun(walk), [job(name, 3) for name in "abcd"]
    for one in jobs:
        one.work = waits
    worker.submit(*jobs)
    assert entered.wait(SOON) and worker.waiting == 3
    jobs[1].future.cancel()
    assert worker.waiting == 2
    jobs[0].future.cancel()
    worker.stop()
    for one in jobs:
        with pytest.raises(CancelledError):
            one.future.result(0)
    assert "b" not in walk.tried and "d" not in walk.tried


def test_stopping_gives_up_what_runs_and_what_waits(begun):
    walk = Walk(1)
    worker, running, waiting = begun(walk, max_batch=1), job("a", 9), job("b", 1)
    worker.submit(running, waiting)
    walk.at(1)
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    with pytest.raises(CancelledError):
        waiting.future.result(SOON)
    walk.go(1)
    stopping.join(SOON)
    with pytest.raises(CancelledError):
        running.future.result(0)
    assert walk.steps == ["a"] and not worker.alive


def test_calls_and_chats_have_half_of_the_time_beside_a_batch(begun, clock, monkeypatch):
    walk = Walk(1)
    turns: list[str] = []

    def takes(seconds: float, turn: str) -> None:
        clock.now += seconds
        turns.append(turn)

    monkeypatch.setattr(walk, "step", lambda rows, step=walk.step: takes(1, "s") or step(rows))
    worker, image = begun(walk), job("a", 12)
    worker.submit(image)
    walk.at(1)

    def words(_: Any) -> Any:
        for _ in range(2 * 8):  # tokens of a turn
            clock.now += 1 / 8
            yield "w"

    chats = [ChatJob(words, lambda _, name=name: turns.append(name)) for name in "xy"]
    calls = [ImageJob(lambda *_: [takes(3, "C")], number, None) for number in range(2)]
    worker.submit(*chats, *calls)
    walk.go(1)
    results(image, *chats, *calls)
    shown = "".join(turns).replace("x" * 8, "X").replace("y" * 8, "Y")
    # after a call of three seconds and a chat's turn of one come four steps; the chats speak by turns
    assert shown == "sCYssssCXssssYsXss"


def test_a_job_that_failed_keeps_nothing_of_its_batch(begun):
    alive: weakref.WeakSet = weakref.WeakSet()
    gc.collect()
    gc.disable()
    try:
        for letter in "JFPa":
            walk = Walk()
            worker, one = begun(walk), job(letter, 2)
            alive.add(one)
            worker.submit(one)
            future = one.future
            del one
            assert (future.exception(SOON) is None) is (letter == "a")
            worker.call(lambda _: None).result(SOON)
            assert not alive
    finally:
        gc.enable()


# ---- the pipeline itself ---------------------------------------------------------------------------------------------


def jobs_of(pipe: Any, seed: int, steps: int = 8, **fields: Any) -> list[ImageJob]:
    body = GenerationRequest(prompt=PROMPT, seed=seed, num_inference_steps=steps, **fields)
    return sampling_jobs(pipe, body, (64, 64))


def levels(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))


@pytest.fixture
def counted(pipe, monkeypatch):
    """The rows of every call of the denoiser by a worker, and what is to happen after so many."""
    calls, acts = list[int](), dict[int, Callable[[], None]]()
    step, velocity = type(pipe).step, type(pipe.model).velocity

    def counting(self, latent, *rest):
        calls.append(len(latent))
        return velocity(self, latent, *rest)

    def stepping(self, batch):
        state = step(self, batch)
        acts.pop(len(calls), lambda: None)()
        return state

    monkeypatch.setattr(type(pipe.model), "velocity", counting)
    monkeypatch.setattr(type(pipe), "step", stepping)
    return calls, acts


def test_two_images_of_eight_steps_the_second_after_three_take_eleven_calls_of_the_network(pipe, counted):
    calls, acts = counted
    worker = Worker(pipe)
    (first,), later = jobs_of(pipe, 1), [*jobs_of(pipe, 2), *jobs_of(pipe, 5, steps=3, negative_prompt="a blue star")]
    acts[3] = lambda: worker.submit(*later)
    worker.start()
    try:
        worker.submit(first)
        made = results(first, *later)
        assert calls == [2] * 3 + [6] * 3 + [4] * 2 + [2] * 3  # both branches of guidance
    finally:
        worker.stop()
    kinds = ({"seed": 1}, {"seed": 2}, {"seed": 5, "num_inference_steps": 3, "negative_prompt": "a blue star"})
    for one, kind in zip(made, kinds, strict=True):
        own = pipe.generate(PROMPT, **{"num_inference_steps": 8, **kind})
        gap = levels(one.image, own.images[0])
        assert gap.mean() <= 1 and gap.max() <= (64 if pipe.dtype == torch.bfloat16 else 1)
        assert one.metadata == own.metadata[0] and one.seed == own.seeds[0]


def test_previews_come_at_an_images_own_steps_and_are_its_own(pipe, counted):
    _, acts = counted
    worker, shown = Worker(pipe), list[Image.Image]()
    body = GenerationRequest(prompt=PROMPT, seed=2, num_inference_steps=4, stream=True, partial_images=1)
    (first,), (second,) = jobs_of(pipe, 1), sampling_jobs(pipe, body, (64, 64), show=shown.append)
    acts[1] = lambda: worker.submit(second)
    acts[2] = first.future.cancel
    worker.start()
    try:
        worker.submit(first)
        results(second)
    finally:
        worker.stop()
    states = []
    pipe.generate(PROMPT, seed=2, num_inference_steps=4, callback=lambda done, _, state: states.append(state))
    (preview,) = shown
    assert levels(preview, pipe.preview(states[1])[0]).mean() <= 1 < levels(preview, pipe.preview(states[0])[0]).mean()


def test_no_preview_comes_twice_where_a_step_after_it_fails(pipe, counted):
    _, acts = counted
    worker, shown = Worker(pipe), list[Image.Image]()
    body = GenerationRequest(prompt=PROMPT, seed=2, num_inference_steps=6, stream=True, partial_images=2)
    (first,), (second,) = jobs_of(pipe, 1, steps=6), sampling_jobs(pipe, body, (64, 64), show=shown.append)

    def fail() -> None:
        raise RuntimeError("too much at once")

    acts[3] = fail
    worker.start()
    try:
        worker.submit(first, second)
        results(first, second)
    finally:
        worker.stop()
    states = []
    pipe.generate(PROMPT, seed=2, num_inference_steps=6, callback=lambda done, _, state: states.append(state))
    assert len(shown) == 2
    for preview, done in zip(shown, (2, 4), strict=True):
        assert levels(preview, pipe.preview(states[done - 1])[0]).mean() <= 1


def test_an_offloaded_pipeline_gathers_its_images(pipe, monkeypatch):
    assert isinstance(jobs_of(pipe, 1)[0], JoiningJob)
    monkeypatch.setattr(pipe, "offload", True)
    one, other = jobs_of(pipe, 1) + jobs_of(pipe, 1, steps=9)
    assert not isinstance(one, JoiningJob) and not one.compatible(other)


def test_what_fails_to_join_leaves_the_batch_as_it_was(pipe):
    (one,), (other,) = jobs_of(pipe, 1, steps=2), jobs_of(pipe, 2, steps=2)
    rows = RunningRows(pipe, (64, 64), True)
    rows.join([one.inputs])
    with pytest.raises(InputError, match="unknown words elephant"):
        rows.join([type(other.inputs)(**{**vars(other.inputs), "prompt": "an elephant"})])
    assert len(rows.rows) == len(rows.batch) == 1
    rows.step()
    rows.step()
    assert rows.finished() == [0]
    (made,) = rows.finish([0])
    assert levels(made.image, pipe.generate(PROMPT, seed=1, num_inference_steps=2).images[0]).max() == 0
    assert len(rows.rows) == len(rows.batch) == 0


def test_rows_that_find_no_memory_to_leave_are_all_still_there(pipe):
    class Full:
        def __getitem__(self, rows: list[int]) -> Any:
            raise torch.OutOfMemoryError

    jobs = jobs_of(pipe, 1, steps=1) + jobs_of(pipe, 2, steps=1)
    rows = RunningRows(pipe, (64, 64), True)
    rows.join([job.inputs for job in jobs])
    rows.step()
    state, rows._state = rows._state, Full()
    for go in (rows.finish, rows.leave):
        with pytest.raises(torch.OutOfMemoryError):
            go([0])
        assert len(rows.rows) == len(rows.batch) == 2
    rows._state = state
    assert [made.seed for made in rows.finish([0, 1])] == [1, 2]
