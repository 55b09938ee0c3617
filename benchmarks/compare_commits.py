"""Compare the results of two checkouts on one machine in one run: training, checkpoint, four tasks, the API's replies.

    python benchmarks/compare_commits.py BEFORE AFTER

BEFORE and AFTER are folders of checkouts (`git worktree add BEFORE COMMIT`). Both run under this interpreter's
libraries, one thread each, only through the command line and HTTP, so that a checkout with other names can be compared.
A loss is compared as written, a tensor and an image by their bytes, an answer as text. Each difference is printed; the
last line is JSON. The exit status is 1 if there is a difference.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

PROMPTS = (
    "a large red circle to the left of a small blue star",
    "a red circle",
    "two blue squares on a white background",
    "three small green triangles",
    "a purple ring above an orange cross",
    "a small yellow star on a navy background",
    "a large orange square and a small cyan circle",
    "four small orange circles",
    "a green cross below a red star",
    "a cyan triangle to the right of a purple square on a black background",
)
INSTRUCTIONS = (
    "change the background to navy",
    "make the red circle green",
    "remove the blue squares",
    "add a small red star",
    "replace the purple ring with a blue square",
)
QUESTIONS = (
    "what color is the background?",
    "how many objects are there?",
    "is there a red circle?",
    "describe the image",
)
NOT_COMPARED = ("seconds", "date", "created", "id")


class Checkout:
    """One of the two: runs its command line and records the results by name."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.work, self.record = work, dict[str, Any]()
        source = str(folder.resolve() / "src")
        fixed = {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **fixed}
        self.folder = folder

    def spar(self, *arguments: str | Path) -> str:
        command = [sys.executable, "-m", "spar", *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, cwd=self.work, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.folder}: {' '.join(command)} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def train(self) -> None:
        """Every logged value of every stage of `tiny`, in the order written, and the tensors of the finished model."""
        self.spar("train", "tiny", "--run", "run")
        for line in (self.work / "run" / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            where = f"train/{row.pop('stage')}/{row.pop('step')}"
            self.record[where] = [value for name, value in row.items() if name not in NOT_COMPARED]
        for path in sorted((self.work / "run" / "model").rglob("*.safetensors")):
            with safe_open(path, framework="numpy") as file:
                for name in sorted(file.keys()):
                    tensor = file.get_tensor(name)
                    part = path.parent.relative_to(self.work / "run" / "model")
                    self.record[f"tensor/{part}/{name}"] = digest(tensor.tobytes() + str(tensor.shape).encode())

    def tasks(self) -> None:
        """The bundled model: images by their pixels, answers as text; then images by what `spar info` reads of them."""
        self.spar("generate", *PROMPTS, "--seed", "0", "-o", "drawn")
        drawn = sorted((self.work / "drawn").iterdir())
        for path, text in zip(drawn, PROMPTS, strict=True):
            self.record[f"generate/{text}"] = pixels(path)
        for index, text in enumerate(INSTRUCTIONS):
            self.spar("edit", drawn[index], text, "--seed", "1", "-o", f"edited-{index}.png")
            self.record[f"edit/{text}"] = pixels(self.work / f"edited-{index}.png")
        self.spar("reconstruct", *drawn[:5], "-o", "rebuilt")
        for path in sorted((self.work / "rebuilt").iterdir()):
            self.record[f"reconstruct/{path.name}"] = pixels(path)
        for path in drawn[:5]:
            answers = self.spar("understand", path, *QUESTIONS).splitlines()
            for question, answer in zip(QUESTIONS, answers, strict=True):
                self.record[f"understand/{path.name}/{question}"] = answer
        info = json.loads(self.spar("info", "--json", "edited-0.png"))
        self.record |= {f"info/{name}": value for name, value in flat(info)}

    def api(self) -> None:
        """The replies to a fixed set of requests, right and wrong ones."""
        command = [sys.executable, "-m", "spar", "serve", "--port", "0"]
        server = subprocess.Popen(
            command, env=self.environment, cwd=self.work, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+?(?=[,\s])", server.stdout.readline())
            assert found, "the server printed no address"
            image = (self.work / "drawn" / "0.png").read_bytes()
            for name, method, path, body in requests(image):
                status, reply = ask(found[0], method, path, body)
                self.record |= {f"api/{name}/status": status}
                self.record |= {f"api/{name}/{key}": value for key, value in flat(readable(reply))}
        finally:
            server.terminate()
            server.wait()


def requests(image: bytes) -> list[tuple[str, str, str, Any]]:
    """(name, method, path, body): a dictionary goes as JSON, a list of pairs as a form."""
    shown = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(image).decode()}}

    def chat(*texts: str, **fields: Any) -> dict[str, Any]:
        content = [shown, *({"type": "text", "text": text} for text in texts)]
        return {"messages": [{"role": "user", "content": content}], **fields}

    draw = {"prompt": PROMPTS[1], "seed": 3}
    return [
        ("models", "GET", "/v1/models", None),
        ("health", "GET", "/health", None),
        ("generation", "POST", "/v1/images/generations", draw | {"n": 2}),
        ("generation-jpeg", "POST", "/v1/images/generations", draw | {"output_format": "jpeg", "size": "64x96"}),
        ("generation-steps", "POST", "/v1/images/generations", draw | {"num_inference_steps": 4, "guidance_scale": 1}),
        ("generation-negative", "POST", "/v1/images/generations", draw | {"negative_prompt": "a blue star"}),
        ("edit", "POST", "/v1/images/edits", [("image", image), ("prompt", INSTRUCTIONS[0]), ("seed", "5")]),
        ("reconstruct", "POST", "/v1/reconstruct", [("image", image)]),
        ("chat", "POST", "/v1/chat/completions", chat(QUESTIONS[0])),
        ("chat-long", "POST", "/v1/chat/completions", chat(QUESTIONS[3], max_tokens=3)),
        ("chat-stream", "POST", "/v1/chat/completions", chat(QUESTIONS[3], stream=True)),
        ("wrong-size", "POST", "/v1/images/generations", draw | {"size": "65x65"}),
        ("wrong-field", "POST", "/v1/images/generations", draw | {"colour": "red"}),
        ("wrong-word", "POST", "/v1/images/generations", draw | {"prompt": "an elephant"}),
        ("wrong-steps", "POST", "/v1/images/generations", draw | {"num_inference_steps": 10**6}),
        ("wrong-json", "POST", "/v1/images/generations", b"{"),
        ("wrong-image", "POST", "/v1/images/edits", [("image", b"no image"), ("prompt", INSTRUCTIONS[0])]),
        ("wrong-temperature", "POST", "/v1/chat/completions", chat(QUESTIONS[0], temperature=1.0)),
        ("wrong-model", "POST", "/v1/chat/completions", chat(QUESTIONS[0], model="other")),
        ("wrong-path", "GET", "/v1/nothing", None),
    ]  # fmt: skip


def measure(folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        checkout = Checkout(folder, Path(work))
        checkout.train()
        checkout.tasks()
        checkout.api()
        return checkout.record


def ask(address: str, method: str, path: str, body: Any) -> tuple[int, str]:
    kind = "application/json"
    if isinstance(body, list):
        body, kind = form(body)
    elif isinstance(body, dict):
        body = json.dumps(body).encode()
    request = urllib.request.Request(address + path, body, {"content-type": kind}, method=method)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def form(fields: list[tuple[str, str | bytes]]) -> tuple[bytes, str]:
    """multipart/form-data and its content type; bytes go as a file."""
    boundary, parts = uuid.uuid4().hex, b""
    for name, value in fields:
        file = '; filename="image.png"\r\ncontent-type: image/png' if isinstance(value, bytes) else ""
        head = f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts += head.encode() + (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return parts + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def readable(reply: str) -> Any:
    """A reply as JSON, a stream of events as a list, anything else as text."""
    try:
        if reply.startswith("data: "):
            return [json.loads(line[6:]) for line in reply.split("\n\n") if line.startswith("data: {")]
        return json.loads(reply)
    except json.JSONDecodeError:
        return reply


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """(path, leaf) of nested JSON, images by their pixels, without values that differ in each run."""
    if isinstance(value, dict):
        return [pair for key, one in value.items() if key not in NOT_COMPARED for pair in flat(one, f"{name}.{key}")]
    if isinstance(value, list):
        return [pair for index, one in enumerate(value) for pair in flat(one, f"{name}[{index}]")]
    return [(name, pixels(BytesIO(base64.b64decode(value))) if name.endswith("b64_json") else value)]


def pixels(source: Path | BytesIO) -> str:
    with Image.open(source) as image:
        return digest(image.tobytes() + str((image.mode, image.size)).encode())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    with ThreadPoolExecutor(2) as both:
        before, after = both.map(measure, (arguments.before, arguments.after))
    different = [name for name in before | after if before.get(name) != after.get(name)]
    for name in different:
        print(f"{name}\n  before: {before.get(name)}\n  after:  {after.get(name)}")
    kinds = Counter(name.split("/")[0] for name in before)
    print(json.dumps({"benchmark": "compare_commits", "compared": kinds, "different": len(different)}))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
