"""What the middleware of the API and of the page share."""

from collections.abc import Callable, Iterable

from starlette.types import Message, Receive, Scope, Send


def is_foreign(scope: Scope) -> bool:
    """Whether a page of another origin sends this request; programs send no Origin."""
    headers = dict(scope["headers"])
    origin, host = headers.get(b"origin"), headers.get(b"host", b"")
    return origin is not None and origin.lower().partition(b"://")[1:] != (b"://", host.lower())


def replay_body(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns a body which was read already, then the later messages (the client's disconnection)."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

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
