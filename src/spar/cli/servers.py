"""The verbs that serve: `spar serve` and `spar ui`."""

import logging
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar.checkpoints.bundled import BUNDLED_MODELS, DEFAULT_MODEL
from spar.cli import loading
from spar.cli.console import progress_bar
from spar.cli.loading import gc_disabled
from spar.cli.parsing import takes
from spar.cli.serve_arguments import ListenArguments, ServeArguments, UiArguments
from spar.common.errors import InputError
from spar.serving.limits import PAGE_PATH

if TYPE_CHECKING:
    import socket
    from concurrent.futures import Executor, Future

    from spar.inference.base import Pipeline


@takes(ServeArguments, "spar serve")
def serve(args: ServeArguments) -> int:
    """Serve the four tasks over HTTP, in the format of OpenAI's API."""
    from tempfile import TemporaryDirectory

    listener, token, thread, pipes = _listen_and_load(args, "serve", *(["ui"] if args.ui else []))
    pipe, *others = pipes.values()
    with TemporaryDirectory(prefix="spar-") if args.ui else nullcontext() as cache:
        with gc_disabled():
            from spar.serving.server import build_server

            build_page = None
            if cache:
                from spar.ui.mount import page_app

                build_page = partial(
                    page_app, pipe, args.host, PAGE_PATH, token=token, cache=Path(cache),
                    others=dict(zip([*pipes][1:], others, strict=True)),
                )  # fmt: skip
            server = build_server(
                pipe, token=token, host=args.host, max_batch=args.max_batch, max_queue=args.max_queue,
                timeout=args.timeout, build_page=build_page, thread=thread,
                others=dict(zip([*pipes][1:], others, strict=True)),
            )  # fmt: skip
        _log_to_stderr(logging.INFO)
        page = f", the page is {_address(listener)}{PAGE_PATH}" if args.ui else ""
        if args.ui:
            _clear_at_sigterm()
        print(f"serving on {_address(listener)}{page}", flush=True)
        server.run(sockets=[listener])
    return 0


def _listen_and_load(
    args: ListenArguments, *extras: str
) -> tuple["socket.socket", str | None, "Executor", dict[str, "Pipeline"]]:
    """Check the arguments first, then load the models, by their names, on the thread that will run them (for the reason
    see `Worker`).
    """
    from concurrent.futures import ThreadPoolExecutor

    from spar.serving.auth import check_access, listen, read_token

    token = read_token(args.token_file)
    for extra in extras:
        check_access(args.host, token, extra)
    listener, thread = listen(args.host, args.port), ThreadPoolExecutor(1)
    return listener, token, thread, thread.submit(_load_all, args).result()


def _load_all(args: ListenArguments) -> dict[str, "Pipeline"]:
    """The pipelines of --model and of each --also, by name; of all bundled models where neither is given.

    Raises:
        InputError: two have the same name, or a named one does not load. A bundled one that nobody named and that does
            not take the settings is left out, with a note.
    """
    from spar.serving.app import served_name

    first = loading.load_pipeline(args)
    pipes = {served_name(first): first}
    named = bool(args.also or args.model or args.adapter)
    for one in args.also if named else _other_bundled_folders():
        name, sign, path = one.partition("=") if not Path(one).exists() else ("", "", one)
        try:
            pipe = loading.load_pipeline(replace(args, model=Path(path if sign or not name else one), adapter=None))
        except InputError as error:
            if named:
                raise InputError(f"--also {one}: {error}") from error
            print(f"spar: note: the bundled model {Path(one).name} is not served: {error}", file=sys.stderr)
            continue
        name = name if sign else served_name(pipe)
        if name in pipes:
            raise InputError(f"--also {one}: a model named {name} is served already; give it another one: NAME={path}")
        pipes[name] = pipe
    return pipes


def _other_bundled_folders() -> list[str]:
    """The folders of the bundled models beside the default one, so that no local folder of their names hides them."""
    others = (folder for name, folder in BUNDLED_MODELS.items() if name != DEFAULT_MODEL)
    return [str(folder) for folder in others if (folder / "config.json").is_file()]


def _clear_at_sigterm() -> None:
    """Handle SIGTERM like Ctrl-C, so that the page's images are deleted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@takes(UiArguments, "spar ui")
def ui(args: UiArguments) -> int:
    """Serve the web page."""
    listener, token, thread, pipes = _listen_and_load(args, "ui")
    (_, pipe), *others = pipes.items()
    with progress_bar("loading the page"), gc_disabled():
        from spar.ui.mount import serve_page
    _log_to_stderr(logging.WARNING)
    _clear_at_sigterm()
    print(f"the page is {_address(listener)} (Ctrl-C ends it)", flush=True)

    def call(function: Callable[["Pipeline"], Any], model: str | None = None) -> "Future":
        return thread.submit(function, pipe if model is None else pipes[model])

    serve_page(pipe, listener, token=token, call=call, others=dict(others))
    return 0


def _log_to_stderr(level: int) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("spar", "uvicorn"):
        logging.getLogger(name).setLevel(level)


def _address(listener: "socket.socket") -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
