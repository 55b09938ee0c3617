"""Train, stop, resume, evaluate and serve, over and over, and see whether memory, handles and disk stay flat.

    python tests/chaos/soak.py --minutes 60

Each cycle trains the last two stages of `tiny` in this process, stops in the middle by SIGTERM, resumes, evaluates the
model, and sends requests of every task, one of them wrong, to a server that runs all the time. Sizes are medians of the
second quarter of the cycles and of the last: the first quarter fills caches. The last line is JSON; the exit status is
1 where something grew.
"""

import argparse
import base64
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import psutil

from spar.evaluation.benchmarks import BENCHMARKS
from spar.evaluation.environment import machine_info, version_info
from spar.evaluation.options import EvalOptions
from spar.inference.pipeline import SparPipeline
from spar.recipes import recipe
from spar.training.trainer import train

STAGES = ("unified-2", "unified-3")
BEFORE = "unified-1"
LIMIT = 1.05  # of memory in the last quarter against the second
PIXELS = "data:image/png;base64,"


def start_server(model: Path, port: int, environment: dict[str, str]) -> subprocess.Popen:
    """The API server of a model, ready."""
    argv = [sys.executable, "-m", "spar", "serve", "--model", str(model), "--port", str(port)]
    server = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = time.monotonic()
    while True:
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return server
        except httpx2.HTTPError:
            pass
        if server.poll() is not None or time.monotonic() - begun > 120:
            raise SystemExit("the server did not start")
        time.sleep(0.2)


def ask(port: int) -> None:
    """A request of every task and a wrong one."""
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        made = client.post("/v1/images/generations", json={"prompt": "a red circle", "seed": 1}).raise_for_status()
        encoded = made.json()["data"][0]["b64_json"]
        upload = {"image": ("a.png", base64.b64decode(encoded), "image/png")}
        question = {"type": "text", "text": "what color is the circle?"}
        parts = [{"type": "image_url", "image_url": {"url": PIXELS + encoded}}, question]
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]}).raise_for_status()
        edit = {"prompt": "recolor the circle blue", "seed": "1"}
        client.post("/v1/images/edits", data=edit, files=upload).raise_for_status()
        client.post("/v1/reconstruct", files=upload).raise_for_status()
        wrong = client.post("/v1/images/generations", json={"prompt": 3})
        if not 400 <= wrong.status_code < 500:
            raise SystemExit(f"a wrong request was answered {wrong.status_code}")


def train_and_evaluate(start: Path, run: Path) -> None:
    """Stop in the middle, resume, evaluate."""
    tiny = recipe("tiny")
    stages = tuple(replace(stage, steps=8) if stage.name in STAGES else stage for stage in tiny.stages)
    tiny = replace(tiny, stages=stages)

    def stop(stage: str, step: int, *_: Any) -> None:
        if stage == STAGES[0] and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    if train(tiny, run, stages=STAGES, init_from=start, report=stop) is not None:
        raise SystemExit("a training did not stop")
    train(tiny, run, stages=STAGES, resume=True)
    pipe = SparPipeline.from_pretrained(run / "model")
    for name in ("shapes-vqa", "shapes-gen", "shapes-edit"):
        BENCHMARKS[name](pipe, EvalOptions(limit=2, images_per_prompt=1), None)


def measure(own: psutil.Process, server: psutil.Process, work: Path) -> dict[str, float]:
    """What must stay flat."""
    sizes = {"disk_mb": sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) / 2**20}
    for name, process in (("training", own), ("server", server)):
        sizes[f"{name}_mb"] = process.memory_info().rss / 2**20
        sizes[f"{name}_handles"] = process.num_fds()
        sizes[f"{name}_threads"] = process.num_threads()
    return sizes


def summarize(samples: list[dict[str, float]]) -> dict[str, dict[str, float | bool]]:
    """Of each size the medians of the second and last quarter, and whether it is flat."""
    quarter = len(samples) // 4
    found = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        before = statistics.median(values[quarter : 2 * quarter])
        after = statistics.median(values[-quarter:])
        flat = after <= before * LIMIT if name.endswith("_mb") else after <= before
        found[name] = {"second_quarter": round(before, 1), "last_quarter": round(after, 1), "flat": flat}
    return found


def soak(work: Path, start: Path, model: Path, minutes: float, port: int) -> list[dict[str, float]]:
    """Cycles for some time, at least eight; what was measured after each."""
    temporary = work / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    server = start_server(model, port, dict(os.environ))
    samples, begun = [], time.monotonic()
    try:
        own, other = psutil.Process(), psutil.Process(server.pid)
        while len(samples) < 8 or time.monotonic() - begun < 60 * minutes:
            train_and_evaluate(start, work / "run")
            ask(port)
            samples.append(measure(own, other, work))
            shutil.rmtree(work / "run")
    finally:
        server.terminate()
        server.wait(timeout=60)
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--start", type=Path, help="a whole run of tiny; by default one is trained")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, base = Path(folder), arguments.start
        if base is None:
            base = work / "start"
            train(recipe("tiny"), base)
        begun = time.monotonic()
        samples = soak(work, base / BEFORE / "done", base / "model", arguments.minutes, arguments.port)
        minutes = (time.monotonic() - begun) / 60
    sizes = summarize(samples)
    circumstances = {"machine": machine_info(), "versions": version_info(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    print(json.dumps({"cycles": len(samples), "minutes": round(minutes, 1), "sizes": sizes, **circumstances}))
    return 0 if all(size["flat"] for size in sizes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
