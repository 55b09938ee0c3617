"""What the package computed when these values were recorded, in float32: a rename or a move changes nothing.

`python tests/test_golden.py` records them anew, for a change that is to change results (docs/log.md says why).
Other processors round otherwise, and Muon's iteration runs in bfloat16 everywhere, hence the tolerances.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spar.inference.pipeline import SparPipeline
from spar.recipes import recipe
from spar.training.distributed import ParallelismConfig
from spar.training.trainer import train

VALUES = Path(__file__).parent / "golden" / "values.json"
PROMPTS = ("a large red circle to the left of a small blue star", "two blue squares on a white background")
INSTRUCTION = "change the background to navy"
QUESTIONS = ("what color is the background?", "how many objects are there?", "describe the image")
CELLS = 8  # an image is compared as the means of this many squares a side
LEVELS = 2  # of 255, by which a mean may differ


def means(image: Image.Image) -> list[list[list[int]]]:
    """`[CELLS, CELLS, 3]` levels of 0 to 255."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    size = pixels.shape[0] // CELLS
    return np.rint(pixels.reshape(CELLS, size, CELLS, size, 3).mean((1, 3))).astype(int).tolist()


def losses(run: Path) -> dict[str, list[float]]:
    """The loss of every step of every stage of `tiny`."""
    found: dict[str, list[float]] = {}
    train(
        recipe("tiny"), run, parallelism=ParallelismConfig(precision="fp32"),
        report=lambda stage, step, steps, values: found.setdefault(stage, []).append(round(values["loss"], 6)),
    )  # fmt: skip
    return found


def tasks() -> dict[str, Any]:
    """The four tasks with the bundled weights."""
    pipe = SparPipeline.from_pretrained(dtype=torch.float32, device="cpu")
    drawn = pipe.generate(PROMPTS, seed=0, num_inference_steps=6).images
    edited = pipe.edit(drawn[0], INSTRUCTION, seed=1, num_inference_steps=6).images[0]
    return {
        "generate": [means(image) for image in drawn],
        "edit": means(edited),
        "reconstruct": means(pipe.reconstruct(drawn[1]).images[0]),
        "understand": pipe.understand(drawn[1], QUESTIONS).texts,
    }


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return json.loads(VALUES.read_text(encoding="utf-8"))


def test_the_four_tasks_give_what_they_gave(values):
    found = tasks()
    assert found["understand"] == values["understand"]
    for task in ("generate", "edit", "reconstruct"):
        assert np.abs(np.array(found[task]) - np.array(values[task])).max() <= LEVELS, task


@pytest.mark.slow
def test_every_stage_has_the_losses_that_it_had(values, tmp_path):
    found = losses(tmp_path / "run")
    assert found.keys() == values["losses"].keys()
    for stage, recorded in values["losses"].items():
        assert found[stage] == pytest.approx(recorded, rel=0.01, abs=1e-3), stage


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = {**tasks(), "losses": losses(Path(folder) / "run")}
    VALUES.write_text(json.dumps(found) + "\n", encoding="utf-8")
    sys.stdout.write(f"{VALUES}\n")
