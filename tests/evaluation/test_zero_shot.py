"""Zero-shot on image folders: planted classes, and a model whose answers are known."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from spar.cli.main import main
from spar.common.errors import InputError
from spar.evaluation.options import EvalOptions
from spar.evaluation.results import read_result
from spar.evaluation.zero_shot import class_names, zero_shot
from spar.inference.dualtoken import DualTokenPipeline

COLORS = {"deep_blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (48, 40), color).save(root / name / f"{index}.png")
        (root / name / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    return root


class Seeing:
    """Knows a color when it sees it; unquantised it always says the first label."""

    def __init__(self, words):
        self.words, self.sizes = words, []

    def classify(self, image, labels, *, quantized=True):
        self.labels = list(labels)
        self.sizes.append(len(image))
        if not quantized:
            return [0] * len(image)
        seen = [Image.open(path).getpixel((0, 0)) for path in image]
        return [self.labels.index(self.words[color]) for color in seen]


def test_images_are_classified_among_the_subfolders_names(folder):
    words = {color: f"a photo of a {name.replace('_', ' ')}." for name, color in COLORS.items()}
    pipe = Seeing(words)
    result = zero_shot(pipe, folder, EvalOptions(batch=5))
    assert result.score("overall").value == 1.0 and result.score("overall").n == 12
    assert result.score("part.unquantized").value == pytest.approx(1 / 3)
    assert pipe.labels == ["a photo of a deep blue.", "a photo of a green.", "a photo of a red."]
    assert max(pipe.sizes) == 5
    assert result.details["images"][0] == {
        "image": "deep_blue/0.png", "expected": "a photo of a deep blue.", "answer": "a photo of a deep blue."
    }
    assert result.settings["labels"] == 3 and result.settings["template"] == "a photo of a {}."


def test_a_wrong_answer_counts_and_the_limit_is_of_each_class(folder):
    words = {color: "one red" for color in COLORS.values()}
    names = folder.parent / "names.json"
    names.write_text(json.dumps({"deep_blue": "blue", "green": "green", "red": " red "}))
    pipe = Seeing(words)
    result = zero_shot(pipe, folder, EvalOptions(limit=2), template="one {}", names=names)
    assert pipe.labels == ["one blue", "one green", "one red"]
    assert result.score("overall").n == 6 and result.score("overall").value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: [path.unlink() for path in (root / "red").glob("*.png")], "expected images"),
        (lambda root: root.rename(root.with_name("elsewhere")), "expected a folder of classes"),
        (lambda root: [(root / name).rename(root / f".{name}") for name in COLORS], "found 0"),
    ],
)
def test_folders_that_hold_no_classes_are_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        zero_shot(Seeing({}), folder)


def test_a_template_and_names_must_fit(folder):
    with pytest.raises(InputError, match="expected one {} for the class's name, got 'a photo'"):
        zero_shot(Seeing({}), folder, template="a photo")
    names = folder.parent / "names.json"
    names.write_text(json.dumps({"deep_blue": "blue", "green": "", "red": "red"}))
    with pytest.raises(InputError, match="expected a name for the class 'green', got ''"):
        class_names(folder, names)
    whole = {"deep_blue": "blue", "green": "green", "red": "red"}
    names.write_text(json.dumps(whole), encoding="utf-8-sig")  # as some editors write it
    assert class_names(folder, names) == whole
    with pytest.raises(InputError, match="a model with a text tower"):
        zero_shot(object(), folder)


def test_a_model_classifies_a_folder_and_names_an_image_that_it_cannot_read(dual_run, folder):
    pipe = DualTokenPipeline.from_pretrained(dual_run.path / "model", dtype=torch.float32, device="cpu")
    (folder / "deep_blue").rename(folder / "blue")
    result = zero_shot(pipe, folder, EvalOptions(batch=5), template="a {} circle")
    assert 0 <= result.score("overall").value <= 1
    with pytest.raises(InputError, match=r"^template 'a zebra \{\}', label: unknown words zebra"):
        zero_shot(pipe, folder, EvalOptions(batch=5), template="a zebra {}")
    broken = Path(folder / "green" / "2.png")
    broken.write_bytes(b"no image at all")
    with pytest.raises(InputError, match=r"green.2\.png"):
        zero_shot(pipe, folder, EvalOptions(batch=5), template="a {} circle")


def test_the_command_scores_a_folder(dual_run, folder, tmp_path, capsys):
    (folder / "deep_blue").rename(folder / "blue")
    out = tmp_path / "scores.json"
    model = str(dual_run.path / "model")
    asked = ["eval", "zero-shot", "--model", model, "--images", str(folder), "--template", "a {} star", "-o", str(out)]
    assert main([*asked, "--limit", "2"]) == 0
    result = read_result(out)
    assert result.score("overall").n == 6 and result.settings["template"] == "a {} star"
    assert main(["eval", "zero-shot", "--model", model]) == 2
    assert "zero-shot: expected --images FOLDER" in capsys.readouterr().err
    assert main(["eval", "shapes-codes", "--model", model, "--images", str(folder)]) == 2
    assert "--images belongs to zero-shot and recon, got shapes-codes" in capsys.readouterr().err
