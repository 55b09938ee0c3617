"""ASGI middleware before the routes: access checks and limits.

It checks the Host and Origin headers (a foreign page must not use a local server), the token, and the number of
requests. Then it reads the whole body, within limits of size and time, before any route does.
"""

import asyncio
import hmac
from collections.abc import Collection

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from spar.serving import limits
from spar.serving.asgi import add_headers, content_type, host_name, is_foreign, replay_body
from spar.serving.auth import GuessLimit
from spar.serving.errors import ApiError
from spar.serving.gate import RequestGate, read_body
from spar.serving.metrics import ServerMetrics

HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))


class RequestGuardMiddleware:
    """The guard, whose arguments are those of `create_app`.

    Routes get in their request's state its `lease` on memory, and the `deadline` of the answer by the loop's clock.
    """

    def __init__(
        self, app: ASGIApp, *, token: str | None, hosts: Collection[str] | None, timeout: float, metrics: ServerMetrics,
        gate: RequestGate,
    ) -> None:  # fmt: skip
        self.app, self.metrics, self.hosts, self.timeout, self.gate = app, metrics, hosts, timeout, gate
        self.bearer = None if token is None else f"Bearer {token}".encode()
        self.guesses = GuessLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with self.metrics.request(scope) as set_status:
            await self._request(scope, receive, add_headers(send, HEADERS, set_status))

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        health = scope["path"] == "/health"  # has no body, and is answered however many others wait
        try:
            await self._check(scope)  # a wrong token waits there, and takes no place meanwhile
            with self.gate.enter(counted=not health) as lease:
                parts = [] if health else await read_body(scope, receive, lease, limits.MAX_BODY_BYTES)
                _check_values(scope, parts)
                deadline = asyncio.get_running_loop().time() + self.timeout
                scope.setdefault("state", {}).update(lease=lease, deadline=deadline)
                await self.app(scope, receive if health else replay_body(parts, receive), send)
        except ClientDisconnect:
            pass
        except ApiError as error:
            await error.response()(scope, receive, send)

    async def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.bearer is None:  # with a token, a foreign page's requests fail since they lack it
            if self.hosts is not None and host_name(scope) not in self.hosts:
                raise ApiError(421)
            if is_foreign(scope):
                raise ApiError(403)
        elif scope["path"] != "/health" and not hmac.compare_digest(headers.get(b"authorization", b""), self.bearer):
            await self.guesses.wrong()
            raise ApiError(401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ApiError(415, "expected a body that is not compressed")
        if b"urlencoded" in content_type(scope).lower():  # in any notation; its parsing takes a second for each MiB
            raise ApiError(415)


def _check_values(scope: Scope, parts: list[bytes]) -> None:
    """Refuse JSON with very many values before it is parsed; a form's commas are those of its files."""
    form = content_type(scope).lower().startswith(b"multipart/")
    if not form and sum(part.count(b",") for part in parts) > limits.MAX_VALUES:
        raise ApiError(413)
