"""Several models behind one server, of either system: requests choose by name."""

import base64
import io
from concurrent.futures import Future

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from spar.inference.dualtoken import DualTokenPipeline
from spar.serving.jobs import ImageJob
from spar.serving.worker import Worker


@pytest.fixture(scope="module")
def both(pipe, dual_run, serve):
    dual = DualTokenPipeline.from_pretrained(dual_run.path / "model", dtype=torch.float32, device="cpu")
    with serve(pipe, others={"dual": dual}) as address:
        yield address, dual


def drawn(address, **fields):
    body = {"prompt": "a red circle", "seed": 3, **fields}
    answer = httpx.post(f"{address}/v1/images/generations", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))


def test_the_models_are_listed_and_described(both):
    address, _ = both
    listed = httpx.get(f"{address}/v1/models").json()["data"]
    assert [one["id"] for one in listed] == ["spar", "dual"]
    assert httpx.get(f"{address}/v1/models/dual").json()["id"] == "dual"
    answer = httpx.get(f"{address}/v1/models/other")
    assert answer.status_code == 404 and "expected spar, dual" in answer.json()["error"]["message"]


def test_a_request_chooses_its_model(both, pipe):
    address, dual = both
    own = np.asarray(dual.generate("a red circle", seed=3).images[0])
    np.testing.assert_array_equal(drawn(address, model="dual"), own)
    first = drawn(address, model="spar")
    np.testing.assert_array_equal(first, drawn(address))                       # without a name, the first
    assert not np.array_equal(first, own)


def test_answers_name_the_model_and_come_from_it(both):
    address, dual = both
    question = {"role": "user", "content": "how many objects are there?"}
    for name in ("spar", "dual"):
        answer = httpx.post(
            f"{address}/v1/chat/completions", json={"messages": [question], "model": name, "max_tokens": 3}, timeout=60
        ).json()
        assert answer["model"] == name
        if name == "dual":
            content = answer["choices"][0]["message"]["content"]
            assert content == "".join(dual.chat([question], max_new_tokens=3))


def test_what_a_system_does_not_define_is_said(both):
    address, _ = both
    data = io.BytesIO()
    Image.new("RGB", (64, 64)).save(data, "PNG")
    form = {"prompt": "remove the circle", "model": "dual"}
    files = {"image": ("a.png", data.getvalue())}
    answer = httpx.post(f"{address}/v1/images/edits", data=form, files=files, timeout=60)
    assert answer.status_code == 400
    assert "DualToken does not define editing" in answer.json()["error"]["message"]
    other = httpx.post(f"{address}/v1/images/generations", json={"prompt": "a red circle", "model": "none"}, timeout=60)
    assert other.status_code == 404


def test_jobs_of_two_models_share_no_call():
    seen = []

    def work(pipe, inputs, step):
        seen.append((pipe, list(inputs)))
        return inputs

    worker = Worker("first", others={"second": "second"})
    jobs = [ImageJob(work, "key", number, model=model) for number, model in enumerate((None, "second", None, "second"))]
    worker._running = Future()                                                 # alive, but its thread does not run yet
    worker.submit(*jobs)
    while worker._waiting:
        worker._run(worker._take_batch())
    assert seen == [("first", [0, 2]), ("second", [1, 3])]
