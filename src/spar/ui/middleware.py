"""Limits on what reaches Gradio: an allow-list of routes, small requests, files of its own folder, and no URLs.

Gradio serves more than this page needs: a proxy, streams, an API, files by path, and inputs that it fetches from a URL.
Its own checks follow these.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from spar.serving.asgi import add_headers, is_foreign, replay_body

ROUTES = re.compile(
    r"/(|config|theme\.css|favicon\.ico|login|logout|(assets|static)/.*"
    r"|gradio_api/(run/predict|queue/join|queue/data|upload|upload_progress|cancel|reset|heartbeat/\w+|startup-events|file=.*))/?"
)
MAX_REQUEST = 256 * 2**10  # bytes of a request that carries no image
MULTIPART = 64 * 2**10  # bytes around an image
HEADERS = {
    # Gradio writes script and style into its page and compiles templates there; everything else is forbidden.
    b"content-security-policy": b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "
    b"frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


class GradioGuardMiddleware:
    """ASGI middleware around Gradio's application.

    Args:
        app: Gradio's.
        files: the folder that files may be served from, Gradio's cache.
        max_file: bytes of an uploaded image.
    """

    def __init__(self, app: ASGIApp, files: Path, max_file: int) -> None:
        self.app, self.files, self.max_file = app, files.resolve(), max_file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        refusal = self._refuse(path, scope)
        if refusal is None and path.startswith(("/gradio_api/queue/join", "/gradio_api/run/predict")):
            try:
                body = await Request(scope, receive).body()  # its length was checked, and the server enforces it
            except ClientDisconnect:
                return
            receive = replay_body(body, receive)
            if not self._own_files(body):
                refusal = PlainTextResponse("expected a request of this page", 400)
        await (refusal or self.app)(scope, receive, add_headers(send, HEADERS.items()))

    def _refuse(self, path: str, scope: Scope) -> PlainTextResponse | None:
        """Error answer to a request whose path or headers are refused, None otherwise."""
        if not ROUTES.fullmatch(path) or (path.startswith("/gradio_api/file=") and not self._is_own(path[17:])):
            return PlainTextResponse("not found", 404)
        if scope["method"] in ("GET", "HEAD"):
            return None
        if is_foreign(scope):
            return PlainTextResponse("expected a request of this page", 403)
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return PlainTextResponse("expected a length", 411)
        most = self.max_file + MULTIPART if path.startswith("/gradio_api/upload") else MAX_REQUEST
        return PlainTextResponse("too large", 413) if int(length) > most else None

    def _own_files(self, body: bytes) -> bool:
        """Whether every file of a request lies in our folder (and is no URL)."""
        try:
            return all(isinstance(path, str) and self._is_own(path) for path in _paths(json.loads(body)))
        except (ValueError, RecursionError):
            return False

    def _is_own(self, path: str) -> bool:
        try:
            return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self.files)
        except (OSError, ValueError):
            return False


def _paths(data: Any) -> Iterator[Any]:
    """Values of every "path" in nested data; a file's is never None."""
    if isinstance(data, dict):
        if data.get("path") is not None:
            yield data["path"]
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            yield from _paths(item)
