"""The DualToken folder: what `spar info`, the model card and an upload say of it."""

import json
import shutil

import pytest
import torch

from spar.checkpoints.dualtoken_format import PARTS, load_dualtoken, save_dualtoken
from spar.checkpoints.hub import plan_upload
from spar.checkpoints.inspect import inspect
from spar.common.errors import InputError


@pytest.fixture(scope="module")
def folder(dual_run):
    return dual_run.path / "model"


def test_the_inspection_counts_every_part(folder):
    found, model = inspect(folder), load_dualtoken(folder).model
    assert [part.name for part in found.parts] == list(PARTS) and found.format == "dualtoken"
    for part in found.parts:
        assert part.parameters == sum(t.numel() for t in model.get_submodule(part.name).state_dict().values())
    assert str(found.sampling) == (
        "guidance 2.2, temperature 0.7 (times 0.8 for each depth after the first), top-k off, top-p 0.95"
    )


def test_a_damaged_part_is_found_by_the_headers_alone(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    header = json.loads((copy / "config.json").read_text())
    header["model"]["pixel"]["entries"] = 32
    (copy / "config.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match="does not fit this model: .*codebook"):
        inspect(copy)


@pytest.mark.parametrize("value", [0, "64", None])
def test_the_longest_prompt_is_a_number(folder, tmp_path, value):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    header = json.loads((copy / "config.json").read_text())
    header["max_prompt_tokens"] = value
    (copy / "config.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match="expected max_prompt_tokens of at least 1"):
        load_dualtoken(copy)


def test_half_precision_halves_the_file_and_keeps_codes_that_are_whole(folder, tmp_path):
    loaded = load_dualtoken(folder)
    save_dualtoken(loaded, tmp_path / "half", torch.bfloat16)
    whole, half = inspect(folder), inspect(tmp_path / "half")
    assert all(part.types == ("bfloat16",) for part in half.parts)
    assert sum(p.bytes for p in half.parts) < 0.6 * sum(p.bytes for p in whole.parts)
    again = load_dualtoken(tmp_path / "half").model
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value.bfloat16().float())


def test_the_card_says_what_the_system_does_and_does_not(folder):
    card = (folder / "README.md").read_text()
    for said in (
        "# DualToken, recipe dualtoken-tiny", "arXiv 2503.14324", "It does not edit images.",
        "Made for images of 64 x 64 pixels alone.", "- text-to-image", "load_pipeline",
    ):  # fmt: skip
        assert said in card
    assert "SPAR" not in card and "image-to-image" not in card


def test_an_upload_has_every_file_of_the_folder(folder):
    plan = plan_upload(folder)
    assert plan.format == "dualtoken" and plan.ignored == []
    assert {f"{part}/model.safetensors" for part in PARTS} | {"config.json", "README.md"} <= set(plan.files)
