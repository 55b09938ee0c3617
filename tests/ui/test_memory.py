"""The memory of the images that visitors of the page give: it is counted with that of all requests, and given back."""

import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra `ui` is not installed")

import gradio as gr
import httpx2
import uvicorn
from starlette.testclient import TestClient

from spar.serving import limits
from spar.serving.gate import MemoryBudget, RequestGate
from spar.serving.image_body import made_bytes
from spar.ui.app import Page
from spar.ui.mount import page_app

SIDE = 300
HELD, MOST = limits.PIXEL_BYTES * SIDE**2, limits.OPAQUE_BYTES * SIDE**2  # of an opened image; while it is opened
EDITED, REBUILT, DRAWN = (made_bytes(count, (64, 64), "webp") for count in (4, 2, 3))  # of what is made
BUSY, LARGE = "Spar is busy; please try again in a moment.", "takes too much memory; please make it smaller first."


class Calls:
    """The worker's `call`: runs a function at once, unless it is to `wait`."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.wait, self.held = pipe, False, list[int]()
        self.budget = MemoryBudget()

    def __call__(self, function: Any) -> Future:
        future: Future = Future()
        self.held.append(self.budget.held)
        if not self.wait:
            try:
                future.set_result(function(self.pipe))
            except Exception as error:
                future.set_exception(error)
        return future


@pytest.fixture
def calls(pipe):
    return Calls(pipe)


@pytest.fixture
def page(pipe, calls, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with gr.Blocks() as blocks:
        return Page(blocks, pipe, calls, calls.budget)


@pytest.fixture
def file(tmp_path):
    Image.new("RGB", (SIDE, SIDE), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def edit(page: Page, file: Any) -> Any:
    return page.sample("edit", "session", "change the background to navy", "0", 1, 4.5, "", str(file))


def rebuild(page: Page, file: Any) -> str:
    """The status."""
    ((_, status, _),) = page.reconstruct(str(file))
    return status


def test_an_image_counts_from_its_file_to_the_answer(page, calls, file):
    assert "Answered in" in page.understand(str(file), "what color is the background?")[1]
    assert "Rebuilt at" in rebuild(page, file)
    assert "Seed 0" in [status for _, status, _, _ in edit(page, file)][-1]
    assert calls.held == [HELD, HELD + REBUILT, HELD + EDITED] and calls.budget.held == 0


def test_what_is_made_counts_until_it_is_shown(page, calls, file, monkeypatch):
    values = ("generate", "session", "a red circle", "0", 1, 4.5, "")
    for made, held in ((page.sample(*values), DRAWN), (page.reconstruct(str(file)), HELD + REBUILT)):
        assert any(isinstance(value[0], str | tuple) for value in made)  # what is shown; it goes on from there
        assert calls.budget.held == held
        assert next(made, None) is None and calls.budget.held == 0
    monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", DRAWN)
    with calls.budget.lease() as other:
        other.reserve(1)
        assert BUSY in list(page.sample(*values))[-1][1]
    assert "Seed 0" in list(page.sample(*values))[-1][1]


def test_what_is_too_much_with_the_images_of_others_is_refused_until_they_are_answered(
    page, calls, file, monkeypatch
):
    monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", MOST + HELD // 2)
    waiting = edit(page, file)
    assert "One moment." in next(waiting)[1] and calls.budget.held == HELD + EDITED
    assert BUSY in page.understand(str(file), "what color is the background?")[1]
    assert BUSY in rebuild(page, file)
    assert BUSY in list(edit(page, file))[-1][1]
    assert calls.budget.held == HELD + EDITED and not calls.held  # the pipeline was asked for nothing
    waiting.close()  # the visitor has left
    assert calls.budget.held == 0
    assert "Rebuilt at" in rebuild(page, file)


def test_the_requests_of_the_api_count_too(page, calls, file, monkeypatch):
    monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", MOST + HELD // 2)
    with RequestGate(calls.budget).enter() as lease:
        lease.reserve(HELD)
        assert BUSY in rebuild(page, file)
    assert "Rebuilt at" in rebuild(page, file)


def test_an_image_that_no_memory_would_do_for_is_not_called_a_matter_of_time(page, calls, file, monkeypatch):
    monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", MOST)  # without the file's bytes
    assert LARGE in page.understand(str(file), "what?")[1]
    assert LARGE in rebuild(page, file)
    assert LARGE in list(edit(page, file))[-1][1]
    assert calls.budget.held == 0 and not calls.held


def test_what_fails_holds_nothing(page, calls, file, tmp_path, monkeypatch):
    fake = tmp_path / "fake.png"
    fake.write_bytes(b"%PDF-1.7 no picture")
    assert "the file is a PDF" in rebuild(page, fake)
    assert "no longer here" in rebuild(page, tmp_path / "gone.png")
    monkeypatch.setattr(calls.pipe, "reconstruct", lambda _: 1 // 0)
    assert "something went wrong" in rebuild(page, file).lower()
    assert calls.budget.held == 0


def test_a_mounted_page_has_the_budget_of_its_gate(pipe, monkeypatch, tmp_path):
    budgets = []

    def build(pipe: Any, call: Any, others: Any, budget: MemoryBudget) -> gr.Blocks:
        budgets.append(budget)
        with gr.Blocks() as blocks:
            return blocks

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr("spar.ui.mount.build_page", build)
    gate = RequestGate()
    app = page_app(pipe, "127.0.0.1", token=None, cache=tmp_path, gate=gate)
    alone = page_app(pipe, "127.0.0.1", token=None, cache=tmp_path)
    assert budgets == [gate.budget, alone.routes[-1].app.gate.budget] and budgets[0] is not budgets[1]
    assert app.routes[-1].app.gate is gate


def test_what_no_browser_asks_is_refused_without_a_trace_of_errors(pipe, monkeypatch, tmp_path):
    """A request that anybody may repeat writes kilobytes to the log if it ends as an error of Gradio."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app = page_app(pipe, "127.0.0.1", token=None, cache=tmp_path)
    scene = f"gradio_api/file={next(tmp_path.glob('scenes/*.png'))}"
    asked = [
        ("static/" + "a" * 5000, {}, 404), ("assets/" + "%C3%A9" * 200, {}, 404), (scene, {"range": "bytes=0-1"}, 206),
        (scene, {"range": "bytes=0-1,2-3"}, 400), (scene, {"range": "bytes=-"}, 400),
        ("gradio_api/queue/data?session_hash=nobody", {}, 200), ("gradio_api/queue/data", {}, 422),
        ("", {"x-forwarded-host": "a:b:c"}, 400), ("config", {"x-gradio-server": "http://a:b"}, 400),
        ("", {"x-forwarded-host": "spar.example:443"}, 200),
    ]  # fmt: skip
    with TestClient(app, base_url="http://127.0.0.1") as client:  # which raises what would go to the log
        for path, headers, status in asked:
            assert (client.get(path, headers=headers).status_code, path) == (status, path)


def test_a_visitor_who_leaves_holds_nothing(pipe, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    gate, edit = RequestGate(), pipe.edit

    def slow(*given: Any, **keywords: Any) -> Any:
        return edit(*given, **keywords | {"num_inference_steps": 1000})

    monkeypatch.setattr(pipe, "edit", slow)
    app = page_app(pipe, "127.0.0.1", token=None, cache=tmp_path, gate=gate)
    blocks = app.routes[-1].app.app.get_blocks()
    (number,) = [
        number for number, fn in blocks.fns.items() if fn.name == "sample" and isinstance(fn.inputs[-1], gr.Image)
    ]
    scene = {"path": str(next(tmp_path.glob("scenes/*.png"))), "meta": {"_type": "gradio.FileData"}}
    values = ["change the background to navy", "0", 4, 4.5, "", scene]
    session = {"session_hash": "visitor"}
    body = {"data": values, "fn_index": number, "trigger_id": None, "event_data": None, **session}
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/gradio_api"
        with httpx2.Client(timeout=30) as client:
            assert client.post(f"{address}/queue/join", json=body).status_code == 200
            with client.stream("GET", f"{address}/queue/data", params=session) as stream:
                assert any("Step" in line for line in stream.iter_lines())
                assert gate.budget.held == limits.PIXEL_BYTES * 64**2 + EDITED
        deadline = time.monotonic() + 30
        while gate.budget.held and time.monotonic() < deadline:
            time.sleep(0.05)
        assert gate.budget.held == 0
    finally:
        server.should_exit = True
        thread.join()
