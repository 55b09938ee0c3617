"""docs/serving.md is true: its examples run against a server, and its limits are the code's."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from spar.serving.limits import LIMITS
from spar.serving.overview import overview

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)


def run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_with_openais_client(address, pipe, tmp_path):
    code, streamed = blocks("python")
    both = f"{code}\n{streamed}"  # the second goes on with the first one's client
    assert run([sys.executable, "-c", both.replace("http://127.0.0.1:8000", address)], tmp_path).strip() == "navy"
    steps = {path.name for path in tmp_path.glob("image_generation.*.png")}
    assert steps == {f"image_generation.{name}.png" for name in (
        "partial_image-0", "partial_image-1", "partial_image-2", "completed-last"
    )}  # fmt: skip
    own = pipe.generate("a large red circle to the left of a small blue star", seed=0).images[0]
    assert Image.open(tmp_path / "out.png").tobytes() == own.tobytes()


def test_the_examples_with_curl(address, tmp_path):
    (code,) = blocks("sh")
    output = run(["bash", "-euc", code.replace("http://127.0.0.1:8000", address)], tmp_path)
    assert output.splitlines()[0] == "7" and output.splitlines()[-1] == '{"status":"ok"}'
    assert Image.open(tmp_path / "star.png").size == (64, 64)
    for name in ("edit.json", "again.json"):
        assert "b64_json" in (tmp_path / name).read_text()


def test_the_limits_are_those_of_the_code():
    shown = re.search(r"<!-- limits -->\n(.*?)<!-- end of limits -->", TEXT, re.S)[1]
    assert re.findall(r"\| `(\w+)` \| (.*?) \| (.*) \|", shown) == [(n, str(v), w) for n, v, w in LIMITS]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_person_who_opens_the_address_finds_what_it_serves(address, path):
    answer = httpx2.get(address + path)
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("text/html")
    document = httpx2.get(f"{address}/openapi.json").json()
    for shown in (*document["paths"], *(name for name, *_ in LIMITS), "spar", "Generate images from a prompt."):
        assert html.escape(shown) in answer.text
    assert re.findall(r"(?:src|href)=\"(.*?)\"", answer.text) == ["openapi.json"]
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not {"/", "/docs"} & document["paths"].keys()


def test_the_overview_of_hostile_names_is_text():
    document = {"info": {"version": "<1>"}, "paths": {"/<x>": {"get": {"description": "a & b"}}}}
    text = overview(document, ["<script>"], page=True).body.decode()
    assert "<script>" not in text and "&lt;script&gt;" in text and "/&lt;x&gt;" in text and 'href="./page"' in text
