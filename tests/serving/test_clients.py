"""Python clients of OpenAI's API with their defaults, each skipped where it is not installed.

The requests of the two benchmark kits, which need torchvision, are written out as their API models build them.
"""

import asyncio
import base64
from io import BytesIO
from types import ModuleType

import httpx2
import openai
import pytest
from PIL import Image

QUESTION, NEXT = "what color is the circle?", "how many objects?"
PROMPT, INSTRUCTION = "a red circle", "make the circle blue"
SYSTEM = "You are a helpful assistant."
MODEL, KEY = "spar", "none"


@pytest.fixture
def base(address, monkeypatch, tmp_path) -> str:
    """The address that clients get; they neither report nor read anything of this machine."""
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    return f"{address}/v1"


@pytest.fixture(scope="module")
def png(scene_url) -> bytes:
    return base64.b64decode(scene_url.partition(",")[2])


@pytest.fixture(scope="module")
def question(scene_url) -> list[dict]:
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": scene_url}}]
    return [{"role": "user", "content": content}]


class TestLiteLLM:
    @pytest.fixture
    def client(self, base) -> tuple[ModuleType, dict]:
        return pytest.importorskip("litellm"), {"model": f"openai/{MODEL}", "api_base": base, "api_key": KEY}

    def test_chat_of_two_turns(self, client, question):
        litellm, where = client
        first = litellm.completion(messages=question, **where).choices[0].message
        assert first.content == "red"
        for turn in (first, first.model_dump()):
            messages = [*question, turn, {"role": "user", "content": NEXT}]
            assert litellm.completion(messages=messages, **where).choices[0].message.content

    def test_stream(self, client, question):
        litellm, where = client
        chunks = litellm.completion(messages=question, stream=True, **where)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "red"

    def test_images(self, client, png):
        litellm, where = client
        generated = litellm.image_generation(prompt=PROMPT, **where)
        edited = litellm.image_edit(prompt=INSTRUCTION, image=BytesIO(png), **where)
        assert generated.data[0].b64_json and edited.data[0].b64_json

    def test_responses(self, client):
        litellm, where = client
        assert litellm.responses(input="describe the image", **where).output[0].content[0].text


class TestLangChain:
    @pytest.fixture
    def model(self, base):
        package = pytest.importorskip("langchain_openai")
        return lambda **more: package.ChatOpenAI(model=MODEL, base_url=base, api_key=KEY, **more)

    @pytest.mark.parametrize("responses", [False, True])
    def test_chat_of_two_turns(self, model, question, responses):
        chat = model(use_responses_api=responses)
        first = chat.invoke([("system", SYSTEM), *question])
        assert first.text == "red"
        assert chat.invoke([("system", SYSTEM), *question, first, ("user", NEXT)]).text

    @pytest.mark.parametrize("responses", [False, True])
    def test_stream(self, model, question, responses):
        chunks = model(use_responses_api=responses).stream(question)
        assert "".join(chunk.text for chunk in chunks) == "red"

    def test_temperature(self, model, question):
        assert model(temperature=0.7, use_responses_api=False).invoke(question).text == "red"


class TestLlm:
    @pytest.mark.parametrize("stream", [True, False])
    def test_prompt_with_a_system_message_and_an_image(self, base, png, stream):
        llm = pytest.importorskip("llm")
        from llm.default_plugins.openai_models import Chat

        model = Chat("spar", model_name=MODEL, api_base=base, vision=True)
        model.key = KEY
        image = llm.Attachment(type="image/png", content=png)
        conversation = model.conversation()
        assert conversation.prompt(QUESTION, system=SYSTEM, attachments=[image], stream=stream).text() == "red"
        assert conversation.prompt(NEXT, stream=stream).text()


class TestInstructor:
    """Its structured answers are made of tools, which the model does not call: they are refused in words."""

    def test_text_is_answered_and_a_structure_is_refused(self, base, question):
        instructor = pytest.importorskip("instructor")
        from pydantic import BaseModel

        class Answer(BaseModel):
            color: str

        client = instructor.from_openai(openai.OpenAI(base_url=base, api_key=KEY))
        asked = {"model": MODEL, "messages": question, "max_retries": 0}
        answer = client.chat.completions.create(response_model=None, **asked)
        assert answer.choices[0].message.content == "red"
        with pytest.raises(Exception, match="tools: expected no tools: this model calls none"):
            client.chat.completions.create(response_model=Answer, **asked)


class TestPydanticAi:
    @pytest.fixture(params=["OpenAIChatModel", "OpenAIResponsesModel"])
    def agent(self, base, request):
        package = pytest.importorskip("pydantic_ai")
        from pydantic_ai.models import openai as models
        from pydantic_ai.providers.openai import OpenAIProvider

        model = getattr(models, request.param)(MODEL, provider=OpenAIProvider(base_url=base, api_key=KEY))
        return package.Agent(model, instructions=SYSTEM, system_prompt="Be concise.")

    def test_run_of_two_turns(self, agent, png):
        from pydantic_ai import BinaryContent

        first = agent.run_sync([QUESTION, BinaryContent(png, media_type="image/png")])
        assert first.output == "red"
        assert agent.run_sync(NEXT, message_history=first.all_messages()).output

    def test_stream(self, agent, png):
        from pydantic_ai import BinaryContent

        async def stream() -> str:
            async with agent.run_stream([QUESTION, BinaryContent(png, media_type="image/png")]) as result:
                return [text async for text in result.stream_text()][-1]

        assert asyncio.run(stream()) == "red"


class TestAgentsSdk:
    @pytest.fixture(params=["OpenAIResponsesModel", "OpenAIChatCompletionsModel"])
    def agent(self, base, request):
        package = pytest.importorskip("agents")
        model = getattr(package, request.param)(MODEL, openai.AsyncOpenAI(base_url=base, api_key=KEY))
        return package.Agent(name="Assistant", instructions=SYSTEM, model=model)

    @pytest.fixture
    def asked(self, scene_url) -> list[dict]:
        image = {"type": "input_image", "detail": "auto", "image_url": scene_url}
        return [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}, image]}]

    def test_run_of_two_turns(self, agent, asked):
        from agents import Runner

        first = Runner.run_sync(agent, asked)
        assert first.final_output == "red"
        assert Runner.run_sync(agent, [*first.to_input_list(), {"role": "user", "content": NEXT}]).final_output

    def test_stream(self, agent, asked):
        from agents import Runner

        async def stream() -> str:
            result = Runner.run_streamed(agent, asked)
            assert [event.type async for event in result.stream_events()]
            return result.final_output

        assert asyncio.run(stream()) == "red"


def jpeg(png: bytes) -> str:
    file = BytesIO()
    with Image.open(BytesIO(png)) as image:
        image.convert("RGB").save(file, format="JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


BENCHMARK_KITS = {
    # lmms_eval.models.simple.openai: the text, then the images as PNG
    "lmms-eval": {"max_tokens": 1024, "temperature": 0},
    # lmms_eval.models.chat.openai, for a model version with o1, o3, o4 or gpt-5 in its name
    "lmms-eval, reasoning": {"response_format": {"type": "text"}, "max_completion_tokens": 1024},
    "lmms-eval, all settings": {
        "max_tokens": 16, "temperature": 0, "top_p": 1.0, "seed": 0, "presence_penalty": 0, "frequency_penalty": 0,
        "n": 1,
    },
    # vlmeval.api.gpt.OpenAIWrapper, LMDeployWrapper and OpenAISDKWrapper: images as JPEG, with a detail in the first
    "VLMEvalKit": {"max_tokens": 2048, "n": 1, "temperature": 0},
    "VLMEvalKit, lmdeploy": {"max_tokens": 1024, "n": 1, "temperature": 0.0},
    "VLMEvalKit, sampled": {"max_tokens": 2048, "n": 1, "temperature": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("kit", BENCHMARK_KITS)
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_benchmark_kits_request_is_answered(base, scene_url, png, kit, system):
    image = {"url": scene_url} if kit.startswith("lmms") else {"url": jpeg(png), "detail": "low"}
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": image}]
    first = [] if system is None else [{"role": "system", "content": system}]
    body = {"model": MODEL, "messages": [*first, {"role": "user", "content": content}], **BENCHMARK_KITS[kit]}
    answer = httpx2.post(f"{base}/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text[:300]
    assert answer.json()["choices"][0]["message"]["content"].strip() == "red"


def test_vlmevalkits_responses_request_is_answered(base, png):
    """vlmeval.api.openai_responses.OpenAIResponsesWrapper, which reads `output_text` and `status`."""
    image = {"type": "input_image", "image_url": jpeg(png), "detail": "auto"}
    user = {"role": "user", "content": [{"type": "input_text", "text": QUESTION}, image]}
    asked = {"model": MODEL, "input": [{"role": "system", "content": SYSTEM}, user]}
    with openai.OpenAI(base_url=base, api_key=KEY) as client:
        answer = client.responses.create(**asked, temperature=0, max_output_tokens=2048)
        *_, last = client.responses.create(**asked, stream=True)
    assert (answer.output_text, answer.status) == ("red", "completed")
    assert (last.response.output_text, last.type) == ("red", "response.completed")
