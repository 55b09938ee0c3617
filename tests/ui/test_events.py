"""What a browser could never send is refused before Gradio sees it: no request is an error of the server."""

import asyncio
import copy
import gc
import json
import time
import weakref

import pytest

pytest.importorskip("gradio", reason="the extra `ui` is not installed")

import gradio as gr
from starlette.testclient import TestClient

from spar.common.errors import InputError
from spar.serving.auth import GUESS_SECONDS
from spar.ui.app import _error_messages
from spar.ui.events import CHECKS, is_event
from spar.ui.mount import page_app
from spar.ui.preview_stream import PreviewStream

TOKEN = "a-token-of-16-or-more"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
ODD = [{}, [], [[]], {"path": 3}, {"path": []}, True, -1, 10**30, 1.5, float("inf"), "x" * 10**5, "\ud800", [None] * 9]


@pytest.fixture(scope="module")
def page(pipe, tmp_path_factory):
    """The page's client and blocks; errors of the server are answers with 500."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")
        app = page_app(pipe, "127.0.0.1", token=None, cache=tmp_path_factory.mktemp("cache"))
        client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
        yield client, app.routes[-1].app.app.get_blocks()


def usual(component) -> object:
    """A value that the page's own script would send for a component."""
    if isinstance(component, gr.Image):
        return None
    return {gr.Textbox: "7", gr.Slider: 4, gr.Dataset: 0, gr.State: None, gr.Radio: "spar"}[type(component)]


def event(number: int, fn) -> dict:
    return {
        "data": [usual(one) for one in fn.inputs], "fn_index": number, "session_hash": "abc123", "event_data": None,
        "trigger_id": None,
    }  # fmt: skip


def test_every_input_of_the_page_has_its_check(page):
    _, blocks = page
    for number, fn in blocks.fns.items():
        assert all(any(isinstance(one, kind) for kind in CHECKS) for one in fn.inputs)
        assert is_event(blocks, event(number, fn))


def test_events_of_the_page_are_answered(page):
    client, blocks = page
    for number, fn in blocks.fns.items():
        if not fn.queue and fn.targets and fn.targets[0][1] != "unload":
            answer = client.post("/gradio_api/run/predict", json=event(number, fn))
            assert answer.status_code == 200, answer.text


def test_values_of_another_type_are_the_visitors_fault(page):
    client, blocks = page
    for number, fn in blocks.fns.items():
        whole = event(number, fn)
        bodies = [[], "x", None, 3, {}, {**whole, "data": None}, {**whole, "data": {}}, {**whole, "data": "ab"}]
        bodies += [{**whole, "data": [*whole["data"], None]}]
        bodies += [{**whole, "data": whole["data"][:-1]}] * bool(fn.inputs)
        bodies += [{**whole, "fn_index": odd} for odd in (*ODD, None, 10**6, str(number))]
        bodies += [{**whole, "session_hash": odd} for odd in (*ODD, "", "../x")]
        bodies += [{**whole, "trigger_id": odd} for odd in ([], "x", {}, 1.5, True)]
        for place, component in enumerate(fn.inputs):
            for odd in ODD:
                changed = copy.deepcopy(whole)
                changed["data"][place] = odd
                if not CHECKS[next(kind for kind in CHECKS if isinstance(component, kind))](component, odd):
                    bodies.append(changed)
        for body in bodies:
            assert not is_event(blocks, body), body
    sent = json.dumps(bodies[-1]).encode()
    for path in ("queue/join", "run/predict"):
        assert client.post(f"/gradio_api/{path}", content=sent).status_code == 400


@pytest.mark.parametrize("path", ["queue/join", "run/predict", "cancel", "reset", "upload"])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"3", b"{", b"\xff", b"[" * 10_000, b'{"data": [1e999], "fn_index": NaN}',
        b'{"session_hash": 3, "fn_index": "x", "event_id": []}',
        b'{"session_hash": "a", "fn_index": 0, "event_id": "b"}',
        b'{"session_hash": "\\ud800", "fn_index": 99999999999999999999999, "event_id": "\\ud800"}',
    ],
)  # fmt: skip
def test_no_body_is_an_error_of_the_server(page, path, body):
    client, _ = page
    for kind in ("application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain", "x"):
        answer = client.post(f"/gradio_api/{path}", content=body, headers={"Content-Type": kind})
        assert answer.status_code < 500, (kind, answer.text)


@pytest.mark.parametrize(
    "path", ["gradio_api/queue/data", "gradio_api/upload_progress", "gradio_api/upload_progress?upload_id=x", "logout"]
)
def test_no_address_is_an_error_of_the_server(page, path):
    client, _ = page
    assert client.get(f"/{path}", follow_redirects=False).status_code < 500


def test_a_page_of_another_origin_gets_nothing(page):
    client, _ = page
    for path in ("/", "/config", "/theme.css", "/gradio_api/queue/data?session_hash=a"):
        for origin in ("http://evil.example", "null", "http://localhost:3000"):
            answer = client.get(path, headers={"Origin": origin})
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            answer = client.options(path, headers=asked)
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert client.get("/config", headers={"Origin": "http://127.0.0.1"}).status_code == 200


def test_only_who_has_logged_in_is_answered(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    app = page_app(pipe, "127.0.0.1", token=TOKEN, cache=tmp_path)
    client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    body = {"session_hash": "a", "fn_index": 0, "event_id": "b", "data": []}

    def statuses():
        posts = ("cancel", "reset", "queue/join", "upload")
        posts = [client.post(f"/gradio_api/{p}", json=body).status_code for p in posts]
        gets = ("heartbeat/a", "startup-events", "upload_progress?upload_id=a", "queue/data?session_hash=a")
        return posts + [client.get(f"/gradio_api/{p}").status_code for p in gets]

    assert statuses() == [401] * 5 + [404] + [401] * 2 and client.get("/config").status_code == 401
    client.cookies.set(f"access-token-{app.routes[-1].app.app.cookie_id}", "guess")
    assert client.post("/gradio_api/cancel", json=body).status_code == 401
    client.cookies.clear()
    assert client.post("/login", content=f"username=me&password={TOKEN}", headers=FORM).status_code == 200
    assert client.post("/gradio_api/reset", json={"event_id": "b"}).status_code == 200
    assert client.get("/config").status_code == 200


def test_a_task_that_fails_keeps_nothing():
    class Image:
        pass

    class Pipe:
        def generate(self, prompt, *, callback):
            alive.add(image := Image())
            raise InputError(f"no {type(image).__name__}")

    alive = weakref.WeakSet()
    gc.collect()
    gc.disable()
    try:
        with _error_messages() as errors:
            list(PreviewStream(Pipe()).run("me", "generate", "a"))
        deadline = time.monotonic() + 5
        while alive and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not alive and "No Image" in errors[0]
    finally:
        gc.enable()


def test_a_proxy_that_passes_the_hosts_name_on_reaches_the_login(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    client = TestClient(page_app(pipe, "127.0.0.1", token=TOKEN, cache=tmp_path), base_url="http://127.0.0.1")
    proxied = {"Host": "spar.example:8443", "Origin": "https://spar.example:8443", "X-Forwarded-Proto": "https"}
    login = {"content": f"username=me&password={TOKEN}", "headers": {**FORM, **proxied}}
    assert client.get("/", headers=proxied).status_code == 200
    assert client.post("/login", **{**login, "headers": {**login["headers"], "Host": "127.0.0.1"}}).status_code == 403
    assert client.post("/login", **login).status_code == 200
    assert client.get("/config", headers=proxied).json()["root"] == "https://spar.example:8443"


def test_guesses_at_the_password_are_slowed_and_the_right_one_is_not(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    waits: list[float] = []
    real = asyncio.sleep  # other tasks of the process sleep too

    async def sleep(seconds: float, *result: object) -> object:
        if seconds != GUESS_SECONDS:
            return await real(seconds, *result)
        waits.append(seconds)
        return None

    monkeypatch.setattr("spar.serving.auth.asyncio.sleep", sleep)
    client = TestClient(page_app(pipe, "127.0.0.1", token=TOKEN, cache=tmp_path), base_url="http://127.0.0.1")
    for _ in range(40):
        assert client.post("/login", content="username=me&password=wrong", headers=FORM).status_code == 400
    assert waits == [GUESS_SECONDS] * 8
    assert client.post("/login", content=f"username=me&password={TOKEN}", headers=FORM).status_code == 200
    assert waits == [GUESS_SECONDS] * 8
