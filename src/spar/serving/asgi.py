"""What the middleware of the API and of the page share."""

from collections.abc import Callable, Iterable

from starlette.types import Message, Receive, Scope, Send


def is_foreign(scope: Scope) -> bool:
    """Whether a page of another origin sends this request; programs send no Origin."""
    headers = dict(scope["headers"])
    origin, host = headers.get(b"origin"), headers.get(b"host", b"")
    return origin is not None and origin.lower().partition(b"://")[1:] != (b"://", host.lower())


def host_name(scope: Scope) -> str:
    """The name in a request's Host header, without the port; an IPv6 address keeps its brackets."""
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
    return host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]


def content_type(scope: Scope) -> bytes:
    """The first header Content-Type, which applications read."""
    return next((value for name, value in scope["headers"] if name == b"content-type"), b"")


def replay_body(parts: list[bytes], receive: Receive) -> Receive:
    """A `receive` that returns a body which was read already, then the later messages (the client's disconnection).

    Each part is forgotten with its message, so that a body is not held twice.
    """
    left: list[bytes] | None = parts[::-1] or [b""]
    parts.clear()

    async def replay() -> Message:
        nonlocal left
        if left is None:
            return await receive()
        body = left.pop()
        more = bool(left)
        left = left or None
        return {"type": "http.request", "body": body, "more_body": more}

    return replay


def add_headers(
    send: Send, added: Iterable[tuple[bytes, bytes]], observe: Callable[[int], None] = lambda _status: None
) -> Send:
    """A `send` that adds headers to the answer, whose status `observe` gets."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            observe(message["status"])
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return wrapped
