"""Whether an event that a browser sends is one that the page could send: its function, and a value for each input.

Gradio answers values of another type with an error of the server.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import gradio as gr

SESSION = re.compile(r"\w{1,64}", re.ASCII)
MAX_TEXT = 65536  # characters of a field; the pipeline's own limits are narrower
FILE_TEXTS = ("path", "url", "orig_name", "mime_type")


def is_event(blocks: gr.Blocks, body: Any) -> bool:
    """Whether the parsed body of an event fits the page."""
    if not isinstance(body, dict) or not isinstance(data := body.get("data"), list):
        return False
    number, session = body.get("fn_index"), body.get("session_hash")
    if type(number) is not int or number not in blocks.fns:
        return False
    if session is not None and not (isinstance(session, str) and SESSION.fullmatch(session)):
        return False
    if type(body.get("trigger_id")) not in (int, type(None)):
        return False
    inputs = blocks.fns[number].inputs
    return len(data) == len(inputs) and all(map(_fits, inputs, data))


def _fits(component: Any, value: Any) -> bool:
    """Whether a value is one of a component's."""
    kind = next((kind for kind in CHECKS if isinstance(component, kind)), None)
    return kind is not None and CHECKS[kind](component, value)


def _is_file(_: Any, value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("path"), str):
        return False
    texts = (value.get(name) for name in FILE_TEXTS)
    return (
        all(text is None or isinstance(text, str) for text in texts)
        and type(value.get("size")) in (int, type(None))
        and isinstance(value.get("is_stream", False), bool)
        and value.get("meta", {"_type": "gradio.FileData"}) == {"_type": "gradio.FileData"}
    )


def _is_number(_: Any, value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 2**53


def _is_text(_: Any, value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= MAX_TEXT)


def _is_row(component: Any, value: Any) -> bool:
    return type(value) is int and 0 <= value < len(component.samples)


def _is_choice(component: Any, value: Any) -> bool:
    return any(value == choice for _, choice in component.choices)


CHECKS: dict[type, Callable[[Any, Any], bool]] = {
    gr.Textbox: _is_text, gr.Slider: _is_number, gr.Image: _is_file, gr.Dataset: _is_row, gr.Radio: _is_choice,
    gr.State: lambda _, value: value is None,
}  # fmt: skip
