"""Answers of `/v1/chat/completions` in OpenAI's form, whole and streamed."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from spar.inference.outputs import ChatOutput
from spar.serving.errors import job_error
from spar.serving.jobs import ChatJob
from spar.serving.schema import warnings_field
from spar.serving.streaming import next_piece


@dataclass(frozen=True)
class RunningAnswer:
    """A chat's job, the pieces of its answer (None is their end), the id of its model, and what is said beside it."""

    job: ChatJob
    pieces: asyncio.Queue[str | None]
    model: str
    warnings: list[str]
    headers: dict[str, str]

    def text(self) -> str:
        """The text of a finished answer of which no piece was taken."""
        return "".join(self.pieces.get_nowait() or "" for _ in range(self.pieces.qsize()))


async def completion_chunks(
    answer: RunningAnswer, piece: str | None, usage: bool, deadline: float
) -> AsyncIterator[str]:  # fmt: skip
    """Stream an answer, whose first piece is given, as server-sent events."""
    shared = _head("chat.completion.chunk", answer.model)

    def chunk(delta: dict[str, str], finish: str | None = None, **more: list[str]) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _event({**shared, "choices": [choice], **({"usage": None} if usage else {}), **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        while piece is not None:
            yield chunk({"content": piece})
            piece = await next_piece(answer.pieces, answer.job, deadline)
        out = answer.job.future.result()
        yield chunk({}, out.finish_reason, **warnings_field(answer.warnings))
        if usage:
            yield _event({**shared, "choices": [], "usage": _usage(out)})
    except Exception as error:  # the status has been sent already
        yield _event(job_error(error).body())
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _head(kind: str, model: str) -> dict[str, Any]:
    """First fields of a completion, and of each chunk of a streamed one."""
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def _usage(out: ChatOutput) -> dict[str, int]:
    """Token counts of a finished answer, as OpenAI counts them."""
    total = out.prompt_tokens + out.completion_tokens
    return {"prompt_tokens": out.prompt_tokens, "completion_tokens": out.completion_tokens, "total_tokens": total}


def completion(answer: RunningAnswer, out: ChatOutput) -> dict[str, Any]:
    """A whole chat completion in OpenAI's form."""
    message = {"role": "assistant", "content": answer.text(), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": out.finish_reason}
    body = {**_head("chat.completion", answer.model), "choices": [choice], "usage": _usage(out)}
    return {**body, **warnings_field(answer.warnings)}
