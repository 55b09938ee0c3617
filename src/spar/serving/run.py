"""The server as a process: uvicorn with our limits around the application."""

from typing import Any

import uvicorn

from spar.pipeline import SparPipeline
from spar.serving.access import is_local
from spar.serving.app import create_app
from spar.serving.gate import LOCAL_NAMES, Protocol
from spar.serving.limits import SHUTDOWN_SECONDS
from spar.serving.worker import Worker


def server_of(
    pipe: SparPipeline, *, host: str, token: str | None, max_batch: int, max_queue: int, **settings: Any
) -> uvicorn.Server:
    """A server that `run(sockets=[...])` starts; SIGINT and SIGTERM end it when what runs is done.

    Args:
        settings: `notes` and `timeout` of `create_app`.
    """
    worker = Worker(pipe, max_batch, max_queue)
    hosts = LOCAL_NAMES | {host} if is_local(host) else None
    app = create_app(worker, token=token, hosts=hosts, **settings)
    config = uvicorn.Config(
        app, http=Protocol, ws="none", lifespan="on", log_config=None, server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )  # fmt: skip
    return uvicorn.Server(config)
