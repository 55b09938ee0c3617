"""Errors in OpenAI's format. Messages are our own sentences; those of libraries go to the log."""

import itertools
from collections.abc import Mapping
from concurrent.futures import CancelledError
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from spar.common.errors import InputError
from spar.serving.jobs import forget_frames
from spar.serving.limits import RETRY_SECONDS
from spar.serving.worker import Busy, Stopped

MAX_SHOWN = 64
RETRY = {"Retry-After": str(RETRY_SECONDS)}
MESSAGES = {
    400: "expected a request that can be read",
    401: "expected the server's token as Authorization: Bearer TOKEN",
    403: "expected a request from this server's own address",
    404: "no such path; /docs lists all paths",
    405: "this path does not have this method",
    408: "the body of the request arrived too slowly",
    413: "the request is too large",
    415: "expected another content type: JSON or, with an image, a form",
    421: "expected this server's own name in the header Host",
    429: "the server is busy; try again",
    500: "the server failed; its log has more",
    503: "the request timed out; try again",
}
# Expected value of a field or for a kind of error, where pydantic's own message gives no reason.
EXPECTED_TYPES: dict[str | tuple[str, str], str] = {
    "response_format": "expected b64_json: this server hosts no files that a URL could lead to",
    "size": 'expected "WIDTHxHEIGHT" in pixels, or "auto"',
    "response_format.type": (TEXT_ONLY := "expected text: answers have no other form"),
    "text.format.type": TEXT_ONLY,
    "tools": (NO_TOOLS := "expected no tools: this model calls none"),
    "tool_choice": NO_TOOLS,
    "previous_response_id": (NOT_STORED := "expected the whole conversation as input: this server stores no answers"),
    "conversation": NOT_STORED,
    "stop": "expected no stop sequences",
    "logit_bias": "expected no biases",
    "union_tag_invalid": (PART := "expected a part of type text or image_url"),  # pydantic's repeats the whole input
    "union_tag_not_found": PART,
    ("image", "value_error"): "expected a file",
}


class ApiError(Exception):
    """An error answer: status, message, field and code."""

    def __init__(
        self, status: int, message: str | None = None, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message or MESSAGES[status])
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or (RETRY if status in (429, 503) else {}))

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def api_error(error: Exception) -> ApiError:
    """Error answer of an exception; 500 for an unknown one."""
    match error:
        case ApiError():
            return error
        case InputError():
            return ApiError(400, str(error))
        case Busy():
            return ApiError(429, code="rate_limit_exceeded")
        case Stopped() | CancelledError():  # the server is stopping
            return ApiError(503)
        case RequestValidationError():
            return _validation(error)
        case HTTPException():
            return ApiError(error.status_code if error.status_code in MESSAGES else 400, headers=error.headers)
        case _:
            return ApiError(500)


def job_error(error: Exception) -> ApiError:
    """Error answer of an exception that came out of a job's future, through frames that hold the job."""
    forget_frames(error)
    return api_error(error)


def _validation(error: RequestValidationError) -> ApiError:
    """The first error of a body, by the name of its field."""
    first = error.errors()[0]
    loc = first["loc"][1:]
    named = [part for before, part in itertools.pairwise(("", *loc)) if not _is_tag(before, part)]
    path = ".".join(map(str, named))
    param = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in path[:MAX_SHOWN]) or None
    if first["type"] in ("json_invalid", "model_attributes_type"):
        where = f"{param}: expected a JSON object" if named and first["type"] != "json_invalid" else None
        return ApiError(400, where or "expected a JSON object, sent as application/json", param=where and param)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: this server has no such field", param=param, code="unknown_parameter")
    sentence = first["msg"].removeprefix("Value error, ")
    kind, field = first["type"], param or ""
    if kind != "value_error":
        sentence = EXPECTED_TYPES.get(field) or EXPECTED_TYPES.get(kind) or sentence[:1].lower() + sentence[1:]
    sentence = EXPECTED_TYPES.get((field, kind)) or sentence
    return ApiError(400, f"{param}: {sentence}" if param else sentence, param=param)


def _is_tag(before: int | str, part: int | str) -> bool:
    """Whether a part of an error's location is pydantic's tag of a union, not a field."""
    kinds = ("text", "image_url", "input_text", "input_image", "output_text")
    return part in ("words", "parts", "items") or (isinstance(before, int) and part in kinds)


def add_handlers(app: FastAPI) -> None:
    """Answer every exception of a route in OpenAI's format."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    for kind in (ApiError, InputError, Busy, Stopped, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
