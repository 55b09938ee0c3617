"""The server process: API, worker, and perhaps the page."""

import asyncio
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future

import uvicorn
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from spar.inference.base import Pipeline
from spar.serving.app import create_app
from spar.serving.auth import host_names
from spar.serving.gate import MemoryBudget, RequestGate
from spar.serving.http import HttpServer, server_config
from spar.serving.limits import PAGE_PATH, SHUTDOWN_SECONDS
from spar.serving.worker import Worker


class PathDispatcher:
    """API and page in one server. Each has its own middleware: the token is a bearer token or a password."""

    def __init__(self, api: FastAPI, page: FastAPI) -> None:
        self.api, self.page, self._open = api, page, set[asyncio.Future]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path != PAGE_PATH and not path.startswith(f"{PAGE_PATH}/"):
            await self.api(scope, receive, send)
            return
        begun = False

        async def tracked(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        task = asyncio.ensure_future(self.page(scope, receive, tracked))
        self._open.add(task)
        await asyncio.wait({task})
        self._open.discard(task)
        if not task.cancelled():
            task.result()
        elif begun:
            await send({"type": "http.response.body"})

    def close_streams(self) -> None:
        """End the page's open requests, whose streams would delay the shutdown until its timeout."""
        for task in self._open:
            task.cancel()


class ApiServer(HttpServer):
    """The server, which ends a page's streams before it waits for running requests."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if isinstance(self.config.app, PathDispatcher):
            self.config.app.close_streams()
        await super().shutdown(sockets)


def build_server(
    pipe: Pipeline, *, host: str, token: str | None, max_batch: int, max_queue: int, timeout: float,
    build_page: Callable[[Callable[..., Future], RequestGate], FastAPI] | None = None, thread: Executor | None = None,
    others: Mapping[str, Pipeline] | None = None,
) -> uvicorn.Server:  # fmt: skip
    """Build a server that `run(sockets=[...])` starts; SIGINT and SIGTERM end it after the running requests.

    Args:
        timeout: as in `create_app`.
        thread: as in `Worker`.
        build_page: builds the web page's application at PAGE_PATH, given the worker's `call` and a gate; None for no
            page.
        others: further models to serve, by the names that requests choose them by.
    """
    worker = Worker(pipe, max_batch, max_queue, thread=thread, others=others or {})
    budget = MemoryBudget()
    page = build_page(worker.call, RequestGate(budget)) if build_page else None
    gate = RequestGate(budget)
    api = create_app(worker, token=token, hosts=host_names(host), timeout=timeout, page=page, gate=gate)
    return ApiServer(server_config(PathDispatcher(api, page) if page else api, SHUTDOWN_SECONDS))
