"""The HTTP server of API and page: uvicorn with limits of time for slow clients."""

import asyncio
import errno
import logging
import math
import socket
import time
from types import ModuleType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from spar.serving import limits

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows, which has no such limits
    resource = None

log = logging.getLogger(__name__)
FRESH_SECONDS = 1.0  # in which a client that means well sends its request's head
QUIET_SECONDS = 60  # between two lines of the log about file handles
MAX_LOGGED = 256  # characters of an address in the log


class HttpServer(uvicorn.Server):
    """uvicorn's server, whose log stays short when file handles run out."""

    _told = -float(QUIET_SECONDS)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._handle)
        await super().startup(sockets)

    def _handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Report an error, but not each connection that cannot be accepted: there are thousands in a second."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._told >= QUIET_SECONDS:
            self._told = time.monotonic()
            log.error("no file handle is left for further connections")


def raise_file_limit() -> None:
    """Let this process open as many files as MAX_CONNECTIONS need, where its user may."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.MAX_CONNECTIONS + limits.SPARE_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def max_connections() -> int:
    """MAX_CONNECTIONS, or fewer where this process may not open so many files."""
    files, _ = (-1, -1) if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 0:  # without limit
        return limits.MAX_CONNECTIONS
    return min(limits.MAX_CONNECTIONS, max(files - limits.SPARE_FILES, files // 2))


def _short(record: logging.LogRecord) -> bool:
    """Cut what a client wrote into a line of the log, which may be a quarter of a megabyte."""
    if isinstance(record.args, tuple):
        record.args = tuple(arg[:MAX_LOGGED] if isinstance(arg, str) else arg for arg in record.args)
    return True


def server_config(app: ASGIApp, shutdown_seconds: int) -> uvicorn.Config:
    """Configuration of uvicorn, with the seconds that running requests get when the server stops."""
    raise_file_limit()
    logging.getLogger("uvicorn.access").addFilter(_short)
    return uvicorn.Config(
        app, http=TimedH11Protocol, ws="none", lifespan="on", log_config=None, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=shutdown_seconds, backlog=limits.ACCEPTED_AT_ONCE,
    )  # fmt: skip


class TimedH11Protocol(H11Protocol):
    """uvicorn's protocol for HTTP/1.1, with a limit of HEADER_SECONDS for the head of a request.

    A client that reads nothing of its answer for READ_SECONDS is disconnected, since it would hold a slot, and so is
    one that keeps the server waiting for ANSWER_SECONDS in all: that long bytes of the answer are unsent. Seconds
    without any, as of a stream that its client keeps up with, make up for as many before them. Of more connections than
    `max_connections` the one is closed whose client has kept the server waiting longest, first for a request's head,
    then for its body: a new client that sends its request at once is answered however many wait.
    """

    _since = 0.0  # by the loop's clock: when the server began to wait for a head, or last got one
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _answered: object = None  # the cycle of the answer that is timed
    _until, _read = math.inf, 0.0  # when the answer must be read if bytes stay unsent from now; when none was unsent

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn's own
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # pause_writing is called as soon as anything is unsent
        self._since = self.loop.time()
        self._expect()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._idle() == (self._late is None):  # it begins or ends to wait for a head
            self._since = self.loop.time()
        if self._idle():
            self._expect()
        else:
            self._unexpect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unexpect()
        self._read_on()
        super().connection_lost(exc)

    def _make_room(self) -> None:
        """Close a connection if there are too many: this one, if the server waits for no earlier client."""
        ours = (one for one in self.connections if isinstance(one, TimedH11Protocol))
        # One that is closing keeps its file handle until its client has read the rest.
        present = [one for one in ours if not one.transport.is_closing() or one.transport.get_write_buffer_size()]
        if len(present) > max_connections():
            waiting = [one for one in present if one._idle() or one.cycle.more_body]
            late = self.loop.time() - FRESH_SECONDS
            min(waiting, key=lambda one: (not (one._idle() and one._since < late), one._since)).transport.abort()

    def _should_upgrade(self) -> bool:
        return False  # uvicorn's own writes two lines to the log for each request that asks

    def pause_writing(self) -> None:
        super().pause_writing()
        now = self.loop.time()
        if self._answered is not self.cycle:
            self._answered, self._until = self.cycle, math.inf
        self._until = min(self._until + 2 * (now - self._read), now + limits.ANSWER_SECONDS)
        self._await_reader(None)

    def resume_writing(self) -> None:
        self._read = self.loop.time()
        self._read_on()
        super().resume_writing()

    def _await_reader(self, left: int | None) -> None:
        """Check regularly that less is unsent than the `left` of the last check, None the first time, and the time."""
        now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if now >= self._until or (left is not None and unsent >= left):
            self.transport.abort()
        else:
            wait = min(limits.READ_SECONDS, self._until - now)
            self._unread = self.loop.call_later(wait, self._await_reader, unsent)

    def _read_on(self) -> None:
        if self._unread is not None:
            self._unread.cancel()

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(limits.HEADER_SECONDS, self._give_up)

    def _unexpect(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self._idle() and not self.transport.is_closing():
            self.transport.close()
