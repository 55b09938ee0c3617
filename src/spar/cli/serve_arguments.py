"""Arguments of the verbs that serve."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import UseAppendAction

from spar.cli.arguments import Flag, ModelArguments
from spar.common.limits import MAX_IMAGES, check_range
from spar.serving.limits import DEFAULT_HOST, DEFAULT_PORT, MAX_BATCH, MAX_QUEUE, REQUEST_SECONDS, format_limits


@dataclass(frozen=True, kw_only=True)
class ListenArguments(ModelArguments):
    """Address and access of a server."""

    host: str = DEFAULT_HOST
    """Address to listen on; any but this machine's own needs a token."""
    port: int = DEFAULT_PORT
    """Port; 0 takes a free one."""
    also: UseAppendAction[tuple[str, ...]] = ()
    """PATH or NAME=PATH of a further model to serve beside --model, once for each; requests and page choose by name.
    Without --model and --also all bundled models are served."""
    token_file: Path | None = None
    """File with the required token; by default the variable SPAR_API_TOKEN, if set."""

    def __post_init__(self) -> None:
        check_range("--port", self.port, 0, 65535)


@dataclass(frozen=True, kw_only=True)
class ServeArguments(ListenArguments):  # noqa: D101  # its help names the limits: below
    max_batch: int = MAX_BATCH
    """Images of the model's own size in one batch."""
    max_queue: int = MAX_QUEUE
    """Images and chats that may wait; more are answered with 429."""
    timeout: int = REQUEST_SECONDS
    """Seconds that a request may wait and run."""
    ui: Flag = False
    """Serve the web page too, at /page (extra `ui`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--max-batch", self.max_batch, 1, MAX_IMAGES)
        check_range("--max-queue", self.max_queue, 1, MAX_IMAGES)
        check_range("--timeout", self.timeout, 1, 3600)


ServeArguments.__doc__ = f"""Serve the four tasks over HTTP, in the format of OpenAI's API: spar serve --port 8000

Paths: /v1/images/generations, /v1/images/edits, /v1/chat/completions, /v1/models, /v1/reconstruct, /health, /metrics,
/openapi.json. Limits of one request and of all requests together:

{format_limits()}
"""


@dataclass(frozen=True, kw_only=True)
class UiArguments(ListenArguments):
    """Serve the web page: spar ui"""

    port: int = 7860
    """Port; 0 takes a free one."""
