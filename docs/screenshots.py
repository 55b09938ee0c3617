"""Write the screenshots of docs/page.md: python docs/screenshots.py (needs Debian's chromium and the extra `dev`)."""

import shutil
import tempfile
import threading
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from playwright import sync_api

from spar import SparPipeline
from spar.ui.mount import mount_page

FOLDER = Path(__file__).parent / "images"
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HEIGHTS = {"page-generate.png": 1080, "page-edit.png": 1620, "page-phone.png": 1250}
DONE = "Seed 0 · 20 steps"


def take(page: sync_api.Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # until the page's own animations have ended
    page.set_viewport_size({**page.viewport_size, "height": HEIGHTS[name]})
    page.screenshot(path=FOLDER / name)


def take_all(browser: sync_api.Browser, address: str) -> None:
    for name, viewport in (("page-generate.png", DESK), ("page-phone.png", PHONE)):
        page = browser.new_page(viewport=viewport)
        page.goto(address)
        page.get_by_role("button", name="Draw", exact=True).click()
        page.get_by_text(DONE).locator("visible=true").wait_for()
        take(page, name)
    page = browser.new_page(viewport=DESK)
    page.goto(address)
    page.get_by_role("tab", name="Edit").click()
    page.get_by_role("gridcell", name="remove the blue star").click()
    sync_api.expect(page.get_by_label("What to change")).to_have_value("remove the blue star")
    page.get_by_role("button", name="Change it", exact=True).click()
    page.get_by_text(DONE).locator("visible=true").wait_for()
    take(page, "page-edit.png")


def main() -> None:
    app = FastAPI()
    with tempfile.TemporaryDirectory() as cache:
        mount_page(app, SparPipeline.from_pretrained(), cache=Path(cache))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            thread.join(0.1)
        port = server.servers[0].sockets[0].getsockname()[1]
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            take_all(browser, f"http://127.0.0.1:{port}")
            browser.close()
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
