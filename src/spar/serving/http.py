"""The HTTP server of API and page: uvicorn with limits of time for slow clients."""

import asyncio

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from spar.serving import limits


def server_config(app: ASGIApp, shutdown_seconds: int) -> uvicorn.Config:
    """Configuration of uvicorn, with the seconds that running requests get when the server stops."""
    return uvicorn.Config(
        app, http=TimedH11Protocol, ws="none", lifespan="on", log_config=None, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=shutdown_seconds,
    )  # fmt: skip


class TimedH11Protocol(H11Protocol):
    """uvicorn's protocol for HTTP/1.1, with a limit of HEADER_SECONDS for the head of a request.

    A client that reads nothing of its answer for READ_SECONDS is disconnected, since it would hold a slot.
    """

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn's own
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # pause_writing is called as soon as anything is unsent
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._idle():
            self._expect()
        else:
            self._unexpect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unexpect()
        self._read_on()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader(None)

    def resume_writing(self) -> None:
        self._read_on()
        super().resume_writing()

    def _await_reader(self, left: int | None) -> None:
        """Check regularly that less is unsent than the `left` of the last check; None the first time."""
        now = self.transport.get_write_buffer_size()
        if left is not None and now >= left:
            self.transport.abort()
        else:
            self._unread = self.loop.call_later(limits.READ_SECONDS, self._await_reader, now)

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
