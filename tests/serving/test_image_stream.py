"""Images as they come: OpenAI's client streams them from both systems, generated and edited."""

import base64
import json
import time
from io import BytesIO

import httpx2
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from spar.inference.dualtoken import DualTokenPipeline
from spar.serving.batching import ImageRow

PROMPT = "a red circle"


def client_of(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(address):
    return client_of(address)


def decoded(event):
    with Image.open(BytesIO(base64.b64decode(event.b64_json))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_partial_images_come_before_the_whole_one_which_is_that_of_a_plain_request(client):
    asked = {"prompt": PROMPT, "extra_body": {"seed": 3, "num_inference_steps": 6}}
    plain = client.images.generate(**asked).data[0].b64_json
    events = list(client.images.generate(**asked, stream=True, partial_images=2))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert events[-1].b64_json == plain and events[-1].size == "64x64" and events[-1].output_format == "png"
    first, second, last = (decoded(event) for event in events)
    assert np.abs(second - last).mean() < np.abs(first - last).mean()


def test_an_edit_streams_and_without_previews_only_the_whole_one_comes(client, pipe):
    file = BytesIO()
    pipe.generate("a red circle on a gray background", seed=0).images[0].save(file, format="PNG")
    asked = {"image": file.getvalue(), "prompt": "recolor the circle blue"}
    body = {"seed": 1, "num_inference_steps": 4}
    whole = client.images.edit(**asked, extra_body=body).data[0].b64_json
    events = list(client.images.edit(**asked, stream=True, partial_images=1, extra_body=body))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert events[-1].b64_json == whole
    alone = list(client.images.edit(**asked, stream=True, extra_body=body))
    assert [event.type for event in alone] == ["image_edit.completed"] and alone[0].b64_json == whole


def test_dualtoken_streams_its_rows(dual_run, serve):
    pipe = DualTokenPipeline.from_pretrained(dual_run.path / "model", dtype=torch.float32, device="cpu")
    rows = pipe.default_steps
    with serve(pipe) as address:
        stream = client_of(address).images.generate(
            prompt=PROMPT, stream=True, extra_body={"seed": 3, "partial_images": 32}
        )
        events = list(stream)
        with pytest.raises(openai.BadRequestError, match="unknown words elephant"):  # before any computation
            client_of(address).images.generate(prompt=PROMPT, extra_body={"layout": "an elephant"})
    *partial, last = events  # the newest ones, where a preview is encoded more slowly than rows are drawn
    assert {event.type for event in partial} == {"image_generation.partial_image"} and len(partial) < rows
    assert last.type == "image_generation.completed"
    assert np.array_equal(decoded(events[-1]), np.asarray(pipe.generate(PROMPT, seed=3).images[0]).astype(int))


def test_what_fails_before_the_first_event_gets_a_status(client):
    for wrong, words in (
        ({"prompt": "an elephant"}, "unknown words elephant"),
        ({"prompt": PROMPT, "n": 2}, "n: expected 1 with stream, got 2"),
        ({"prompt": PROMPT, "partial_images": 33}, "less than or equal to 32"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(**wrong, stream=True)
        assert words in caught.value.message


def test_a_client_that_leaves_frees_the_worker(address):
    body = {"prompt": PROMPT, "stream": True, "partial_images": 32, "num_inference_steps": 100, "seed": 1}
    with httpx2.stream("POST", f"{address}/v1/images/generations", json=body, timeout=60) as answer:
        line = next(line for line in answer.iter_lines() if line.startswith("data: "))
        assert json.loads(line.removeprefix("data: "))["type"] == "image_generation.partial_image"
    deadline = time.monotonic() + 60
    while "spar_queue 0.0\n" not in (text := httpx2.get(f"{address}/metrics", timeout=60).text):
        assert time.monotonic() < deadline, text
    quick = {"prompt": PROMPT, "num_inference_steps": 1}
    assert httpx2.post(f"{address}/v1/images/generations", json=quick, timeout=30).status_code == 200


@pytest.mark.parametrize(
    ("steps", "partial", "shown"),
    [(6, 2, {2, 4}), (4, 0, set()), (4, 9, {1, 2, 3}), (1, 3, set()), (20, 3, {5, 10, 15})],
)
def test_previews_are_evenly_spread_before_the_last_step(steps, partial, shown):
    row = ImageRow("", None, 0, None, (64, 64), steps, 1.0, partial, lambda _: None)
    assert row.shown_steps() == shown
    assert ImageRow("", None, 0, None, (64, 64), steps, 1.0, partial).shown_steps() == set()
