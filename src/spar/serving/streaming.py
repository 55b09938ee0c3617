"""What streamed answers share: how they wait for a job, and that no job outlives its answer."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from spar.serving.errors import ApiError
from spar.serving.jobs import ChatJob, ImageJob

T = TypeVar("T")


async def next_piece(pieces: asyncio.Queue[T], job: ChatJob | ImageJob, deadline: float) -> T:
    """The next piece of a job, the time of whose answer does not count while a client reads what is there.

    Raises:
        ApiError: 503 where the job has not ended by the deadline, by the loop's clock.
    """
    if job.future.done():
        return await pieces.get()
    if asyncio.get_running_loop().time() >= deadline:
        raise ApiError(503)
    try:
        async with asyncio.timeout_at(deadline):
            return await pieces.get()
    except TimeoutError:
        raise ApiError(503) from None


class JobStream(StreamingResponse):
    """Server-sent events of a job, which is cancelled at their end, even if the client leaves before the first."""

    def __init__(
        self, events: AsyncIterator[str] | AsyncIterator[bytes], job: ChatJob | ImageJob, headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.future.cancel()
