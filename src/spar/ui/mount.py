"""The page on the network: into an application of others, or served alone, behind its doorman."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from spar.processing.images import MAX_BYTES
from spar.serving.auth import is_local
from spar.ui.app import build_page
from spar.ui.components import CSS, theme
from spar.ui.middleware import GradioGuardMiddleware

if TYPE_CHECKING:
    from spar.inference.pipeline import SparPipeline
    from spar.ui.preview_stream import Call


def mount_page(
    app: FastAPI, pipe: SparPipeline, path: str = "/", *, token: str | None = None, call: Call | None = None,
    cache: Path,
) -> FastAPI:  # fmt: skip
    """Put the page into an application.

    Args:
        app: gets the page.
        pipe, call: as in `build_page`.
        path: where.
        token: what a person must give as password, if any.
        cache: an empty folder of our own, for pictures that come and go.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(cache)  # Gradio's own way to be told; it is read when parts are made
    blocks = build_page(pipe, call)
    doorman = Middleware(GradioGuardMiddleware, files=cache, max_file=MAX_BYTES)
    return gr.mount_gradio_app(
        app, blocks, path, app_kwargs={"middleware": [doorman]}, max_file_size=MAX_BYTES, show_error=False,
        auth=_password(token) if token else None, auth_message="The password is the token that spar was started with.",
        footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
        theme=theme(), css=CSS,
    )  # fmt: skip


def _password(token: str) -> Callable[[str, str], bool]:
    return lambda _, password: secrets.compare_digest(password.encode(), token.encode())


def page_app(
    pipe: SparPipeline, host: str, path: str = "/", call: Call | None = None, *, token: str | None, cache: Path
) -> FastAPI:  # fmt: skip
    """An application with the page alone at `path`, reached at `host`; all else as in `mount_page`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if is_local(host):  # a page from elsewhere cannot reach us under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "["])  # [::1], cut at :
    return mount_page(app, pipe, path, token=token, call=call, cache=cache)


def serve_page(
    pipe: SparPipeline, listener: socket.socket, *, token: str | None = None, call: Call | None = None
) -> None:  # fmt: skip
    """Serve the page until interrupted.

    Args:
        pipe, token, call: as in `mount_page`.
        listener: of `access.listen`, after `access.check_access`.
    """
    with tempfile.TemporaryDirectory(prefix="spar-") as cache:
        app = page_app(pipe, listener.getsockname()[0], token=token, call=call, cache=Path(cache))
        config = uvicorn.Config(
            app, log_config=None, ws="none", server_header=False, proxy_headers=False, timeout_graceful_shutdown=1
        )
        uvicorn.Server(config).run(sockets=[listener])
