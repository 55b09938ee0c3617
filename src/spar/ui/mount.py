"""Serving of the page, alone or mounted into another application, with GradioGuardMiddleware around it."""

import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from spar.inference.base import Pipeline
from spar.processing.images import MAX_BYTES
from spar.serving.auth import host_names
from spar.serving.http import server_config
from spar.serving.worker import Call
from spar.ui.app import build_page
from spar.ui.components import CSS, theme
from spar.ui.middleware import GradioGuardMiddleware


def mount_page(
    app: FastAPI, pipe: Pipeline, path: str = "/", *, token: str | None = None, call: Call | None = None,
    cache: Path, others: Mapping[str, Pipeline] | None = None,
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
    """
    os.environ["GRADIO_TEMP_DIR"] = str(cache)  # Gradio reads it when it creates components
    blocks = build_page(pipe, call, others)
    guard = Middleware(GradioGuardMiddleware, files=cache, max_file=MAX_BYTES)
    return gr.mount_gradio_app(
        app, blocks, path, app_kwargs={"middleware": [guard]}, max_file_size=MAX_BYTES, show_error=False,
        auth=_password(token) if token else None, auth_message="The password is the token that spar was started with.",
        footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
        theme=theme(), css=CSS,
    )  # fmt: skip


def _password(token: str) -> Callable[[str, str], bool]:
    return lambda _, password: secrets.compare_digest(password.encode(), token.encode())


def page_app(
    pipe: Pipeline, host: str, path: str = "/", call: Call | None = None, *, token: str | None, cache: Path,
    others: Mapping[str, Pipeline] | None = None,
) -> FastAPI:  # fmt: skip
    """Build an application with the page alone at `path`, reached at `host`; the rest as in `mount_page`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if (names := host_names(host)) is not None:  # against DNS rebinding
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=sorted(names))
    return mount_page(app, pipe, path, token=token, call=call, cache=cache, others=others)


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
        uvicorn.Server(server_config(app, shutdown_seconds=1)).run(sockets=[listener])
