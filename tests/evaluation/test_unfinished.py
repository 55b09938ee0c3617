"""A broken-off `spar eval` goes on where it was, and ends in what an unbroken one gives."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spar.cli.main import main
from spar.common.errors import InputError
from spar.common.process_group import ProcessGroup
from spar.evaluation.unfinished import RecordedPipeline

FLAGS = ["--limit", "2", "--images-per-prompt", "2", "--batch", "5"]


class Drawer:
    """Noise of its seed; stops after so many calls."""

    image_size, system, tasks, manifest = 64, "SPAR", ("generate", "edit", "understand", "reconstruct"), {}

    def __init__(self):
        self.model, self.calls, self.stop = torch.nn.Linear(2, 2), [], None

    def run_metadata(self):
        return {"dtype": "float32", "device": "cpu"}

    def check_text(self, text, what):
        pass

    def _image(self, seed):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))

    def _call(self, name):
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append(name)

    def generate(self, prompt, *, seed, **settings):
        self._call("generate")
        return SimpleNamespace(images=[self._image(one) for one in seed])

    def understand(self, image, question, **settings):
        self._call("understand")
        return SimpleNamespace(texts=[f"{len(text)}" for text in question])

    def reconstruct(self, image):
        self._call("reconstruct")
        return SimpleNamespace(images=[self._image(7) for _ in image])

    def edit(self, image, instruction, *, seed, **settings):
        self._call("edit")
        return SimpleNamespace(images=[self._image(one) for one in seed])

    def chat(self, messages):
        return iter(["red"])


@pytest.fixture
def pipe(monkeypatch, tmp_path):
    drawer = Drawer()
    monkeypatch.setattr("spar.cli.loading.load_pipeline", lambda *_: drawer)
    monkeypatch.chdir(tmp_path)
    return drawer


def told(folder: str) -> dict:
    found = {path.name: json.loads(path.read_text()) for path in Path(folder).iterdir()}
    return {name: (one["scores"], one["details"]) for name, one in found.items()}


def test_a_stopped_evaluation_goes_on_and_ends_as_an_unbroken_one(pipe, capsys):
    assert main(["eval", "all", *FLAGS, "-o", "whole"]) == 0
    whole = len(pipe.calls)
    assert not Path("whole/all.unfinished").exists() and whole > 12
    for stop in (4, whole - 3):
        pipe.calls, pipe.stop = [], stop
        assert main(["eval", "all", *FLAGS, "-o", f"parts{stop}"]) == 130
        assert Path(f"parts{stop}/all.unfinished").is_dir()
        pipe.calls, pipe.stop = [], None
        assert main(["eval", "all", *FLAGS, "-o", f"parts{stop}"]) == 0
        assert len(pipe.calls) == whole - stop
        assert told(f"parts{stop}") == told("whole")
        assert not Path(f"parts{stop}/all.unfinished").exists()
        settings = [json.loads(path.read_text())["settings"] for path in Path(f"parts{stop}").iterdir()]
        kept = [one.get("kept_calls", 0) for one in settings]
        assert sum(kept) == (4 if stop == 4 else max(kept))


def test_one_result_goes_on_too_and_what_is_damaged_is_computed_again(pipe, capsys):
    pipe.stop = 3
    words = ["eval", "shapes-gen", *FLAGS, "-o", "gen.json"]
    assert main(words) == 130
    kept = sorted(Path("gen.json.unfinished/shapes-gen").iterdir())
    assert len(kept) == 3
    kept[1].write_text("{")
    pipe.calls, pipe.stop = [], None
    assert main(words) == 0
    assert len(pipe.calls) == 3  # of five: two were kept
    assert json.loads(Path("gen.json").read_text())["settings"]["kept_calls"] == 2
    assert not Path("gen.json.unfinished").exists()
    assert main(words) == 2 and "exists already" in capsys.readouterr().err


def test_another_call_does_not_go_on_with_it(pipe, capsys):
    pipe.stop = 3
    words = ["eval", "shapes-gen", *FLAGS, "-o", "gen.json"]
    assert main(words) == 130
    pipe.calls, pipe.stop = [], None
    assert main([*words, "--seed", "4"]) == 2
    assert "gen.json.unfinished was begun with another options" in capsys.readouterr().err
    with torch.no_grad():
        pipe.model.weight.add_(1)
    assert main(words) == 2 and "begun with another weights" in capsys.readouterr().err
    assert not pipe.calls
    assert main([*words, "--seed", "4", "--overwrite"]) == 0 and len(pipe.calls) == 5
    assert not Path("gen.json.unfinished").exists()


def test_results_that_are_replaced_go_on_too(pipe):
    words = ["eval", "shapes-gen", *FLAGS, "-o", "gen.json", "--overwrite"]
    assert main(words) == 0
    pipe.calls, pipe.stop = [], 3
    assert main(words) == 130
    pipe.calls, pipe.stop = [], None
    assert main(words) == 0 and len(pipe.calls) == 2


def test_a_call_that_was_refused_does_not_stand_in_the_way_of_the_right_one(pipe, monkeypatch):
    def refuse(*_, **__):
        raise InputError("num_inference_steps: expected 8, got 20")

    words = ["eval", "shapes-gen", *FLAGS, "-o", "gen.json"]
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "generate", refuse)
        assert main([*words, "--steps", "20"]) == 2
    assert main(words) == 0


def test_a_kept_call_is_that_of_the_same_inputs_alone(tmp_path):
    drawer = Drawer()

    def recorded():
        return RecordedPipeline(drawer, tmp_path / "calls", ProcessGroup())

    red, blue = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
    first = recorded().edit([red], ["remove the star"], seed=[3]).images[0]
    again = recorded()
    assert np.array_equal(again.edit([red], ["remove the star"], seed=[3]).images[0], first) and again.kept == 1
    for image, text, seed in ((blue, "remove the star", 3), (red, "remove the ring", 3), (red, "remove the star", 4)):
        other = recorded()
        other.edit([image], [text], seed=[seed])
        assert other.kept == 0
    assert len(drawer.calls) == 4 and recorded().image_size == 64
