"""The API with the real `openai` package, over a real socket, against the pipeline itself."""

import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

PROMPT = "a large red circle on a gray background"
QUICK = {"num_inference_steps": 2}


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def opened(item) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(item.b64_json)))


def pixels(image: Image.Image) -> list:
    return np.asarray(image.convert("RGB")).tolist()


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def test_a_seed_gives_the_pipelines_own_pixels_and_notes(client, pipe):
    extra = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 2, "negative_prompt": "a blue star"}
    answer = client.images.generate(prompt=PROMPT, n=2, size="64x48", extra_body=extra)
    own = pipe.generate(
        PROMPT, height=48, width=64, num_images_per_prompt=2, seed=3, num_inference_steps=3, guidance_scale=2,
        negative_prompt="a blue star",
    )  # fmt: skip
    images = [opened(item) for item in answer.data]
    assert [pixels(image) for image in images] == [pixels(image) for image in own.images]
    assert [item.seed for item in answer.data] == [3, 4] and answer.size == "64x48"
    metadata = {"prompt": PROMPT, "seed": "4", "steps": "3", "guidance": "2.0", "model": "spar"}
    assert metadata.items() <= images[1].info.items()


def test_what_is_not_asked_for_is_the_models_own(client, pipe):
    answer = client.images.generate(prompt=PROMPT, model="spar", size="auto", extra_body={"seed": 1})
    assert pixels(opened(answer.data[0])) == pixels(pipe.generate(PROMPT, seed=1).images[0])


LAYOUT = "a large red circle on column two row three on a navy background"


@pytest.mark.parametrize("layout", [LAYOUT, True, False])
def test_a_layout_is_the_pipelines_own_and_openais_revised_prompt(client, pipe, layout):
    answer = client.images.generate(prompt=PROMPT, extra_body={"layout": layout, "seed": 3, **QUICK})
    own = pipe.generate(PROMPT, layout=layout, seed=3, num_inference_steps=2)
    image = opened(answer.data[0])
    assert pixels(image) == pixels(own.images[0])
    assert answer.data[0].revised_prompt == own.metadata[0].get("layout") == image.info.get("layout")
    assert (image.info.get("layout") == LAYOUT) is (layout == LAYOUT)


@pytest.mark.parametrize("layout", [LAYOUT, "true", "false"])
def test_an_edit_takes_a_layout_as_a_generation_does(client, pipe, layout):
    source, words = pipe.generate(PROMPT, seed=0).images[0], "remove the red circle"
    answer = client.images.edit(image=png(source), prompt=words, extra_body={"layout": layout, "seed": 3, **QUICK})
    given = {"true": True, "false": False}.get(layout, layout)
    own = pipe.edit(source, words, layout=given, seed=3, **QUICK)
    assert pixels(opened(answer.data[0])) == pixels(own.images[0])
    assert answer.data[0].revised_prompt == own.metadata[0].get("layout")


def test_layouts_and_prompts_alone_share_a_batch_in_which_each_is_its_own(client, pipe):
    bodies = [{"layout": layout, "seed": 3, **QUICK} for layout in (LAYOUT, False, None, True, f"{LAYOUT}.")]
    bodies[1]["guidance_scale"] = 2.5
    with ThreadPoolExecutor(5) as pool:
        answers = [*pool.map(lambda body: client.images.generate(prompt=PROMPT, extra_body=body), bodies)]
    for body, answer in zip(bodies, answers, strict=True):
        own = pipe.generate(PROMPT, **body)
        assert answer.data[0].revised_prompt == own.metadata[0].get("layout")
        levels = np.abs(np.array(pixels(opened(answer.data[0])), int) - np.array(pixels(own.images[0]), int))
        assert levels.mean() <= 1 and levels.max() <= (64 if "bfloat16" in str(pipe.dtype) else 1)


def test_no_seed_is_a_new_one_each_time_and_it_is_returned(client, pipe):
    first, second = (client.images.generate(prompt=PROMPT, extra_body=QUICK).data[0] for _ in range(2))
    assert first.seed != second.seed
    assert pixels(opened(first)) == pixels(pipe.generate(PROMPT, seed=first.seed, **QUICK).images[0])


@pytest.mark.slow
def test_an_image_does_not_depend_on_the_rest_of_its_batch(address, client, pipe):
    """Prompts of many lengths at once: they share calls, and each is what it is alone but for rounding."""
    prompts = [
        "star", "a green ring", "two yellow squares on a gray background", PROMPT, "three red triangles",
        "a large red circle to the left of a small blue star", "a small pink circle and a large white cross",
    ]  # fmt: skip
    batches = rows(address)
    with ThreadPoolExecutor(len(prompts)) as pool:
        jobs = [
            pool.submit(client.images.generate, prompt=prompt, extra_body={"seed": i, "num_inference_steps": 4})
            for i, prompt in enumerate(prompts)
        ]
        got = [pixels(opened(job.result().data[0])) for job in jobs]
    assert rows(address)[0] - batches[0] < 4 * len(prompts)  # some went together
    alone = [pipe.generate(prompt, seed=i, num_inference_steps=4).images[0] for i, prompt in enumerate(prompts)]
    for one, other in zip(got, alone, strict=True):
        levels = np.abs(np.array(one, int) - np.array(pixels(other), int))
        assert levels.mean() <= 1 and levels.max() <= (64 if "bfloat16" in str(pipe.dtype) else 1)


def rows(address: str) -> tuple[int, int]:
    """Steps of the sampler and other calls of the pipeline so far, and rows in them."""
    lines = dict(line.rsplit(" ", 1) for line in httpx2.get(f"{address}/metrics").text.splitlines() if line[0] != "#")
    return int(float(lines["spar_batch_rows_count"])), int(float(lines["spar_batch_rows_sum"]))


def test_an_edit_is_the_pipelines_own(client, pipe):
    source = pipe.generate(PROMPT, seed=0, height=64, width=96).images[0]
    words = "change the background to navy"
    answer = client.images.edit(
        image=("../../etc/passwd", png(source)), prompt=words, n=2, size="auto", extra_body={"seed": 7, **QUICK}
    )
    own = pipe.edit(source, words, num_images_per_prompt=2, seed=7, **QUICK)
    assert [pixels(opened(item)) for item in answer.data] == [pixels(image) for image in own.images]
    assert opened(answer.data[0]).info["instruction"] == words


def test_a_reconstruction_is_the_pipelines_own(address, pipe):
    source = pipe.generate(PROMPT, seed=0).images[0]
    answer = httpx2.post(f"{address}/v1/reconstruct", files={"image": ("x", png(source))}).json()
    image = Image.open(BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert pixels(image) == pixels(pipe.reconstruct(source).images[0]) and "seed" not in answer["data"][0]


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))


def test_what_is_outside_the_models_world_is_said_in_warnings(client, address, pipe):
    def warnings(answer) -> list[str]:
        return answer.model_extra.get("warnings", [])

    assert warnings(client.images.generate(prompt=PROMPT, extra_body=QUICK)) == []
    (said,) = warnings(client.images.generate(prompt="five red circles", extra_body=QUICK))
    assert said == "5 objects are asked for; the model has seen scenes of up to 4"
    scene = ("scene.png", png(pipe.generate(PROMPT, seed=0).images[0]))
    assert warnings(client.images.edit(image=scene, prompt="make the circle blue", extra_body=QUICK)) == []
    photo = ("photo.png", png(noise()))
    beside, unseen = warnings(client.images.edit(image=photo, prompt="make the circle gray", extra_body=QUICK))
    assert "no object of the model's world is gray" in beside and "cut to a square and resized from 80 x 48" in unseen
    for file, wanted in ((scene, None), (photo, [unseen])):
        assert httpx2.post(f"{address}/v1/reconstruct", files={"image": file}).json().get("warnings") == wanted


@pytest.mark.parametrize(("kind", "form"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_the_format_is_the_one_asked_for(client, kind, form):
    answer = client.images.generate(prompt=PROMPT, output_format=kind, extra_body=QUICK)
    assert opened(answer.data[0]).format == form and answer.output_format == kind


def test_models_are_listed_and_an_unknown_one_is_not_found(client):
    assert [model.id for model in client.models.list()] == ["spar"]
    assert client.models.retrieve("spar").id == "spar"
    for call in (
        lambda: client.models.retrieve("gpt-image-1"),
        lambda: client.images.generate(prompt=PROMPT, model="gpt-image-1"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("response_format", "url", "hosts no files"),
        ("size", "65x64", "multiple of 8"),
        ("size", "256x64", "from 8 to 128"),
        ("size", "99999x99999", "pixels"),
        ("size", "64", "WIDTHxHEIGHT"),
        ("quality", "best", "auto"),
        ("background", "transparent", "opaque"),
        ("style", "vivid", "no such field"),
        ("n", 9, "less than or equal to 8"),
        ("n", 0, "greater than or equal to 1"),
        ("prompt", "", "at least 1"),
        ("prompt", "an elephant", "unknown words elephant"),
        ("num_inference_steps", 101, "100"),
        ("guidance_scale", -1, "0"),
        ("seed", -1, "0"),
        ("negative_prompt", "an elephant", "unknown words elephant"),
        ("layout", "an elephant", "unknown words elephant"),
        ("layout", "", "at least 1"),
        ("layout", 3, "layout"),
        ("stream", "yes", "boolean"),
        ("partial_images", 2, "expected 0 without stream, got 2"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_openais_format(client, field, value, words):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": PROMPT, "extra_body": {field: value}})
    assert words in caught.value.message
    assert caught.value.type == "invalid_request_error"
    assert field in (caught.value.param or caught.value.message) or field == "size"


def test_fields_that_change_nothing_are_accepted(client):
    harmless = {"user": "me", "quality": "auto", "moderation": "low", "style": None, "stream": False}
    asked = {"prompt": PROMPT, "extra_body": {"seed": 3, **QUICK}}
    plain, same = client.images.generate(**asked), client.images.generate(**asked, **harmless)
    assert plain.data[0].b64_json == same.data[0].b64_json


def test_a_list_of_one_image_is_that_image(client, pipe):
    source = png(pipe.generate(PROMPT, seed=0).images[0])
    asked = {"prompt": "change the background to navy", "extra_body": {"seed": 7, **QUICK}}
    one, listed = (client.images.edit(image=image, stream=False, **asked) for image in (source, [source]))
    assert one.data[0].b64_json == listed.data[0].b64_json
    with pytest.raises(openai.BadRequestError, match="expected one reference image for each edit, got 2"):
        client.images.edit(image=[source, source], **asked)
    with pytest.raises(openai.BadRequestError, match="its image's own"):
        client.images.edit(image=source, size="128x64", **asked)


def test_a_full_queue_answers_429_and_says_when_to_come_back(pipe, serve, monkeypatch):
    entered, opened, step = threading.Event(), threading.Event(), type(pipe).step

    def held(*args, **keywords):
        entered.set()
        opened.wait(30)
        return step(*args, **keywords)

    monkeypatch.setattr(type(pipe), "step", held)
    with serve(pipe, max_queue=2) as address, ThreadPoolExecutor(2) as pool:

        def post(n: int) -> httpx2.Response:
            return httpx2.post(f"{address}/v1/images/generations", json={"prompt": PROMPT, "n": n, **QUICK}, timeout=60)

        running = pool.submit(post, 1)
        assert entered.wait(30)
        waiting = pool.submit(post, 2)
        while "spar_queue 2.0" not in httpx2.get(f"{address}/metrics").text:
            time.sleep(0.02)
        answer, never = post(1), post(3)
        opened.set()
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) > 0
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert never.status_code == 400 and "n: expected at most 2" in never.json()["error"]["message"]
        assert [one.result().status_code for one in (running, waiting)] == [200, 200]


def test_a_request_that_waits_too_long_gets_an_error(pipe, serve):
    with serve(pipe, timeout=0.05) as address:
        answer = httpx2.post(f"{address}/v1/images/generations", json={"prompt": PROMPT, "num_inference_steps": 100})
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error"


def test_a_client_that_leaves_frees_its_place(pipe, serve):
    """One row of 100 steps would block the next for seconds; it runs at once if all clients have disconnected."""
    with serve(pipe, max_queue=16) as address:
        url = f"{address}/v1/images/generations"
        slow = {"prompt": PROMPT, "n": 8, "num_inference_steps": 100, "size": "128x128"}
        for _ in range(2):
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(url, json=slow, timeout=0.3)
        start = time.monotonic()
        assert httpx2.post(url, json={"prompt": PROMPT, **QUICK}, timeout=60).status_code == 200
        assert time.monotonic() - start < 20
        deadline = time.monotonic() + 5
        while 'status="499"} 2.0' not in (metrics := httpx2.get(f"{address}/metrics").text):
            assert time.monotonic() < deadline, metrics
            time.sleep(0.05)


def test_stopping_finishes_what_runs(pipe, serve):
    got = []
    with serve(pipe) as address:
        before = rows(address)[0]
        body = {"prompt": PROMPT, "num_inference_steps": 20, "n": 4}
        thread = threading.Thread(
            target=lambda: got.append(httpx2.post(f"{address}/v1/images/generations", json=body, timeout=60))
        )
        thread.start()
        deadline = time.monotonic() + 5
        while "spar_requests_running 2.0" not in httpx2.get(f"{address}/metrics").text:
            assert time.monotonic() < deadline
        assert rows(address)[0] == before
    thread.join()
    assert got[0].status_code == 200 and len(got[0].json()["data"]) == 4
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{address}/health")


def test_health_and_metrics(address):
    assert httpx2.get(f"{address}/health").json() == {"status": "ok"}
    answer = httpx2.get(f"{address}/metrics")
    assert "process_resident_memory_bytes" in answer.text and answer.headers["Content-Type"].startswith("text/plain")
