"""`/v1/responses`, the basic form of OpenAI's Responses: a conversation in, one message out, whole or streamed.

Nothing is stored: a request has the whole conversation as its input.
"""

import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from spar.inference.outputs import ChatOutput
from spar.serving import limits, schema
from spar.serving.completions import RunningAnswer
from spar.serving.errors import job_error
from spar.serving.schema import StrictModel, warnings_field
from spar.serving.streaming import next_piece

Words = Annotated[str, Field(max_length=limits.MAX_PROMPT_CHARACTERS)]
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class InputText(StrictModel):
    """Text of a message."""

    type: Literal["input_text"]
    text: Words


class InputImage(StrictModel):
    """Image of a message."""

    type: Literal["input_image"]
    image_url: str = Field(description="data:image/...;base64,... and no other URL: this server fetches nothing.")
    detail: schema.Detail | None = None


class OutputText(StrictModel):
    """Text of an earlier answer, as it came."""

    type: Literal["output_text"]
    text: Words
    annotations: schema.Nothing | None = None
    logprobs: schema.Nothing | None = None


Part = Annotated[InputText | InputImage | OutputText, Field(discriminator="type")]


class InputMessage(StrictModel):
    """A message of the input; what an answer's message has beside role and content is accepted and changes nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Words, Tag("words")]
        | Annotated[list[Part], Field(min_length=1, max_length=limits.MAX_PARTS), Tag("parts")],
        Discriminator(lambda content: "parts" if isinstance(content, list) else "words"),
    ]
    type: Literal["message"] | None = None
    id: schema.Name | None = None
    status: Status | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_message(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type") not in (None, "message"):
            raise ValueError("expected a whole message: this server stores no answers and calls no tools")
        return data


class Reasoning(StrictModel):
    """Settings of reasoning, which ask for none."""

    effort: Literal["none"] | None = None
    summary: Literal["auto"] | None = None


class TextOptions(StrictModel):
    """Settings of an answer's text."""

    format: schema.TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseRequest(schema.AnswerRequest):
    """Body of /v1/responses."""

    input: Annotated[
        Annotated[schema.Text, Tag("words")]
        | Annotated[list[InputMessage], Field(min_length=1, max_length=limits.MAX_MESSAGES), Tag("items")],
        Discriminator(lambda value: "items" if isinstance(value, list) else "words"),
    ]
    instructions: Words | None = Field(None, description="A system message before the input.")
    max_output_tokens: schema.AnswerTokens | None = None
    stream_options: schema.StreamOptions | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[Literal["reasoning.encrypted_content"]], Field(max_length=1)] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None


class OutputMessage(BaseModel):
    """The answer."""

    id: str
    type: Literal["message"] = "message"
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ResponseUsage(BaseModel):
    """Numbers of tokens."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    """A whole response; the settings that it repeats are those in effect."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    model: str
    output: list[OutputMessage]
    usage: ResponseUsage | None = None
    warnings: schema.Warnings = None


def chat_messages(body: ResponseRequest) -> list[schema.Message]:
    """The conversation as messages of `/v1/chat/completions`: the instructions, then the input."""
    messages = [] if body.instructions is None else [schema.Message(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        return [*messages, schema.Message(role="user", content=body.input)]
    for item in body.input:
        content = item.content if isinstance(item.content, str) else [_chat_part(part) for part in item.content]
        messages.append(schema.Message(role=item.role, content=content))
    return messages


def _chat_part(part: InputText | InputImage | OutputText) -> schema.TextPart | schema.ImagePart:
    if isinstance(part, InputImage):
        return schema.ImagePart(type="image_url", image_url=schema.ImageUrl(url=part.image_url, detail=part.detail))
    return schema.TextPart(type="text", text=part.text)


def response_object(answer: RunningAnswer, body: ResponseRequest, out: ChatOutput) -> dict[str, Any]:
    """A whole answer in OpenAI's form."""
    return _finished(_head(answer, body), _message(answer.text(), out), answer, out)


async def response_events(
    answer: RunningAnswer, body: ResponseRequest, piece: str | None, deadline: float
) -> AsyncIterator[str]:
    """Stream an answer, whose first piece is given, as OpenAI's events."""
    numbers = itertools.count()

    def event(kind: str, **fields: Any) -> str:
        data = json.dumps({"type": kind, "sequence_number": next(numbers), **fields})
        return f"event: {kind}\ndata: {data}\n\n"

    head, message, text = _head(answer, body), _message(""), ""
    part = {"item_id": message["id"], "output_index": 0, "content_index": 0}
    try:
        yield event("response.created", response=head)
        yield event("response.in_progress", response=head)
        yield event("response.output_item.added", output_index=0, item={**message, "content": []})
        yield event("response.content_part.added", **part, part=_output_text(""))
        while piece is not None:
            text += piece
            yield event("response.output_text.delta", **part, delta=piece, logprobs=[])
            piece = await next_piece(answer.pieces, answer.job, deadline)
        out = answer.job.future.result()
        message = {**_message(text, out), "id": message["id"]}
        yield event("response.output_text.done", **part, text=text, logprobs=[])
        yield event("response.content_part.done", **part, part=_output_text(text))
        yield event("response.output_item.done", output_index=0, item=message)
        whole = _finished(head, message, answer, out)
        yield event(f"response.{whole['status']}", response=whole)
    except Exception as error:  # the status has been sent already
        said = {"code": "server_error", "message": str(job_error(error))}
        yield event("response.failed", response={**head, "status": "failed", "error": said})


def _head(answer: RunningAnswer, body: ResponseRequest) -> dict[str, Any]:
    """A response without its answer; the settings that it repeats are those in effect."""
    return {
        "id": f"resp_{secrets.token_hex(12)}", "object": "response", "created_at": int(time.time()),
        "status": "in_progress", "error": None, "incomplete_details": None, "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens, "model": answer.model, "output": [], "parallel_tool_calls": True,
        "previous_response_id": None, "reasoning": {"effort": None, "summary": None}, "store": False,
        "temperature": body.temperature or 0, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
        "top_p": body.top_p or 1, "truncation": "disabled", "usage": None, "metadata": {},
    }  # fmt: skip


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(out: ChatOutput | None) -> Status:
    if out is None:
        return "in_progress"
    return "incomplete" if out.finish_reason == "length" else "completed"


def _message(text: str, out: ChatOutput | None = None) -> dict[str, Any]:
    """The message of an answer, of a finished one with its `out`."""
    content = [_output_text(text)]
    name = f"msg_{secrets.token_hex(12)}"
    return {"id": name, "type": "message", "status": _status(out), "role": "assistant", "content": content}


def _finished(head: dict[str, Any], message: dict[str, Any], answer: RunningAnswer, out: ChatOutput) -> dict[str, Any]:
    """A response with its answer."""
    usage = {
        "input_tokens": out.prompt_tokens, "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": out.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": out.prompt_tokens + out.completion_tokens,
    }  # fmt: skip
    cut = {"reason": "max_output_tokens"} if _status(out) == "incomplete" else None
    ended = {"status": _status(out), "incomplete_details": cut, "output": [message], "usage": usage}
    return {**head, **ended, **warnings_field(answer.warnings)}
