"""What a failed request held is free at once: nothing waits for the garbage collector, which may come late."""

import gc
import time
import weakref
from base64 import b64encode
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx2
import pytest
from PIL import Image

from spar.common.errors import InputError

TEXT = "what color is the circle ?"


@pytest.fixture
def held(monkeypatch) -> Iterator[list[weakref.ref]]:
    """The images of the requests of a test, during which no garbage is collected."""
    found: list[weakref.ref] = []

    def notes(pipe: Any, texts: Any = (), images: Any = ()) -> list[str]:
        found.extend(map(weakref.ref, images))
        return []

    monkeypatch.setattr("spar.serving.app.world_notes", notes)
    gc.collect()
    gc.disable()
    try:
        yield found
    finally:
        gc.enable()


def png() -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()


def refuse(*_: Any, **__: Any) -> None:
    """An error that comes of another one, as many do."""
    try:
        int("x")
    except ValueError as error:
        raise InputError("no") from error


def chat_that_fails(self: Any, messages: Any, **_: Any) -> Iterator[str]:
    yield from ["red"] * sum(len(turn["content"]) > 2 for turn in messages)  # with a third part, it fails on the way
    refuse()


def freed(held: list[weakref.ref]) -> bool:
    deadline = time.monotonic() + 5
    while any(one() is not None for one in held) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(held) and all(one() is None for one in held)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_a_chat_that_fails(address, pipe, held, monkeypatch, path, stream, later):
    monkeypatch.setattr(type(pipe), "chat", chat_that_fails)
    url = f"data:image/png;base64,{b64encode(png()).decode()}"
    if path == "responses":
        parts = [{"type": "input_image", "image_url": url}] + [{"type": "input_text", "text": TEXT}] * (1 + later)
        body = {"input": [{"role": "user", "content": parts}], "stream": stream}
    else:
        parts = [{"type": "image_url", "image_url": {"url": url}}] + [{"type": "text", "text": TEXT}] * (1 + later)
        body = {"messages": [{"role": "user", "content": parts}], "stream": stream}
    answer = httpx2.post(f"{address}/v1/{path}", json=body)
    assert answer.status_code == (200 if stream and later else 400) and "no" in answer.text
    assert freed(held)


@pytest.mark.parametrize("stream", ["false", "true"])
def test_an_edit_that_fails(address, pipe, held, monkeypatch, stream):
    monkeypatch.setattr(type(pipe), "join", refuse)
    form = {"files": {"image": png()}, "data": {"prompt": "remove the circle", "stream": stream}}
    assert httpx2.post(f"{address}/v1/images/edits", **form).status_code == 400
    assert freed(held)


def test_an_upload_that_is_no_image(address, held, monkeypatch):
    def decode(data: bytes) -> None:
        image = Image.new("RGB", (8, 8))
        held.append(weakref.ref(image))
        refuse(image)

    monkeypatch.setattr("spar.serving.image_io.open_training_image", decode)
    assert httpx2.post(f"{address}/v1/reconstruct", files={"image": png()}).status_code == 400
    assert freed(held)
