"""The example scripts, as a user runs them, at tiny size."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from spar.common.config import read_json

ROOT = Path(__file__).parents[1]
SMALL = ["--data.workers", "0"]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script with this interpreter's `spar`, `python` and `torchrun` first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "examples" / script), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)


@pytest.fixture
def data(tmp_path, write_captioned) -> Path:
    """Images of the shapes world with captions, in a folder."""
    folder = tmp_path / "own"
    write_captioned(folder, 12)
    return folder


@pytest.mark.slow
def test_a_folder_of_ones_own_trains_lora_and_draws(tiny_run, data, tmp_path):
    done = run(
        "own_folder.sh", str(data), "a red circle", *SMALL,
        RECIPE="tiny", MODEL=str(tiny_run.path / "model"), RUN=str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert Image.open(tmp_path / "run" / "drawn.png").size == (64, 64)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert read_json(tmp_path / "run-features" / "cache.json")["samples"] == 12


@pytest.mark.slow
def test_unilips_checkpoint_is_converted_and_trained_on(data, tmp_path):
    """A tiny random checkpoint in UniLIP's format, sizes and forms taken from what it was converted to."""
    foreign = load(ROOT / "tests" / "checkpoints" / "foreign.py")
    conversion = load(ROOT / "tests" / "checkpoints" / "test_from_unilip.py")
    foreign.mllm, foreign.dit = (functools.partial(make, layers=6) for make in (foreign.mllm, foreign.dit))
    conversion.write_published(foreign, tmp_path)
    parts = " ".join(f"--{part} {tmp_path / part}" for part in ("mllm", "autoencoder", "dit"))
    steps = [
        word
        for stage in ("unified-2", "unified-3")
        for pair in (("steps", "2"), ("batch", "2"), ("warmup", "1"))
        for word in (f"--stages.{stage}.{pair[0]}", pair[1])
    ]
    done = run(
        "warm_start.sh", str(tmp_path / "model"), str(data), *steps, *SMALL, "--alignment.hidden", "8",
        RUN=str(tmp_path / "run"), CONVERT=parts,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    model = read_json(tmp_path / "run" / "model" / "config.json")["model"]
    assert model["streams"]["fusion"] == "residual" and model["text"]["hidden_size"] == 32


@pytest.mark.slow
def test_a_launch_on_several_machines_works_with_one(tiny_run, tmp_path):
    done = run(
        "multi_node.sh", "tiny", "unified-2", "--init-from", str(tiny_run.path / "model"),
        "--stages.unified-2.optimizer", "adamw",
        GPUS="2", DEVICE="cpu", RUN=str(tmp_path / "run"), HEAD="localhost:0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    parts = sorted(path.name for path in (tmp_path / "run" / "unified-2" / "done").glob("modules*"))
    assert parts == ["modules-00000-of-00002.safetensors", "modules-00001-of-00002.safetensors"]
