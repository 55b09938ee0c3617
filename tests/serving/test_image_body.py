"""Answers with images: their memory is counted until they are sent, and they are sent in pieces."""

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
from PIL import Image

from spar.serving import limits
from spar.serving.auth import listen
from spar.serving.batching import GeneratedImage
from spar.serving.errors import ApiError
from spar.serving.gate import Lease, MemoryBudget, RequestGate
from spar.serving.http import HttpServer, server_config
from spar.serving.image_body import PIECE_BYTES, image_object, images_response, made_bytes, reserve_images
from spar.serving.image_stream import RunningImage, add_preview, image_events
from spar.serving.jobs import ImageJob

PROMPT = "a red circle"
PIECE = PIECE_BYTES // 3 * 4  # of base64


def test_a_file_in_pieces_is_the_json_of_the_whole():
    for size in (0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 2):
        data, fields = os.urandom(size), {"seed": 7, "revised_prompt": 'a "red" circle\né'}
        for given in (fields, {}):
            pieces = [*image_object(data, given)]
            assert json.loads(b"".join(pieces)) == {"b64_json": base64.b64encode(data).decode(), **given}
            assert max(map(len, pieces)) <= max(PIECE, 200)


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_an_answer_is_that_of_the_json_of_all_and_no_piece_of_it_is_large():
    images = [GeneratedImage(noise(400), {"prompt": PROMPT}, seed) for seed in (4, 5)]
    response, sent = images_response(images, "png", ["five things"], {"Spar-Notes": "x"}), []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    asyncio.run(response({"type": "http", "asgi": {}}, receive, send))
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"] == b"application/json" and headers[b"spar-notes"] == b"x"
    body = json.loads(b"".join(message["body"] for message in sent[1:]))
    assert (body["output_format"], body["size"], body["warnings"]) == ("png", "400x400", ["five things"])
    assert [one["seed"] for one in body["data"]] == [4, 5]
    for one in body["data"]:
        with Image.open(BytesIO(base64.b64decode(one["b64_json"]))) as image:
            assert np.array_equal(np.asarray(image), np.asarray(noise(400))) and image.text["prompt"] == PROMPT
    assert max(len(message["body"]) for message in sent[1:]) == PIECE
    assert sent[-1]["body"] == b"" and not sent[-1]["more_body"]  # which waits until what was before it is sent


def test_what_is_made_is_counted_by_its_size_number_and_kind(monkeypatch):
    assert [made_bytes(3, (10, 20), kind) for kind in ("png", "jpeg", "webp")] == [4800, 3600, 9200]
    most = made_bytes(limits.MAX_N, (2048, 2048), "webp")  # of the largest request
    assert limits.FORM_COPIES * limits.MAX_UPLOAD_BYTES + limits.PIXEL_BYTES * limits.MAX_UPLOAD_PIXELS + most < 2**29
    monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", 2000)
    budget = MemoryBudget()
    lease, other = Lease(budget), Lease(budget)
    lease.reserve(400)
    reserve_images(lease, 1, (10, 20), "png")
    assert budget.held == 2000
    with pytest.raises(ApiError) as caught:
        reserve_images(other, 1, (1, 1), "png")
    assert caught.value.status == 429
    lease.end()
    lease = Lease(budget)
    lease.reserve(401)
    with pytest.raises(ApiError) as caught:
        reserve_images(lease, 1, (10, 20), "png")
    assert caught.value.status == 413 and lease.held == 401


# ---- requests --------------------------------------------------------------------------------------------------------


def post(address: str, **fields: Any) -> httpx2.Response:
    body = {"prompt": PROMPT, "num_inference_steps": 1, **fields}
    return httpx2.post(f"{address}/v1/images/generations", json=body, timeout=60)


@pytest.mark.parametrize(
    ("fields", "count"), [({}, 1), ({"n": 3}, 3), ({"stream": True}, 1), ({"stream": True, "partial_images": 2}, 3),
                          ({"stream": True, "partial_images": 32}, 4)],
)  # fmt: skip
def test_a_request_that_would_never_fit_gets_413_and_one_that_does_not_now_429(address, monkeypatch, fields, count):
    most = made_bytes(count, (64, 64), "png")
    monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", most)  # without the body's own bytes
    assert post(address, **fields).status_code == 413
    monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", most + 1000)
    assert post(address, **fields).status_code == 200
    where = urlsplit(address)
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection((where.hostname, where.port)) as connection:
        connection.sendall(head + b" " * 900)  # of another request's body, which is not whole
        deadline = time.monotonic() + 10
        while (answer := post(address, **fields)).status_code == 200 and time.monotonic() < deadline:
            pass
        assert answer.status_code == 429 and answer.headers["Retry-After"]


def test_an_edit_and_a_reconstruction_count_what_they_make(address, monkeypatch):
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    form = {"files": {"image": file.getvalue()}, "timeout": 60}
    edit = {"prompt": "remove the circle", "num_inference_steps": "1", "n": "2"}
    for path, data, count in (("images/edits", edit, 2), ("reconstruct", {}, 1)):
        monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", most := made_bytes(count, (64, 64), "png"))
        assert httpx2.post(f"{address}/v1/{path}", data=data, **form).status_code == 413
        monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", most + limits.OPAQUE_BYTES * 64**2)
        assert httpx2.post(f"{address}/v1/{path}", data=data, **form).status_code == 200


def test_an_answer_that_nobody_reads_stays_counted_and_one_that_is_read_is_whole(monkeypatch):
    """Sent as one body it lies in the connection's buffer, of which nobody knows."""
    data, gate = bytes(24 * 2**20), RequestGate()
    monkeypatch.setattr("spar.serving.image_body.encode_image", lambda *_: data)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        with gate.enter() as lease:
            lease.reserve(1)
            await images_response([GeneratedImage(Image.new("RGB", (8, 8)), {})], "png", [], {})(scope, receive, send)

    listener = listen("127.0.0.1", 0)
    server = HttpServer(server_config(app, shutdown_seconds=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with socket.create_connection(listener.getsockname()) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
            time.sleep(0.5)
            assert gate.budget.held == 1
            got = bytearray()
            while part := connection.recv(2**20):
                got += part
        assert got.count(b"A") > len(data) and got.endswith(b"]}\r\n0\r\n\r\n")
        deadline = time.monotonic() + 10
        while gate.budget.held and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gate.budget.held == 0
    finally:
        server.should_exit = True
        thread.join()


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_of_previews_that_nobody_reads_the_newest_are_kept():
    shown = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(10)]

    async def stream() -> list[dict[str, Any]]:
        job, previews = ImageJob(lambda *_: [], None, None), asyncio.Queue[Image.Image | None]()
        for preview in shown:
            add_preview(previews, preview)
            assert previews.qsize() <= limits.MAX_UNREAD
        job.future.set_result(GeneratedImage(Image.new("RGB", (8, 8), "blue"), {}, 7))
        add_preview(previews, None)
        events = image_events(RunningImage(job, previews, "image_generation", "png", []), await previews.get(), 0)
        text = b"".join([piece async for piece in events]).decode()
        return [json.loads(event.partition("data: ")[2]) for event in text.removesuffix("\n\n").split("\n\n")]

    *partial, last = asyncio.run(stream())
    colors = []
    for event in (*partial, last):
        with Image.open(BytesIO(base64.b64decode(event["b64_json"]))) as image:
            colors.append(image.getpixel((0, 0)))
    assert colors == [(7, 0, 0), (8, 0, 0), (9, 0, 0), (0, 0, 255)]
    assert [event["partial_image_index"] for event in partial] == [0, 1, 2]
    assert last["type"] == "image_generation.completed" and last["seed"] == 7


# ---- memory ----------------------------------------------------------------------------------------------------------

# Encodes noise, of which files are largest, in a process of its own for each kind; prints the most bytes of a pixel.
MEASURE = """
import json, os
from pathlib import Path
import numpy as np
from PIL import Image
from spar.inference.image_files import encode_image

def size(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

side, other = 1000, 2**20
noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
found = {}
for kind in ("png", "jpeg", "webp"):
    encode_image(noise.resize((8, 8)), kind, {})
    ours, theirs = os.pipe()
    if os.fork() == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = size("VmRSS")
        encode_image(noise, kind, {"prompt": "a red circle"})
        os.write(theirs, json.dumps((size("VmHWM") - before - other) / side**2).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        found[kind] = json.loads(pipe.read())
    os.wait()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory is Linux's")
def test_encoding_takes_no_more_memory_than_is_counted():
    own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is free goes back to the system at once
    out = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env=own)
    found = json.loads(out.stdout)
    counted = {kind: made_bytes(1, (1, 1), kind) - limits.PIXEL_BYTES for kind in limits.FILE_BYTES}
    assert found.keys() == counted.keys()
    assert {kind: taken for kind, taken in found.items() if taken > counted[kind]} == {}
    assert found["webp"] > counted["webp"] / 2  # and not many times what is needed
