"""API and page in one server: one worker, one seed, the same pixels; each asks for the token in its own way."""

import base64
import shutil
import time
import urllib.error
import urllib.request
from functools import partial
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra `ui` is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")

import httpx2
from playwright import sync_api

from spar.serving.limits import PAGE_PATH, SHUTDOWN_SECONDS
from spar.ui.mount import page_app

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
TOKEN = "a-token-of-16-or-more"
PROMPT = "two large yellow stars on a black background"

pytestmark = pytest.mark.slow


@pytest.fixture
def joined(pipe, serve, tmp_path, monkeypatch):
    """`joined(token)`: a server's address."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # so that it is what it was afterwards
    def start(token=None):
        build_page = partial(page_app, pipe, "127.0.0.1", PAGE_PATH, token=token, cache=tmp_path)
        return serve(pipe, build_page=build_page, token=token)

    return start


def test_page_and_api_draw_the_same_image(joined, pipe):
    if CHROMIUM is None:
        pytest.skip("no browser: install Debian's chromium")
    with joined() as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(f"{address}/page")
        page.get_by_role("textbox", name="What to draw").fill(PROMPT)
        page.get_by_role("textbox", name="Seed").fill("5")
        page.get_by_role("button", name="Draw", exact=True).click()
        page.locator(".spar-status.block:visible").get_by_text("Seed 5").wait_for()
        with page.expect_download() as started:
            page.get_by_role("button", name="Download PNG").locator("visible=true").click()
        with Image.open(started.value.path()) as image:
            drawn = np.asarray(image.convert("RGB"))
        browser.close()
        body = {"prompt": PROMPT, "seed": 5}
        answer = httpx2.post(f"{address}/v1/images/generations", json=body, timeout=60).json()
    coded = base64.b64decode(answer["data"][0]["b64_json"])
    with Image.open(BytesIO(coded)) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), drawn)
    assert np.array_equal(np.asarray(pipe.generate(PROMPT, seed=5).images[0]), drawn)


def test_programs_bear_the_token_and_people_log_in_with_it(joined):
    def status(path: str, data: bytes | None = None, **headers: str) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(address + path, data, headers)) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    with joined(TOKEN) as address:
        bearer, form = {"Authorization": f"Bearer {TOKEN}"}, {"Content-Type": "application/x-www-form-urlencoded"}
        assert (status("/v1/models"), status("/v1/models", **bearer)) == (401, 200)
        assert (status("/page/config"), status("/page/config", **bearer)) == (401, 401)
        assert status("/page/login", b"username=me&password=wrong", **form) == 400
        assert status("/page/login", f"username=me&password={TOKEN}".encode(), **form) == 200
        assert status("/pages", **bearer) == 404
        assert status("/page/gradio_api/file=/etc/hostname") == 404
    with joined() as address:
        assert status("/page/config", Host="evil.example") == 400 and status("/v1/models", Host="evil.example") == 421


def test_an_open_page_does_not_keep_the_server(joined):
    if CHROMIUM is None:
        pytest.skip("no browser: install Debian's chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        with joined() as address:
            page = browser.new_page()
            page.goto(f"{address}/page")
            page.get_by_role("button", name="Draw", exact=True).wait_for()
            page.wait_for_timeout(1000)  # its heartbeat stream is open now
            began = time.monotonic()
        assert time.monotonic() - began < SHUTDOWN_SECONDS / 3
        browser.close()
