"""What bounds the requests of API and page alike: their number, the time and size of their bodies, and their memory."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope

from spar.serving import limits
from spar.serving.asgi import content_type
from spar.serving.errors import ApiError


class MemoryBudget:
    """The bytes that all requests of a server hold together, at most MAX_BUFFERED_BYTES; of any thread."""

    def __init__(self) -> None:
        self.held, self.lock = 0, RLock()  # the garbage collector may end a lease while its thread takes another

    @contextmanager
    def lease(self) -> Iterator["Lease"]:
        """A lease, which ends with the block."""
        lease = Lease(self)
        try:
            yield lease
        finally:
            lease.end()


class Lease:
    """What one request holds of a budget."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget, self.held, self.ended = budget, 0, False

    def reserve(self, count: int) -> None:
        """Count memory before it is taken.

        Raises:
            ApiError: 429 where there is no more.
            ClientDisconnect: the request has ended while a thread works for it; nobody would give the memory back.
        """
        with self.budget.lock:
            if self.ended:
                raise ClientDisconnect
            if self.budget.held + count > limits.MAX_BUFFERED_BYTES:
                raise ApiError(429, code="rate_limit_exceeded")
            self._take(count)

    def check(self, count: int) -> None:
        """Refuse, with ApiError 413, what with the rest of its request is more than all requests may hold: it would not
        fit however often it was sent.
        """
        if self.held + count > limits.MAX_BUFFERED_BYTES:
            raise ApiError(413)

    def release(self, count: int) -> None:
        """Give back memory that is free again before the request ends."""
        with self.budget.lock:
            self._take(-min(count, self.held))

    def end(self) -> None:
        """Give everything back, and take nothing any more."""
        with self.budget.lock:
            self.ended = True
            self._take(-self.held)

    def _take(self, count: int) -> None:
        self.held += count
        self.budget.held += count


class RequestGate:
    """Counts the requests of one application; several may share the `budget` of memory."""

    def __init__(self, budget: MemoryBudget | None = None) -> None:
        self.budget, self.requests = budget or MemoryBudget(), 0

    @contextmanager
    def enter(self, *, counted: bool = True) -> Iterator[Lease]:
        """Let one request in, with its lease; ApiError (429) where MAX_REQUESTS are in already.

        Args:
            counted: whether it takes one of the places; False for what must be answered in any case.
        """
        if counted and self.requests >= limits.MAX_REQUESTS:
            raise ApiError(429, code="rate_limit_exceeded")
        self.requests += counted
        try:
            with self.budget.lease() as lease:
                yield lease
        finally:
            self.requests -= counted


async def read_body(scope: Scope, receive: Receive, lease: Lease, most: int) -> list[bytes]:
    """Read a whole body in parts, with a lease on the copies that its parsing makes.

    Raises:
        ApiError: 413 or 408 as soon as it is larger than `most` bytes or too slow, 429 where memory is short.
        ClientDisconnect: the client is gone.
    """
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    if (length.isdigit() and len(length) < 20 and int(length) > most) or len(length) >= 20:
        raise ApiError(413)
    form = content_type(scope).lower().startswith(b"multipart/")  # its files go to the disk
    copies = limits.FORM_COPIES if form else limits.JSON_COPIES
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.BODY_SECONDS * max(1, most / limits.MAX_BODY_BYTES)):
            async for part in Request(scope, receive).stream():
                size += len(part)
                if size > most:
                    raise ApiError(413)
                lease.reserve(copies * len(part))
                if part:
                    parts.append(part)
    except TimeoutError:
        raise ApiError(408, headers={"Connection": "close"}) from None
    return parts
