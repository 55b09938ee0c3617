"""/v1/responses with the real `openai` package: the answers of the chat, in the other form."""

import base64
import json
from io import BytesIO

import httpx2
import openai
import pytest
from PIL import Image

QUESTION = "what color is the circle ?"


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def question(scene_url):
    def question(words: str = QUESTION) -> list[dict]:
        image = {"type": "input_image", "image_url": scene_url, "detail": "auto"}
        return [{"role": "user", "content": [{"type": "input_text", "text": words}, image]}]

    return question


def test_an_answer_is_that_of_the_chat(client, question, scene_url):
    content = [{"type": "image_url", "image_url": {"url": scene_url}}, {"type": "text", "text": "describe the image"}]
    chat = client.chat.completions.create(model="spar", messages=[{"role": "user", "content": content}])
    answer = client.responses.create(model="spar", input=question("describe the image"))
    assert answer.output_text == chat.choices[0].message.content and answer.output_text
    assert (answer.status, answer.object, answer.model) == ("completed", "response", "spar")
    usage = (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens)
    assert usage == (chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens)
    assert answer.error is None and answer.incomplete_details is None


def test_an_input_may_be_a_text_and_instructions_are_the_system_message(client):
    words = "describe the image"
    text = client.responses.create(model="spar", input=words)
    assert text.output_text == client.responses.create(input=[{"role": "user", "content": words}]).output_text
    told = client.responses.create(model="spar", input=words, instructions=words)
    messages = [{"role": "system", "content": words}, {"role": "user", "content": words}]
    chat = client.chat.completions.create(model="spar", messages=messages)
    assert told.output_text == chat.choices[0].message.content and told.instructions == words
    assert told.usage.input_tokens == chat.usage.prompt_tokens > text.usage.input_tokens


def test_an_answer_goes_back_as_it_came(client, question):
    first = client.responses.create(input=question())
    next_question = {"role": "user", "content": "how many objects?"}
    as_it_came = client.responses.create(input=[*question(), *first.output, next_question])
    plain = client.responses.create(input=[*question(), {"role": "assistant", "content": "red"}, next_question])
    assert as_it_came.output_text == plain.output_text and as_it_came.usage == plain.usage


def test_an_answer_that_is_cut_is_incomplete(client, question):
    for stream in (False, True):
        answer = client.responses.create(input=question("describe the image"), max_output_tokens=2, stream=stream)
        whole = [*answer][-1].response if stream else answer
        assert whole.status == whole.output[0].status == "incomplete" and whole.usage.output_tokens == 2
        assert whole.incomplete_details.reason == "max_output_tokens"


def test_a_stream_has_openais_events_and_the_same_answer(client, question):
    asked = {"model": "spar", "input": question("describe the image")}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds == [*begin, *["output_text.delta"] * len(pieces), *end] and len(pieces) > 1
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1].response
    assert "".join(pieces) == events[-4].text == last.output_text == whole.output_text and last.usage == whole.usage
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {last.output[0].id}
    assert {event.response.id for event in events if hasattr(event, "response")} == {last.id}


def test_the_clients_own_helper_reads_the_stream(client, question):
    with client.responses.stream(model="spar", input=question()) as stream:
        assert stream.get_final_response().output_text == "red"


def test_what_fails_before_it_begins_is_no_stream(client, question):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="unknown words .*elephant"):
            client.responses.create(input=question("is it an elephant ?"), stream=stream)
        with pytest.raises(openai.NotFoundError):
            client.responses.create(input=question(), model="gpt", stream=stream)


def test_what_fails_on_the_way_ends_the_stream_with_an_error(pipe, serve, question, monkeypatch):
    def broken(self, messages, **_):
        yield "red"
        raise RuntimeError("a secret of the machine")

    monkeypatch.setattr(type(pipe), "chat", broken)
    with serve(pipe) as address:
        text = httpx2.post(f"{address}/v1/responses", json={"input": question(), "stream": True}).text
    last = json.loads(text.strip().rpartition("data: ")[2])
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error" and "secret" not in text


def test_an_image_outside_the_models_world_is_said_in_warnings(client, scene_url):
    file = BytesIO()
    Image.effect_noise((90, 60), 80).convert("RGB").save(file, format="PNG")
    scene = {"type": "input_image", "image_url": scene_url}
    photo = scene | {"image_url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
    for image, wanted in ((scene, False), (photo, True)):
        messages = [{"role": "user", "content": [image, {"type": "input_text", "text": QUESTION}]}]
        whole = client.responses.create(input=messages)
        last = [*client.responses.create(input=messages, stream=True)][-1].response
        assert bool(whole.model_extra.get("warnings")) == bool(last.model_extra.get("warnings")) == wanted


@pytest.mark.parametrize(
    "value",
    [
        None, "", [], [{}], [{"role": "user"}], [{"role": "tool", "content": "x"}], "red " * 10_000, {"role": "user"},
        [{"type": "item_reference", "id": "msg_1"}], [{"type": "reasoning", "id": "rs_1", "summary": []}],
        [{"type": "function_call_output", "call_id": "1", "output": "x"}], [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "input_file", "file_id": "1"}]}],
        [{"role": "user", "content": [{"type": "input_image", "file_id": "1"}]}],
        [{"role": "user", "content": [{"type": "input_image", "image_url": "https://example.com/a.png"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "red"}]}], [{"role": "assistant", "content": "red"}],
        [{"role": "user", "content": "red"}] * 65, [{"role": "user", "content": "red"}] * 2, ["red"], 1, True,
    ],
)  # fmt: skip
def test_a_broken_input_is_the_clients_fault(address, value):
    for stream in (False, True):
        answer = httpx2.post(f"{address}/v1/responses", json={"input": value, "stream": stream})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text[:300]
        assert len(answer.content) < 2000 and "pydantic" not in answer.text.lower() and ".items" not in error["message"]
