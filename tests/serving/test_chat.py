"""/v1/chat/completions with the real `openai` package."""

import base64
import json
import time
from io import BytesIO

import httpx2
import openai
import pytest
from PIL import Image

SCENE = "a large red circle on a gray background"
QUESTION = "what color is the circle ?"


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def image(pipe) -> Image.Image:
    return pipe.generate(SCENE, seed=0).images[0]


def shown(image: Image.Image) -> dict:
    file = BytesIO()
    image.save(file, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def question(image: Image.Image, words: str = QUESTION) -> list[dict]:
    return [{"role": "user", "content": [shown(image), {"type": "text", "text": words}]}]


def test_an_answer_about_an_image_is_the_pipelines_own(client, pipe, image):
    answer = client.chat.completions.create(model="spar", messages=question(image), temperature=0)
    choice = answer.choices[0]
    assert choice.message.content == pipe.understand(image, QUESTION).texts[0] == "red"
    assert (choice.finish_reason, choice.message.role, answer.object) == ("stop", "assistant", "chat.completion")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens == 1


def test_text_may_come_before_the_image(client, image):
    """Many clients write their turns so; the answer is that of the other order, and right."""
    turn = question(image)[0]
    answer = client.chat.completions.create(model="spar", messages=[turn | {"content": turn["content"][::-1]}])
    assert answer.choices[0].message.content == "red"


def test_an_image_is_read_as_so_many_tiles_as_asked_for(client, pipe, image):
    wide = image.resize((128, 64))
    used = {}
    for tiles in (None, 1, 2, 12):
        given = {} if tiles is None else {"max_tiles": tiles}
        answer = client.chat.completions.create(model="spar", messages=question(wide), extra_body=given)
        used[tiles] = answer.usage.prompt_tokens
        own = pipe.understand(wide, QUESTION, max_tiles=tiles).texts[0]
        assert answer.choices[0].message.content == own
    assert used[None] == used[1] and used[2] == used[12] > used[1]  # two tiles and the whole
    for tiles in (0, 41):
        with pytest.raises(openai.BadRequestError, match="max_tiles"):
            client.chat.completions.create(model="spar", messages=question(wide), extra_body={"max_tiles": tiles})


def test_an_image_outside_the_models_world_is_said_in_warnings_whole_or_streamed(client, image):
    photo = Image.effect_noise((90, 60), 80).convert("RGB")
    for shown_image, wanted in ((image, False), (photo, True)):
        messages = question(shown_image)
        whole = client.chat.completions.create(model="spar", messages=messages).model_extra.get("warnings", [])
        *_, last = client.chat.completions.create(model="spar", messages=messages, stream=True)
        assert whole == last.model_extra.get("warnings", []) and bool(whole) == wanted
        assert all("outside the model's world" in note for note in whole)
    words = [{"role": "user", "content": "image"}]  # a content that is text has no images
    assert "warnings" not in client.chat.completions.create(model="spar", messages=words).model_extra


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_an_answer_can_have_are_cut(client, image, field):
    """Benchmark kits ask for thousands; 2048 is the limit, and its finish_reason is `length`."""
    for count in (2049, 4096, 10**12):
        out = client.chat.completions.create(model="spar", messages=question(image), extra_body={field: count})
        assert (out.choices[0].message.content, out.choices[0].finish_reason) == ("red", "stop")


def test_a_conversation_of_several_turns_is_the_pipelines_own(client, pipe, image):
    messages = [
        *question(image), {"role": "assistant", "content": "red"}, {"role": "user", "content": "describe the image"}
    ]
    out = pipe.chat(
        [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]},
            *messages[1:],
        ],
        max_new_tokens=6,
    )
    answer = client.chat.completions.create(model="spar", messages=messages, max_completion_tokens=6)
    assert answer.choices[0].message.content == "".join(out)
    assert answer.choices[0].finish_reason == out.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (out.prompt_tokens, out.completion_tokens)


def test_a_stream_has_the_same_words_piece_by_piece(client, image):
    asked = {"model": "spar", "messages": question(image, "describe the image"), "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 1
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices


def test_what_fails_before_it_begins_is_no_stream(client, image):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="unknown words .*elephant"):
            client.chat.completions.create(
                model="spar", messages=question(image, "is it an elephant ?"), stream=stream
            )


def test_what_fails_on_the_way_ends_the_stream_with_an_error(pipe, serve, image, monkeypatch):
    def broken(self, messages, **_):
        yield "red"
        raise RuntimeError("a secret of the machine")

    monkeypatch.setattr(type(pipe), "chat", broken)
    with serve(pipe) as address:
        body = {"messages": question(image), "stream": True}
        text = httpx2.post(f"{address}/v1/chat/completions", json=body).text
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert events[-1] == "[DONE]" and json.loads(events[-2])["error"]["type"] == "server_error"
        assert "secret" not in text


def test_a_reader_that_leaves_a_stream_frees_its_place(pipe, serve, image, monkeypatch):
    ended = []

    def endless(self, messages, **_):
        try:
            while True:
                time.sleep(0.001)
                yield "red "
        finally:
            ended.append(True)

    monkeypatch.setattr(type(pipe), "chat", endless)
    with serve(pipe, max_queue=1) as address:
        body = {"messages": question(image), "stream": True}
        with httpx2.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()  # kept: when it is collected, the answer is closed
            next(lines)
            assert httpx2.post(f"{address}/v1/chat/completions", json=body).status_code == 429
        deadline = time.monotonic() + 5
        while not ended or "spar_queue 0.0" not in httpx2.get(f"{address}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("n", 2), ("tools", [{}]), ("stop", "x"), ("presence_penalty", 1), ("max_tokens", 0),
     ("response_format", {"type": "json_object"}), ("logprobs", True)],
)  # fmt: skip
def test_what_a_greedy_answer_cannot_honour_is_refused(client, image, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="spar", messages=question(image), extra_body={field: value})
    assert field in caught.value.message


def test_what_it_does_honour_is_taken(client, image):
    answer = client.chat.completions.create(
        model="spar", messages=[{"role": "developer", "content": "describe"}, *question(image)], top_p=1, n=1,
        temperature=0, presence_penalty=0, frequency_penalty=0, seed=1, user="me", max_completion_tokens=1,
    )  # fmt: skip
    assert answer.usage.completion_tokens == 1 and len(answer.choices) == 1


def test_an_answer_may_be_sent_back_as_it_came(client, image):
    """As the client's own message object, and as other clients send it: with nulls for missing fields."""
    first = client.chat.completions.create(model="spar", messages=question(image)).choices[0].message
    asked = {"role": "user", "content": "how many objects?"}
    nulls = {"refusal": None, "audio": None, "function_call": None, "tool_calls": None, "annotations": None}
    plain = {"role": "assistant", "content": first.content}
    answers = [
        client.chat.completions.create(model="spar", messages=[*question(image), message, asked], stop=None)
        for message in (plain, first, plain | nulls)
    ]
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    client.chat.completions.create(model="spar", messages=[*question(image), plain | {"content": ""}, asked])
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.chat.completions.create(model="spar", messages=[{"role": "user", "content": ""}])
