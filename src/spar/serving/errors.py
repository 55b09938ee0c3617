"""Errors as OpenAI's clients read them. Texts are fixed or our own sentences; what a library said goes to the log."""

import itertools
from collections.abc import Mapping
from concurrent.futures import CancelledError
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from spar.common.errors import InputError
from spar.serving.limits import RETRY_SECONDS
from spar.serving.worker import Busy, Stopped

MAX_SHOWN = 64
RETRY = {"Retry-After": str(RETRY_SECONDS)}
MESSAGES = {
    400: "expected a request that can be read",
    401: "expected the server's token as Authorization: Bearer TOKEN",
    403: "expected a request of this server's own address",
    404: "no such address; /openapi.json has those that there are",
    405: "no such method here",
    408: "the body of the request came too slowly",
    413: "the request is too large",
    415: "expected another content type: JSON or, with a picture, a form",
    421: "expected this server's own name in the header Host",
    429: "the server is busy; try again",
    500: "the server failed; its log has more",
    503: "the server did not get to it in time; try again",
}
# What a field wants, or one kind of error, where pydantic's own sentence does not say why.
EXPECTED_TYPES = {
    "response_format": "expected b64_json: this server hosts no files that a URL could lead to",
    "size": 'expected "WIDTHxHEIGHT" in pixels, or "auto"',
    "temperature": "expected 0: answers are greedy",
    ("size", "literal_error"): "expected auto: an edit has its picture's own proportions",
    "union_tag_invalid": (PART := "expected a part of type text or image_url"),  # pydantic's has all of what came
    "union_tag_not_found": PART,
    ("image", "value_error"): "expected a file",
}


class ApiError(Exception):
    """An answer other than the one that was asked for."""

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
    """The answer to an exception; what is nobody's known fault is a 500."""
    match error:
        case ApiError():
            return error
        case InputError():
            return ApiError(400, str(error))
        case Busy():
            return ApiError(429, code="rate_limit_exceeded")
        case Stopped() | CancelledError():  # the server is being stopped
            return ApiError(503)
        case RequestValidationError():
            return _validation(error)
        case HTTPException():
            return ApiError(error.status_code if error.status_code in MESSAGES else 400, headers=error.headers)
        case _:
            return ApiError(500)


def _validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, by the name of its field."""
    first = error.errors()[0]
    loc = first["loc"][1:]
    named = [part for before, part in itertools.pairwise(("", *loc)) if not _is_tag(before, part)]
    path = ".".join(map(str, named))
    param = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in path[:MAX_SHOWN]) or None
    if first["type"] in ("json_invalid", "model_attributes_type"):
        return ApiError(400, "expected a JSON object, sent as application/json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: this server has no such field", param=param, code="unknown_parameter")
    said = first["msg"].removeprefix("Value error, ")
    kind = first["type"]
    if kind != "value_error":
        said = EXPECTED_TYPES.get(param) or EXPECTED_TYPES.get(kind) or said[:1].lower() + said[1:]
    said = EXPECTED_TYPES.get((param, kind)) or said
    return ApiError(400, f"{param}: {said}" if param else said, param=param)


def _is_tag(before: int | str, part: int | str) -> bool:
    """Whether a part of an error's place is no field but what pydantic took a value for."""
    return part in ("words", "parts") or isinstance(before, int) and part in ("text", "image_url")


def add_handlers(app: FastAPI) -> None:
    """Every error of a route in the one shape."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    for kind in (ApiError, InputError, Busy, Stopped, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
