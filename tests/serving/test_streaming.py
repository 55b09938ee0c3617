"""Streams end as they should whenever a client reads, and a job never outlives its answer."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from PIL import Image
from starlette.requests import ClientDisconnect

from spar.inference.outputs import ChatOutput
from spar.serving.batching import GeneratedImage
from spar.serving.completions import RunningAnswer, completion_chunks
from spar.serving.errors import ApiError
from spar.serving.image_stream import RunningImage, image_events
from spar.serving.jobs import ChatJob, ImageJob
from spar.serving.responses import ResponseRequest, response_events
from spar.serving.streaming import JobStream, next_piece

IMAGE = Image.new("RGB", (8, 8))
SECONDS = 0.05


def chat_job() -> ChatJob:
    return ChatJob(lambda pipe: iter(()), print)


def streamed(
    kind: str, job: ChatJob | ImageJob, queue: asyncio.Queue, deadline: float
) -> AsyncIterator[str] | AsyncIterator[bytes]:
    """The events of a job whose first piece is there already."""
    if kind == "image":
        return image_events(RunningImage(job, queue, "image_generation", "png", []), IMAGE, deadline)
    answer = RunningAnswer(job, queue, "spar", [], {})
    if kind == "responses":
        return response_events(answer, ResponseRequest(input="x"), "red", deadline)
    return completion_chunks(answer, "red", False, deadline)


def read_slowly(kind: str, *, finished: bool) -> list[str]:
    """What a client gets that reads on only after the deadline, of a job that has finished meanwhile or has not."""

    async def read() -> list[str]:
        queue: asyncio.Queue = asyncio.Queue()
        job = ImageJob(lambda *_: [], None, None) if kind == "image" else chat_job()
        events = streamed(kind, job, queue, asyncio.get_running_loop().time() + SECONDS)
        got = [await anext(events)]
        queue.put_nowait(IMAGE if kind == "image" else " circle")
        if finished:
            out = ChatOutput(1)
            out.finish_reason = "stop"
            job.future.set_result(GeneratedImage(IMAGE, {}) if kind == "image" else out)
            queue.put_nowait(None)
        await asyncio.sleep(2 * SECONDS)
        got += [piece async for piece in events]
        text = "".join(piece.decode() if isinstance(piece, bytes) else piece for piece in got)
        return [f"{event}\n\n" for event in text.split("\n\n")[:-1]]

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("kind", "late", "whole"),
    [
        ("completions", "the request timed out", '"finish_reason": "stop"'),
        ("responses", "the request timed out", "event: response.completed"),
        ("image", "the request timed out", "event: image_generation.completed"),
    ],
)
def test_a_client_that_reads_past_the_deadline_gets_the_end_or_an_error(kind, late, whole):
    for finished, wanted, other in ((False, late, whole), (True, whole, late)):
        events = read_slowly(kind, finished=finished)
        if kind == "completions":
            assert events.pop() == "data: [DONE]\n\n"
        assert wanted in events[-1] and other not in "".join(events)
        json.loads(events[-1].rpartition("data: ")[2])


def test_a_piece_is_waited_for_until_the_deadline():
    async def wait(*, done: bool, left: float, pieces: int) -> str:
        queue: asyncio.Queue = asyncio.Queue()
        for _ in range(pieces):
            queue.put_nowait("red")
        job = chat_job()
        if done:
            job.future.set_result(None)
        return await next_piece(queue, job, asyncio.get_running_loop().time() + left)

    assert asyncio.run(wait(done=True, left=-1, pieces=1)) == asyncio.run(wait(done=False, left=60, pieces=1)) == "red"
    for left, pieces in ((-1, 1), (SECONDS, 0)):
        with pytest.raises(ApiError, match="timed out"):
            asyncio.run(wait(done=False, left=left, pieces=pieces))


@pytest.mark.parametrize("version", ["2.3", "2.4"])
def test_a_client_that_leaves_before_the_first_event_ends_the_job(version):
    job = chat_job()

    async def events() -> AsyncIterator[str]:
        raise AssertionError
        yield ""

    async def receive() -> dict:
        return {"type": "http.disconnect"}

    async def send(_: dict) -> None:
        if version == "2.4":  # from then on a server says by an error that the client is gone
            raise OSError
        await asyncio.Event().wait()

    async def answer() -> None:
        scope = {"type": "http", "asgi": {"spec_version": version}}
        with suppress(ClientDisconnect):
            await JobStream(events(), job, {})(scope, receive, send)

    asyncio.run(answer())
    assert job.future.cancelled()
