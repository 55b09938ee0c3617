"""Limits on what reaches Gradio: an allow-list of routes, login, small requests of this page's own form, files of its
own folder, and no URLs.

Gradio serves more than this page needs: a proxy, streams, an API, files by path, inputs that it fetches from a URL, and
answers to pages of any origin. Its own checks follow these.
"""

import asyncio
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spar.serving.asgi import add_headers, content_type, host_name, is_foreign, replay_body
from spar.serving.auth import GuessLimit
from spar.serving.errors import ApiError
from spar.serving.gate import RequestGate, read_body

# Open to who has not logged in; /config and / check for themselves what they answer.
OPEN_ROUTES = re.compile(r"/(|config|theme\.css|favicon\.ico|login|logout|(assets|static)/[a-zA-Z0-9_./-]{0,200})/?")
ROUTES = re.compile(
    r"/gradio_api/(run/predict|queue/join|queue/data|upload|upload_progress|cancel|reset|heartbeat/\w{1,64}|file=.*)/?"
)
LOGIN = re.compile(r"/login/?")
EVENTS = ("/gradio_api/queue/join", "/gradio_api/run/predict")
UPLOAD = re.compile(r"/gradio_api/upload/?")
CALLS = ("/gradio_api/cancel", "/gradio_api/reset")  # whose body names an event
# Of Host and X-Forwarded-Host Gradio makes its own address, and an error of the server where it cannot.
ADDRESS = re.compile(r"(?:([\w.-]{0,255})|\[([\da-f:.]{2,45})\])(?::(\d{0,5}))?", re.ASCII | re.IGNORECASE)
RANGE = re.compile(rb"bytes=\d{1,15}-(\d{1,15})?")  # of others Gradio makes errors of the server
NAME = re.compile(r"[\w-]{1,64}", re.ASCII)
JSON = b"application/json"
MAX_REQUEST = 256 * 2**10  # bytes of a request that carries no image
MAX_LOGIN = 4 * 2**10  # bytes of a login, whose form is parsed before it is known who sends it, and of all open routes
MULTIPART = 64 * 2**10  # bytes around an image
MAX_BOUNDARY = 70  # bytes, by RFC 2046; of one above 256 Gradio makes an error of the server
MAX_QUERY = 256  # bytes; Gradio keeps the name of every upload that a browser asks about
MAX_FILES_BYTES = 2 * 2**30  # of all files of the cache together, which are kept for an hour
HEADERS = {
    # Gradio writes script and style into its page and compiles templates there; everything else is forbidden.
    b"content-security-policy": b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "
    b"frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


class HostMiddleware:
    """ASGI middleware that refuses requests under another name in Host than `names`: DNS rebinding sends one."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and host_name(scope) not in self.names:
            await PlainTextResponse("expected this server's own name in the header Host", 400)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class GradioGuardMiddleware:
    """ASGI middleware around Gradio's application.

    Args:
        app: Gradio's.
        files: the folder that files may be served from, Gradio's cache.
        max_file: bytes of an uploaded image.
        gate: counts the requests and their memory.
        logged_in: whether a request is of a visitor who has logged in, or of one who needs not.
        is_event: whether the body of an event is one that the page could send.
    """

    def __init__(
        self, app: ASGIApp, files: Path, max_file: int, *, gate: RequestGate | None = None,
        logged_in: Callable[[Scope], bool] = lambda _: True, is_event: Callable[[Any], bool] = lambda _: True,
    ) -> None:  # fmt: skip
        self.app, self.files, self.max_file = app, files.resolve(), max_file
        self.gate, self.logged_in, self.is_event = gate or RequestGate(), logged_in, is_event
        self.strangers = RequestGate(self.gate.budget)  # who has not logged in takes no place of who has
        self.guesses = GuessLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        send = add_headers(send, HEADERS.items())
        try:
            known = self.logged_in(scope)
            with (self.gate if known else self.strangers).enter() as lease:
                path = scope["path"].removeprefix(scope.get("root_path", ""))
                self._check(path, scope, known)
                parts = await read_body(scope, receive, lease, self._most(path))
                if path.startswith((*EVENTS, *CALLS)) and not self._is_own_request(path, scope, b"".join(parts)):
                    raise ApiError(400, "expected a request of this page")
                if UPLOAD.fullmatch(path):
                    await self._check_upload(scope, parts)
                if LOGIN.fullmatch(path):
                    send = self._slow_guesses(send)
                await self.app(scope, replay_body(parts, receive), send)
        except ClientDisconnect:
            pass
        except RuntimeError as error:  # Gradio refuses a stream that it has begun, of a session that it does not know
            if not isinstance(error.__cause__, HTTPException):
                raise
            await send({"type": "http.response.body"})
        except ApiError as error:
            await PlainTextResponse(str(error), error.status, error.headers)(scope, receive, send)

    def _check(self, path: str, scope: Scope, known: bool) -> None:
        """Refuse a request by its path, its headers, and whether its visitor has logged in, with ApiError."""
        if not (OPEN_ROUTES.fullmatch(path) or ROUTES.fullmatch(path)):
            raise ApiError(404, "not found")
        if path.startswith("/gradio_api/file=") and not self._is_own(path[17:]):
            raise ApiError(404, "not found")
        if is_foreign(scope):
            raise ApiError(403, "expected a request of this page")
        if not OPEN_ROUTES.fullmatch(path) and not known:
            raise ApiError(401, "expected a visitor who has logged in")
        if len(scope.get("query_string", b"")) > MAX_QUERY:
            raise ApiError(400, "expected a shorter address")
        if not all(RANGE.fullmatch(value) for name, value in scope["headers"] if name == b"range"):
            raise ApiError(400, "expected one range of bytes")
        own = [value for name, value in scope["headers"] if name in (b"host", b"x-forwarded-host")]
        if not all(map(_is_address, own)) or any(name == b"x-gradio-server" for name, _ in scope["headers"]):
            raise ApiError(400, "expected this server's own name in the headers")
        length = dict(scope["headers"]).get(b"content-length", b"")
        if scope["method"] not in ("GET", "HEAD") and not length.isdigit():
            raise ApiError(411, "expected a length")

    def _most(self, path: str) -> int:
        """Bytes of the largest body that a path may have."""
        if OPEN_ROUTES.fullmatch(path):
            return MAX_LOGIN
        return self.max_file + MULTIPART if UPLOAD.fullmatch(path) else MAX_REQUEST

    async def _check_upload(self, scope: Scope, parts: list[bytes]) -> None:
        """Refuse a form of anything but one file, and a file for which the cache has no room, with ApiError."""
        if not is_upload(content_type(scope), b"".join(parts)):
            raise ApiError(400, "expected a form of one file")
        if await asyncio.to_thread(_folder_bytes, self.files) + sum(map(len, parts)) > MAX_FILES_BYTES:
            raise ApiError(429, "too many images were given lately; please try again later")

    def _slow_guesses(self, send: Send) -> Send:
        """A `send` that holds the answer to a wrong password back, as `GuessLimit`."""

        async def slow(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                await self.guesses.wrong()
            await send(message)

        return slow

    def _is_own_request(self, path: str, scope: Scope, body: bytes) -> bool:
        """Whether a body of JSON is one of this page, all of whose files lie in our folder (and are no URL)."""
        if dict(scope["headers"]).get(b"content-type", JSON).partition(b";")[0].strip().lower() != JSON:
            return False
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            return False
        if path.startswith(CALLS):
            return isinstance(values, dict) and all(map(_is_plain, values.values()))
        return self.is_event(values) and all(isinstance(path, str) and self._is_own(path) for path in _paths(values))

    def _is_own(self, path: str) -> bool:
        try:
            return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self.files)
        except (OSError, ValueError):
            return False


def is_upload(content_type: bytes, body: bytes) -> bool:
    """Whether a body is the form of one file that the page sends. Gradio opens a file for each of up to a thousand."""
    boundary = b"--" + (parse_options_header(content_type)[1].get(b"boundary") or b"")
    if not 2 < len(boundary) <= 2 + MAX_BOUNDARY:
        return False
    head, end, _ = body[:MULTIPART].partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    fields = [line for line in lines if line.lower().startswith(b"content-disposition:")]
    named = parse_options_header(fields[0].partition(b":")[2])[1] if len(fields) == 1 else {}
    one = end != b"" and body.count(boundary) == 2 and boundary + b"--" in body[-len(boundary) - 4 :]
    return one and first == boundary and named.get(b"name") == b"files" and b"filename" in named


def _is_address(value: bytes) -> bool:
    """Whether the value of a header, of several the first one, is a name or an IP address, and perhaps a port."""
    found = ADDRESS.fullmatch(value.partition(b",")[0].strip().decode("latin-1"))
    if found is None or int(found[3] or 0) >= 2**16:
        return False
    try:
        if found[2] is not None:
            IPv6Address(found[2])
        elif re.fullmatch(r"\d+\.\d+\.\d+\.\d+", found[1]):
            IPv4Address(found[1])
    except AddressValueError:
        return False
    return True


def _folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, some of which may go meanwhile."""
    count = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                count += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return count


def _is_plain(value: Any) -> bool:
    """Whether a value may be that of a call: the name of a session or an event, or a number of a function."""
    if isinstance(value, str):
        return NAME.fullmatch(value) is not None
    return value is None or (type(value) is int and 0 <= value < 2**31)


def _paths(data: Any) -> Iterator[Any]:
    """Values of every "path" in nested data; a file's is never None."""
    if isinstance(data, dict):
        if data.get("path") is not None:
            yield data["path"]
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            yield from _paths(item)
