"""Serving of the page, alone or mounted into another application, with GradioGuardMiddleware around it."""

import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from gradio.routes import App as GradioApp
from starlette.requests import Request
from starlette.routing import Mount
from starlette.types import Scope

from spar.inference.base import Pipeline
from spar.processing.images import MAX_BYTES
from spar.serving.auth import host_names
from spar.serving.gate import RequestGate
from spar.serving.http import HttpServer, server_config
from spar.serving.worker import Call
from spar.ui.app import build_page
from spar.ui.components import CSS, theme
from spar.ui.events import is_event
from spar.ui.middleware import GradioGuardMiddleware, HostMiddleware


def mount_page(
    app: FastAPI, pipe: Pipeline, path: str = "/", *, token: str | None = None, call: Call | None = None,
    cache: Path, others: Mapping[str, Pipeline] | None = None, gate: RequestGate | None = None,
) -> FastAPI:  # fmt: skip
    """Mount the page into an application.

    Args:
        app: the application.
        pipe: as in `build_page`.
        path: where to mount it.
        token: the password, if any.
        call: as in `build_page`.
        cache: an empty folder of our own, for temporary images.
        others: as in `build_page`.
        gate: counts the requests and their memory, that of opened images too; by default one of the page's own.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(cache)  # Gradio reads it when it creates components
    gate = gate or RequestGate()
    blocks = build_page(pipe, call, others, gate.budget)
    gr.mount_gradio_app(
        app, blocks, path, max_file_size=MAX_BYTES, show_error=False,
        auth=_password(token) if token else None, auth_message="The password is the token that spar was started with.",
        footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
        theme=theme(), css=CSS,
    )  # fmt: skip
    for route in app.routes:
        if isinstance(route, Mount) and isinstance(own := route.app, GradioApp) and own.get_blocks() is blocks:
            route.app = GradioGuardMiddleware(  # around Gradio's own middleware too, which answers other pages
                own, cache, MAX_BYTES, gate=gate, logged_in=partial(_logged_in, own),
                is_event=partial(is_event, blocks),
            )  # fmt: skip
            return app
    raise RuntimeError("expected Gradio to mount its application, found none")


def _logged_in(app: GradioApp, scope: Scope) -> bool:
    """Whether a request has the cookie that Gradio gave after the right password, or needs none."""
    cookies = Request(scope).cookies
    tokens = (cookies.get(f"access-token-{kind}{app.cookie_id}") for kind in ("", "unsecure-"))
    return app.auth is None or any(token in app.tokens for token in tokens)


def _password(token: str) -> Callable[[str, str], bool]:
    return lambda _, password: secrets.compare_digest(password.encode(), token.encode())


def page_app(
    pipe: Pipeline, host: str, path: str = "/", call: Call | None = None, gate: RequestGate | None = None, *,
    token: str | None, cache: Path, others: Mapping[str, Pipeline] | None = None,
) -> FastAPI:  # fmt: skip
    """Build an application with the page alone at `path`, reached at `host`; the rest as in `mount_page`.

    Without a token only requests that name this machine are answered: DNS rebinding sends others. With one they log in
    under any name, as a reverse proxy passes it on.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if token is None and (names := host_names(host)) is not None:
        app.add_middleware(HostMiddleware, names=names)
    return mount_page(app, pipe, path, token=token, call=call, cache=cache, others=others, gate=gate)


def serve_page(
    pipe: Pipeline, listener: socket.socket, *, token: str | None = None, call: Call | None = None,
    others: Mapping[str, Pipeline] | None = None,
) -> None:  # fmt: skip
    """Serve the page until interrupted.

    Args:
        pipe: as in `mount_page`.
        listener: from `auth.listen`, after `auth.check_access`.
        token: as in `mount_page`.
        call: as in `mount_page`.
        others: as in `mount_page`.
    """
    with tempfile.TemporaryDirectory(prefix="spar-") as cache:
        host = listener.getsockname()[0]
        app = page_app(pipe, host, token=token, call=call, cache=Path(cache), others=others)
        HttpServer(server_config(app, shutdown_seconds=1)).run(sockets=[listener])
