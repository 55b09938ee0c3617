"""A running server with the bundled weights, on a free port of this machine."""

import base64
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import pytest


@contextmanager
def serving(pipe: Any, **settings: Any) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    from spar.serving.auth import listen
    from spar.serving.server import build_server

    listener = listen("127.0.0.1", 0)
    defaults = {"host": "127.0.0.1", "token": None, "max_batch": 8, "max_queue": 16}
    server = build_server(pipe, **{**defaults, "timeout": 60, **settings})
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def pipe() -> Any:
    from spar.inference.pipeline import SparPipeline

    return SparPipeline.from_pretrained()


@pytest.fixture(scope="session")
def address(pipe: Any) -> Iterator[str]:
    """A server that asks for no token."""
    with serving(pipe) as address:
        yield address


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    return serving


@pytest.fixture(scope="session")
def scene_url(pipe: Any) -> str:
    """A red circle on gray as a data: URL."""
    file = BytesIO()
    pipe.generate("a large red circle on a gray background", seed=0).images[0].save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
