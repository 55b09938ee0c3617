"""ASGI middleware before the routes: access checks and limits.

It checks the Host and Origin headers (a foreign page must not use a local server), the token, and the number of
requests. Then it reads the whole body, within limits of size and time, before any route does.
"""

import asyncio
import hmac
from collections.abc import Callable, Collection

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from spar.serving import limits
from spar.serving.asgi import add_headers, is_foreign, replay_body
from spar.serving.errors import ApiError
from spar.serving.metrics import ServerMetrics

OPEN_PATHS = frozenset({"/health"})
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))


class RequestGuardMiddleware:
    """`token`: bearer token, None for none; `hosts`: allowed names of Host if there is no token, None for any."""

    def __init__(
        self, app: ASGIApp, *, token: str | None, hosts: Collection[str] | None, metrics: ServerMetrics
    ) -> None:  # fmt: skip
        self.app, self.metrics, self.hosts = app, metrics, hosts
        self.bearer = None if token is None else f"Bearer {token}".encode()
        self.buffered, self.requests = 0, 0  # bytes in memory, and number, of the requests in flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with self.metrics.request(scope) as set_status:
            await self._request(scope, receive, add_headers(send, HEADERS, set_status))

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        def reserve(count: int) -> None:
            nonlocal taken
            if self.buffered + count > limits.MAX_BUFFERED_BYTES:
                raise ApiError(429, code="rate_limit_exceeded")
            self.buffered += count
            taken += count

        self.requests += 1
        try:
            self._check(scope)
            body = await _read(scope, receive, reserve)
            _check_values(scope, body)
            scope.setdefault("state", {})["reserve"] = reserve
            await self.app(scope, replay_body(body, receive), send)
        except ClientDisconnect:
            pass
        except ApiError as error:
            await error.response()(scope, receive, send)
        finally:
            self.requests -= 1
            self.buffered -= taken

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.bearer is None:  # with a token, a foreign page's requests fail since they lack it
            if self.hosts is not None and _name(headers.get(b"host", b"").decode("latin-1")) not in self.hosts:
                raise ApiError(421)
            if is_foreign(scope):
                raise ApiError(403)
        elif scope["path"] not in OPEN_PATHS and not hmac.compare_digest(
            headers.get(b"authorization", b""), self.bearer
        ):
            raise ApiError(401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self.requests > limits.MAX_REQUESTS:
            raise ApiError(429, code="rate_limit_exceeded")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ApiError(415, "expected a body that is not compressed")


def _name(host: str) -> str:
    """Name in a Host header, without the port; an IPv6 address keeps its brackets."""
    host = host.lower()
    return host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]


async def _read(scope: Scope, receive: Receive, reserve: Callable[[int], None]) -> bytes:
    """Read the whole body; raise as soon as it is too large or too slow."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if (length.isdigit() and len(length) < 20 and int(length) > limits.MAX_BODY_BYTES) or len(length) >= 20:
        raise ApiError(413)
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.BODY_SECONDS):
            async for part in Request(scope, receive).stream():
                size += len(part)
                if size > limits.MAX_BODY_BYTES:
                    raise ApiError(413)
                reserve(len(part))
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, headers={"Connection": "close"}) from None
    return b"".join(parts)


def _check_values(scope: Scope, body: bytes) -> None:
    """Refuse JSON with very many values before it is parsed; a form's commas are those of its files."""
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"").lower()
    if not kind.startswith(b"multipart/") and body.count(b",") > limits.MAX_VALUES:
        raise ApiError(413)


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
