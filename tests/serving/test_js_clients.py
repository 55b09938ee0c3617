"""JavaScript clients with their defaults; NODE_PATH names the folder of their packages.

Each is skipped where node or the package is missing. `npm install openai ai @ai-sdk/openai @ai-sdk/openai-compatible`
installs them all.
"""

import json
import os
import shutil
import subprocess

import pytest

NODE = shutil.which("node")
BEGIN = """
const [base, url] = [process.env.SPAR_BASE, require("fs").readFileSync(0, "utf8")];
const [question, next, prompt] = ["what color is the circle?", "how many objects?", "a red circle"];
const system = "You are a helpful assistant.";
const png = Buffer.from(url.split(",")[1], "base64");
const all = async (stream) => { let text = ""; for await (const piece of stream) text += piece; return text; };
"""
OPENAI = """
const { OpenAI, toFile } = require("openai");
const client = new OpenAI({ baseURL: base, apiKey: "none" });
const messages = [{ role: "user", content: [
  { type: "text", text: question }, { type: "image_url", image_url: { url } } ] }];
const input = [{ role: "user", content: [
  { type: "input_text", text: question }, { type: "input_image", image_url: url, detail: "auto" } ] }];
"""
AI = """
const ai = require("ai");
const spar = require("@ai-sdk/openai").createOpenAI({ baseURL: base, apiKey: "none" });
const messages = [{ role: "user", content: [{ type: "text", text: question }, { type: "image", image: png }] }];
"""
COMPATIBLE = AI.replace(
    'require("@ai-sdk/openai").createOpenAI({ baseURL: base, apiKey: "none" })',
    'require("@ai-sdk/openai-compatible").createOpenAICompatible({ name: "spar", baseURL: base })',
)


def run_node(script: str, address: str = "", given: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SPAR_BASE": f"{address}/v1", "AI_SDK_LOG_WARNINGS": "false"}
    command = [NODE, "-e", script]
    return subprocess.run(command, input=given, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def call(address, scene_url):
    """`call(begin, body, *packages)`: what the body of an async function returns."""

    def call(begin: str, body: str, *packages: str):
        if NODE is None:
            pytest.skip("node is not installed")
        for package in packages:
            if run_node(f'require.resolve("{package}")').returncode:
                pytest.skip(f"the npm package {package} is not on NODE_PATH")
        script = f"{BEGIN}{begin}(async () => {{{body}}})().then((value) => console.log(JSON.stringify(value)));"
        done = run_node(script, address, scene_url)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return call


OPENAI_CALLS = {
    "chat": 'return (await client.chat.completions.create({ model: "spar", messages })).choices[0].message.content;',
    "chat stream": """return all((async function* () {
        for await (const chunk of await client.chat.completions.create({ model: "spar", messages, stream: true }))
            yield chunk.choices[0]?.delta?.content ?? "";
    })());""",
    "chat helper": 'return client.chat.completions.stream({ model: "spar", messages }).finalContent();',
    "responses": 'return (await client.responses.create({ model: "spar", input })).output_text;',
    "responses helper": """const stream = client.responses.stream({ model: "spar", input });
        return (await stream.finalResponse()).output_text;""",
    "responses of two turns": """const first = await client.responses.create({ model: "spar", input });
        const more = [...input, ...first.output, { role: "user", content: next }];
        const second = await client.responses.create({ model: "spar", input: more });
        return second.output_text ? first.output_text : null;""",
}


@pytest.mark.parametrize("name", OPENAI_CALLS)
def test_openai_answers(call, name):
    assert call(OPENAI, OPENAI_CALLS[name], "openai") == "red"


def test_openai_images(call):
    body = """const generated = await client.images.generate({ model: "spar", prompt });
        const image = await toFile(png, "a.png", { type: "image/png" });
        const edited = await client.images.edit({ model: "spar", image, prompt: "make the circle blue" });
        return [generated, edited].map((one) => one.data[0].b64_json.length > 100);"""
    assert call(OPENAI, body, "openai") == [True, True]


AI_MODELS = {
    "responses": (AI, 'spar("spar")', "@ai-sdk/openai"),
    "chat": (AI, 'spar.chat("spar")', "@ai-sdk/openai"),
    "compatible": (COMPATIBLE, 'spar("spar")', "@ai-sdk/openai-compatible"),
}


@pytest.mark.parametrize("name", AI_MODELS)
def test_vercels_ai_answers(call, name):
    begin, model, package = AI_MODELS[name]
    body = f"""const model = {model};
        const whole = await ai.generateText({{ model, system, messages }});
        return [whole.text, await all(ai.streamText({{ model, system, messages }}).textStream)];"""
    assert call(begin, body, "ai", package) == ["red", "red"]


@pytest.mark.parametrize("name", AI_MODELS)
def test_vercels_ai_takes_a_second_turn(call, name):
    """Of Responses it sends the answers' ids alone unless `store` is false: nothing is stored here."""
    begin, model, package = AI_MODELS[name]
    options = "{ openai: { store: false } }" if name == "responses" else "undefined"
    body = f"""const [model, providerOptions] = [{model}, {options}];
        const first = await ai.generateText({{ model, messages, providerOptions }});
        messages.push(...first.response.messages, {{ role: "user", content: next }});
        return [first.text, (await ai.generateText({{ model, messages, providerOptions }})).text];"""
    first, second = call(begin, body, "ai", package)
    assert first == "red" and second


def test_vercels_ai_is_told_that_nothing_is_stored(call):
    body = """const model = spar("spar");
        const first = await ai.generateText({ model, messages });
        messages.push(...first.response.messages, { role: "user", content: next });
        return ai.generateText({ model, messages, maxRetries: 0 }).then(() => null, (error) => error.message);"""
    assert "this server stores no answers" in call(AI, body, "ai", "@ai-sdk/openai")


@pytest.mark.parametrize("begin", [AI, COMPATIBLE])
def test_vercels_ai_generates_images(call, begin):
    make = "spar.image" if begin is AI else "spar.imageModel"
    package = "@ai-sdk/openai" if begin is AI else "@ai-sdk/openai-compatible"
    body = f"""const generate = ai.generateImage ?? ai.experimental_generateImage;
        return (await generate({{ model: {make}("spar"), prompt }})).image.mediaType;"""
    assert call(begin, body, "ai", package) == "image/png"
