"""ASGI middleware before the routes: access checks and limits.

It checks the Host and Origin headers (a foreign page must not use a local server), the token, and the number of
requests. Then it reads the whole body, within limits of size and time, before any route does.
"""

import asyncio
import hmac
from collections.abc import Callable, Collection

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from spar.serving import limits
from spar.serving.asgi import add_headers, is_foreign, replay_body
from spar.serving.errors import ApiError
from spar.serving.metrics import ServerMetrics

HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))


class RequestGuardMiddleware:
    """The guard, whose arguments are those of `create_app`.

    Routes get in their request's state: `reserve(bytes)`, which counts memory that the request will take, and the
    `deadline` of the answer by the loop's clock.
    """

    def __init__(
        self, app: ASGIApp, *, token: str | None, hosts: Collection[str] | None, timeout: float, metrics: ServerMetrics
    ) -> None:  # fmt: skip
        self.app, self.metrics, self.hosts, self.timeout = app, metrics, hosts, timeout
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
            deadline = asyncio.get_running_loop().time() + self.timeout
            scope.setdefault("state", {}).update(reserve=reserve, deadline=deadline)
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
        elif scope["path"] != "/health" and not hmac.compare_digest(headers.get(b"authorization", b""), self.bearer):
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
