"""The page in a real browser: four tasks, the same pixels as elsewhere, errors, a phone, and nothing from outside."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra `ui` is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")


import uvicorn
from fastapi import FastAPI
from playwright import sync_api
from starlette.applications import Starlette
from starlette.testclient import TestClient

from spar.common.errors import Cancelled
from spar.inference.image_files import BUNDLED_MODEL, read_metadata
from spar.inference.notes import knows_shapes
from spar.serving.auth import listen
from spar.serving.http import HttpServer
from spar.ui.app import build_page
from spar.ui.components import error_message
from spar.ui.examples import EDITS, PROMPTS, scene_images
from spar.ui.mount import mount_page, page_app, serve_page

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
WAIT = 30_000  # milliseconds


@pytest.fixture(scope="module")
def site(pipe, tmp_path_factory):
    """The page's address, served from a thread."""
    app = FastAPI()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")  # so that it is what it was afterwards
        mount_page(app, pipe, cache=tmp_path_factory.mktemp("cache"))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no browser: install Debian's chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, site):
    """`visit(tab, **context)`: a fresh visitor at a tab. What it must never do is looked at in the end."""
    pages, outside, failed, errors = [], [], [], []

    def go(tab="Generate", **context):
        page = browser.new_context(**{"viewport": DESK, **context}).new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda r: r.url.startswith((site, "data:", "blob:")) or outside.append(r.url))
        page.on("response", lambda r: r.status >= 400 and failed.append((r.status, r.url)))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.goto(site)
        page.get_by_role("tab", name=tab).click()
        pages.append(page)
        return page

    yield go
    for page in pages:
        page.context.close()
    assert (outside, failed, errors) == ([], [], [])


def press(page, name):
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def status(page):
    return page.locator(".spar-status.block:visible")


def box(page, label):
    return page.get_by_role("textbox", name=re.compile(f"^{label}"))


def download(page):
    with page.expect_download() as started:
        press(page, "Download PNG")
    return Path(started.value.path()), started.value.suggested_filename


def pixels(image):
    return np.asarray(image.convert("RGB"))


def shown(page, selector):
    """The image behind an <img> of the page."""
    with urllib.request.urlopen(page.locator(selector).locator("visible=true").get_attribute("src")) as answer:
        return Image.open(BytesIO(answer.read()))


# ---- the four tasks --------------------------------------------------------------------------------------------------


def test_generate_draws_what_python_draws_and_the_file_says_how(visit, pipe):
    page = visit()
    box(page, "What to draw").fill(PROMPTS[1])
    box(page, "Seed").fill("11")
    press(page, "Draw")
    status(page).get_by_text("Seed 11 · 20 steps · guidance 4.5").wait_for()
    file, name = download(page)
    drawn = pipe.generate(PROMPTS[1], seed=11)
    with Image.open(file) as image:
        assert np.array_equal(pixels(image), pixels(drawn.images[0])) and name == "spar-seed-11.png"
        assert image.text == {key: str(value) for key, value in drawn.metadata[0].items() if value is not None} | {
            "model": BUNDLED_MODEL
        }
    assert read_metadata(file).reproduce_command()[:3] == ["spar", "generate", PROMPTS[1]]
    assert np.array_equal(pixels(shown(page, ".spar-picture img")), pixels(drawn.images[0]))


def test_the_routing_view_tells_each_words_weights(visit, pipe):
    page = visit()
    box(page, "What to draw").fill("a large red circle")
    page.keyboard.press("Enter")
    status(page).get_by_text("Seed 0").wait_for()
    out = pipe.generate("a large red circle", seed=0)
    routing, layout = out.routing[0], out.metadata[0]["layout"]
    titles = [token.get_attribute("title") for token in page.locator(".routing-token").all()]
    words = [title.partition(":")[0] for title in titles]
    assert layout.startswith("a large red circle on")
    assert words[:13] == ["generate", "an", "image", "", *layout.split()[:9]]
    assert words[-16:] == [*map(str, range(1, 17))]
    place = routing.tokens.index("red")
    wanted = [f"layer {k} {100 * w:.1f} %" for k, w in zip(routing.layers, routing.weights[place], strict=True)]
    assert titles[6] == f"red: {', '.join(wanted)}"


def test_a_dropped_image_is_edited(visit, pipe, tmp_path):
    picture = scene_images()[1].resize((256, 128))  # a user's own size and proportions
    picture.save(tmp_path / "mine.png")
    page = visit("Edit")
    page.get_by_label("Remove Image").locator("visible=true").click()
    page.locator("input[type=file]:visible, .spar-picture:visible input[type=file]").first.set_input_files(
        tmp_path / "mine.png"
    )
    box(page, "What to change").fill(EDITS[0][1])
    page.wait_for_function("document.querySelectorAll('.spar-picture:not(.spar-slider) img[src*=\"mine\"]').length")
    press(page, "Change it")
    status(page).get_by_text("Seed 0").wait_for()
    out = pipe.edit(picture, EDITS[0][1], seed=0).images[0]
    before, after = page.locator(".spar-slider:visible img").all()
    assert np.array_equal(pixels(Image.open(download(page)[0])), pixels(out))
    with urllib.request.urlopen(after.get_attribute("src")) as answer:
        assert np.array_equal(pixels(Image.open(BytesIO(answer.read()))), pixels(out))
    with urllib.request.urlopen(before.get_attribute("src")) as answer:
        assert Image.open(BytesIO(answer.read())).size == out.size
    rows, columns = out.height // 8, out.width // 8
    assert page.locator(".routing-grid i").count() == rows * columns


def test_an_example_is_asked_about(visit):
    page = visit("Understand")
    page.get_by_role("gridcell", name="how many stars are there?").click()
    sync_api.expect(box(page, "Your question")).to_have_value("how many stars are there?")
    press(page, "Ask")
    sync_api.expect(box(page, "Answer")).to_have_value("three")


def test_reconstruct_shows_before_and_after(visit, pipe):
    page = visit("Reconstruct")
    press(page, "Rebuild")
    status(page).get_by_text("Rebuilt at 64 × 64 pixels").wait_for()
    wanted = pipe.reconstruct(scene_images()[0]).images[0]
    file, name = download(page)
    with Image.open(file) as image:
        assert np.array_equal(pixels(image), pixels(wanted)) and name == "spar-rebuilt.png"
        assert "path" not in str(image.text) and "/" not in image.text["image"]
    handle = page.locator(".spar-slider:visible [data-testid=slider]")
    left = handle.bounding_box()["x"]
    around = page.locator(".spar-slider:visible").bounding_box()
    page.mouse.move(left, around["y"] + around["height"] / 2)
    page.mouse.down()
    page.mouse.move(left + 60, around["y"] + around["height"] / 2, steps=5)
    page.mouse.up()
    assert handle.bounding_box()["x"] > left + 30


# ---- as it goes ------------------------------------------------------------------------------------------------------


def test_denoising_is_shown_and_can_be_stopped(visit):
    page = visit()
    page.get_by_role("button", name="More settings").locator("visible=true").click()
    page.get_by_label("number input for Steps").locator("visible=true").fill("100")
    page.keyboard.press("Tab")
    press(page, "Draw")
    status(page).locator(".spar-bar").wait_for()
    page.locator(".spar-picture:visible img").wait_for()  # a preview, long before the end
    assert int(re.search(r"Step (\d+) of 100", status(page).inner_text())[1]) < 100
    press(page, "Stop")
    status(page).get_by_text("Stopped.").wait_for()
    page.get_by_role("gridcell", name=PROMPTS[2]).or_(page.get_by_role("button", name=PROMPTS[2])).first.click()
    page.get_by_label("number input for Steps").locator("visible=true").fill("2")
    page.keyboard.press("Tab")
    press(page, "Draw")
    status(page).get_by_text("Seed 0 · 2 steps").wait_for()


def test_a_visitor_who_leaves_stops_the_work(visit, pipe, monkeypatch):
    ended, over, generate = threading.Event(), threading.Event(), pipe.generate

    def spy(*args, **keywords):
        try:
            while not over.is_set():  # it never ends by itself
                out = generate(*args, **{**keywords, "num_inference_steps": 1000})
        except Cancelled:
            ended.set()
            raise
        return out

    monkeypatch.setattr(pipe, "generate", spy)
    page = visit()
    press(page, "Draw")
    status(page).locator(".spar-bar").wait_for()
    page.context.close()
    try:
        assert ended.wait(300)
    finally:
        over.set()


def test_a_new_seed_is_shown(visit):
    page = visit()
    seed = box(page, "Seed")
    press(page, "New seed")
    sync_api.expect(seed).not_to_have_value("0")
    value = seed.input_value()
    press(page, "Draw")
    status(page).get_by_text(f"Seed {value} ·").wait_for()
    seed.fill("")
    press(page, "Draw")
    status(page).get_by_text(re.compile(r"Seed \d+ ·")).and_(page.get_by_text(f"Seed {value} ·")).wait_for(
        state="detached"
    )
    status(page).get_by_text(re.compile(r"Seed \d+ ·")).wait_for()


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "text", "message"),
    [
        ("What to draw", "a purple dog", "This model does not know: dog (perhaps do); the top of"),
        ("What to draw", "  ", "Please write some text first."),
        ("What to draw", "red " * 65, "Expected at most 64 tokens, got 65."),
        ("Seed", "-1", "Seed: expected a whole number from 0 to 9223372036854775807, or nothing, got '-1'."),
        ("Seed", "9" * 20, "or nothing, got '99999999999999999999'."),
        ("Seed", "9223372036854775808", "Seed: expected a whole number from 0 to 9223372036854775807"),
        ("What to draw", "<img src=x onerror=alert(1)> ${1+1} {{2+2}}", "onerror=alert(1)>, ${1+1}, {{2+2}}"),
    ],
)
def test_errors_are_shown_in_plain_words(visit, label, text, message):
    page = visit()
    box(page, label).fill(text)
    press(page, "Draw")
    alert = page.get_by_role("alert").locator("visible=true")
    alert.wait_for()
    assert message in alert.inner_text()


def test_what_lies_outside_of_the_models_world_is_said(visit, tmp_path):
    page = visit()
    box(page, "What to draw").fill("a white circle")
    press(page, "Draw")
    status(page).get_by_text("No object of the model's world is white; their colours are red").wait_for()
    box(page, "What to draw").fill("a red circle")
    press(page, "Draw")
    status(page).filter(has_not_text="world").get_by_text("Seed ").wait_for()  # the one before stands until then
    Image.effect_noise((300, 200), 90).convert("RGB").save(tmp_path / "noise.png")
    page.get_by_role("tab", name="Reconstruct").click()
    page.get_by_label("Remove Image").locator("visible=true").click()
    page.locator(".spar-picture:visible input[type=file]").first.set_input_files(tmp_path / "noise.png")
    page.get_by_label("Remove Image").locator("visible=true").wait_for()
    press(page, "Rebuild")
    status(page).get_by_text("resized from 300 x 200 pixels) is outside the model's world").wait_for()


def test_what_is_no_image_is_named_and_its_path_is_not(visit, tmp_path):
    (tmp_path / "fake.png").write_bytes(b"%PDF-1.7 no picture")
    page = visit("Reconstruct")
    page.get_by_label("Remove Image").locator("visible=true").click()
    press(page, "Rebuild")
    status(page).get_by_text("Please drop an image first").wait_for()
    page.locator(".spar-picture:visible input[type=file]").first.set_input_files(tmp_path / "fake.png")
    page.get_by_label("Remove Image").locator("visible=true").wait_for()
    press(page, "Rebuild")
    status(page).get_by_text("the file is a PDF").wait_for()
    assert "/" not in status(page).inner_text()


def test_our_own_faults_get_a_fixed_text(visit, pipe, monkeypatch, caplog):
    def broken(*args, **keywords):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(pipe, "reconstruct", broken)
    page = visit("Reconstruct")
    press(page, "Rebuild")
    page.get_by_text("Something went wrong here; spar's log has the details.").wait_for()
    assert "secret detail" not in page.content() and "secret detail" in caplog.text


def test_the_pipelines_keywords_become_labels():
    assert ">Steps: expected 1 to 1000, got 0.</div>" in error_message("num_inference_steps: expected 1 to 1000, got 0")
    assert "Steer away from: unknown" in error_message(
        "negative_prompt: unknown words dog\nx; this model knows only a, b"
    )


# ---- small screens, other models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tab", ["Generate", "Edit", "Understand", "Reconstruct"])
def test_a_phone_has_everything_within_its_width(visit, tab):
    page = visit(tab, viewport=PHONE, has_touch=True)
    run = {"Generate": "Draw", "Edit": "Change it", "Understand": "Ask", "Reconstruct": "Rebuild"}[tab]
    press(page, run)
    status(page).get_by_text(re.compile("Seed 0|Answered|Rebuilt")).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for part in page.locator("button:visible, textarea:visible, input[type=text]:visible, [role=tab]").all():
        place = part.bounding_box()
        assert 0 <= place["x"] and place["x"] + place["width"] <= PHONE["width"], part.inner_text()


def test_a_model_of_another_world_is_not_offered_the_shapes_examples(pipe, monkeypatch, tmp_path):
    class Open:
        unk_token = None

        def get_vocab(self):
            return pipe.bundle.text_tokenizer.get_vocab()

    other = type("Pipe", (), {"bundle": type("Bundle", (), {"text_tokenizer": Open()})})()
    assert knows_shapes(pipe) and not knows_shapes(other)
    monkeypatch.setattr("spar.ui.app.knows_shapes", lambda pipe: False)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    config = str(build_page(pipe).get_config_file()["components"])
    assert "circle" not in config and "'type': 'dataset'" not in config and "64 × 64 pixels" in config


# ---- the address -----------------------------------------------------------------------------------------------------


def test_the_page_answers_under_the_names_of_this_machine_alone(pipe, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # so that it is what it was afterwards
    for host, other in (("127.0.0.1", "127.0.0.2"), ("127.0.0.2", "127.0.0.3"), ("::1", "[::2]")):
        client = TestClient(page_app(pipe, host, token=None, cache=tmp_path))
        own = f"[{host}]" if ":" in host else host
        for name in (own, "localhost", "127.0.0.1", "[::1]"):
            assert client.get("/config", headers={"Host": f"{name}:7860"}).status_code == 200, (host, name)
        for name in (other, "evil.example", "localhost.evil.example"):
            assert client.get("/config", headers={"Host": f"{name}:7860"}).status_code == 400, (host, name)


def test_the_page_alone_disconnects_a_client_that_sends_no_request(monkeypatch):
    servers = []

    class Server(HttpServer):
        def run(self, sockets):
            servers.append(self)
            super().run(sockets)

    monkeypatch.setattr("spar.serving.limits.HEADER_SECONDS", 0.3)
    monkeypatch.setattr("spar.ui.mount.page_app", lambda *args, **settings: Starlette())
    monkeypatch.setattr("spar.ui.mount.HttpServer", Server)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=serve_page, args=(None, listener))
    thread.start()
    try:
        with socket.create_connection(listener.getsockname(), timeout=10) as connection:
            assert connection.recv(1) == b""
    finally:
        servers[0].should_exit = True
        thread.join()


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_serves_the_page_asks_for_its_token_and_clears_up(tmp_path, monkeypatch):
    monkeypatch.setenv("SPAR_API_TOKEN", "a-token-of-16-or-more")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "spar", "ui", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]

        def ask(path, data=None, **headers):
            request = urllib.request.Request(address + path, data, headers)
            try:
                with urllib.request.urlopen(request) as answer:
                    return answer.status, answer.read(), answer.headers
            except urllib.error.HTTPError as error:
                return error.code, b"", error.headers

        assert ask("/config")[0] == 401
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert ask("/login", b"username=me&password=wrong", **form)[0] == 400
        code, _, headers = ask("/login", b"username=me&password=a-token-of-16-or-more", **form)
        cookie = "; ".join(value.partition(";")[0] for value in headers.get_all("set-cookie"))
        assert code == 200 and ask("/config", Cookie=cookie)[0] == 200
        assert ask("/config", Host="spar.example")[0] == 401  # as a proxy asks
        assert ask("/gradio_api/file=/etc/hostname", Cookie=cookie)[0] == 404
        assert list(tmp_path.glob("spar-*/scenes/*.png"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
        assert list(tmp_path.glob("spar-*")) == []
    finally:
        process.kill()
        process.wait()


# ---- several models --------------------------------------------------------------------------------------------------


def test_the_visitor_chooses_among_models_and_each_has_its_own_tabs(pipe, dual_run, monkeypatch, tmp_path):
    from spar.inference.loading import load_pipeline

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    dual = load_pipeline(dual_run.path / "model", device="cpu")
    parts = build_page(pipe, None, {"dual": dual}).get_config_file()["components"]
    (choice,) = [part["props"] for part in parts if part["type"] == "radio"]
    assert [value for _, value in choice["choices"]] == ["spar", "dual"] and choice["value"] == "spar"
    tabs = [part["props"]["label"] for part in parts if part["type"] == "tabitem"]
    assert tabs == ["Generate", "Edit", "Understand", "Reconstruct", "Generate", "Understand", "Reconstruct"]
    sliders = [part["props"]["label"] for part in parts if part["type"] == "slider"]
    assert sliders.count("Steps") == 2 and sliders.count("Guidance") == 3      # rows of codes are no choice
    assert "edits them" in str(parts) and str(parts).count("answers questions about them") == 2
