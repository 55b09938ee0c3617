"""A folder looked over by its headers: what loading would refuse is refused, and the numbers are the model's."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from spar.checkpoints.inspect import inspect
from spar.checkpoints.spar_format import load_model, load_teacher, save_model
from spar.common.config import read_json, write_json
from spar.common.errors import InputError


@pytest.fixture(scope="module")
def folder(tiny_run):
    return tiny_run.path / "model"


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_the_numbers_are_the_loaded_models(folder):
    found, loaded = inspect(folder), load_model(folder)
    for part in found.parts:
        module = load_teacher(folder) if part.name == "teacher" else getattr(loaded.model, part.name, None)
        assert part.name == "pixel_encoder" or part.parameters == sum(t.numel() for t in module.state_dict().values())
    assert found.parameters == sum(t.numel() for t in loaded.model.state_dict().values())
    assert (found.config, found.sampling, found.manifest) == (loaded.model.config, loaded.sampling, loaded.manifest)
    assert found.versions["torch"] == torch.__version__


def test_types_and_bytes_are_those_on_the_disk(folder, tmp_path):
    loaded = load_model(folder)
    save_model(loaded, tmp_path / "half", torch.bfloat16)
    plain, half = inspect(folder), inspect(tmp_path / "half")
    assert {part.types for part in plain.parts if part.name != "pixel_encoder"} == {("float32",)}
    assert {part.types for part in half.parts} == {("bfloat16",)}
    for part in half.parts:
        assert part.bytes == (tmp_path / "half" / part.name / "model.safetensors").stat().st_size
        assert part.bytes >= 2 * part.parameters


def test_a_tokenizer_alone_is_looked_over_too(folder):
    found = inspect(folder / "tokenizer")
    assert found.format == "spar-tokenizer" and found.sampling is None and found.manifest == {}
    assert [part.name for part in found.parts] == ["tokenizer"] and found.parts[0] == inspect(folder).parts[0]


def test_what_loading_would_refuse_is_refused(copy):
    path = copy / "router" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "more": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="router does not fit this model: 1 unexpected .more"):
        inspect(copy)
    save_file({**tensors, "alpha": torch.zeros(7)}, path)
    with pytest.raises(InputError, match=r"alpha is \(7,\), expected \(4,\)"):
        inspect(copy)
    path.write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="damaged or no safetensors file"):
        inspect(copy)
    path.unlink()
    with pytest.raises(InputError, match="model.safetensors is missing"):
        inspect(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent_scale": 0.0}, "expected latent_scale above 0, got 0.0"),
        ({"latent_scale": None}, "expected latent_scale above 0, got None"),
        ({"format_version": 99}, "has format version 99"),
        ({"model": None}, "gives other sizes than the model's own"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_does_not_belong_is_refused_by_looking_and_by_loading(copy, change, words):
    path = copy / "tokenizer" / "config.json"
    header = read_json(path)
    if "model" in change:
        change = {"model": {**header["model"], "connector": {**header["model"]["connector"], "queries": 5}}}
    write_json(path, {**header, **change})
    for look in (inspect, load_model):
        with pytest.raises(InputError, match=words):
            look(copy)


def test_other_folders_get_a_message(copy, tmp_path):
    with pytest.raises(InputError, match="which does not exist"):
        inspect(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="config.json is missing"):
        inspect(tmp_path / "empty")
    (copy / "config.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(InputError, match="its config.json says format 'other'"):
        inspect(copy)


def test_scores_are_numbers_whatever_a_manifest_holds(copy, folder):
    found = inspect(folder)
    scores = {"shapes-gen": {"overall": 0.5, "words": "good", "flag": True}, "x": 3}
    assert replace(found, manifest={"scores": scores}).scores == {"shapes-gen": {"overall": 0.5}}
    assert [replace(found, manifest={"scores": value}).scores for value in (None, [], "x", {})] == [{}] * 4
    write_json(copy / "manifest.json", {**read_json(copy / "manifest.json"), "scores": scores})
    assert inspect(copy).scores == {"shapes-gen": {"overall": 0.5}}


def test_the_folder_of_a_run_is_refused_with_that_of_its_model(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(InputError, match=r"config.json is missing in .*run$"):
        inspect(run)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"missing in .*run: expected the folder of its model, .*run/model$"):
        inspect(run)
