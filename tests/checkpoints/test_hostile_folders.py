"""Folders of models made to harm: a few bytes cost neither memory nor minutes, and every one gets a message."""

import json
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spar.checkpoints.dualtoken_format import DualTokenBundle, load_dualtoken, save_dualtoken
from spar.checkpoints.inspect import inspect
from spar.checkpoints.spar_format import (
    ModelBundle,
    SamplingConfig,
    load_model,
    load_tokenizer,
    load_training_part,
    save_model,
)
from spar.common.config import MAX_JSON_BYTES, to_dict
from spar.common.errors import InputError
from spar.models.dualtoken.model import DualTokenModel
from spar.models.encoder import SemanticEncoder
from spar.models.spar import SparModel
from spar.recipes import recipe
from spar.recipes.tiny import TINY_MODEL
from spar.worlds.shapes.tokenizer import build_tokenizer

DUALTOKEN = recipe("dualtoken-tiny").model
LOAD = {"spar": load_model, "dualtoken": load_dualtoken}
HUGE = (10**4, 10**9, 2**62, 2**63, 10**400)
SECONDS, MIB = 5, 300


def numbers(values: dict, *path: str) -> list[tuple[str, ...]]:
    """The places of all whole numbers in nested objects, but for those of a token."""
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += numbers(value, *path, name)
        elif type(value) is int and not name.endswith("token_id"):
            found.append((*path, name))
    return found


PLACES = [("spar", *path) for path in numbers(to_dict(TINY_MODEL))]
PLACES += [("dualtoken", *path) for path in numbers(to_dict(DUALTOKEN))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root, words = tmp_path_factory.mktemp("models"), build_tokenizer()
    teacher = SemanticEncoder(TINY_MODEL.vision, TINY_MODEL.text)
    save_model(ModelBundle(SparModel(TINY_MODEL), words, SamplingConfig(), teacher=teacher), root / "spar")
    save_dualtoken(DualTokenBundle(DualTokenModel(DUALTOKEN), words), root / "dualtoken")
    return {name: root / name for name in LOAD}


@pytest.fixture
def copy(folders, tmp_path):
    """`copy(system)`: a copy of its folder, to change."""
    return lambda system: shutil.copytree(folders[system], tmp_path / system)


def edit(folder: Path, change) -> None:
    """Change the header of a folder, and that of its tokenizer alike."""
    for path in (folder / "config.json", folder / "tokenizer" / "config.json"):
        if path.exists():
            header = json.loads(path.read_text())
            change(header)
            path.write_text(json.dumps(header))


def refused(load, folder: Path, match: str | None = None) -> str:
    """The message of a refusal that takes neither long nor much memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(InputError, match=match) as caught:
        load(folder)
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MIB * 1024
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_sizes_that_the_weights_do_not_bear_out_cost_nothing(copy, place):
    system, *path, name = place
    folder = copy(system)
    for value in HUGE:
        def change(header, value=value):
            part = header["model"]
            for step in path:
                part = part[step]
            part[name] = value

        edit(folder, change)
        if name == "max_positions" and value == 10**4:  # a longer context, which no weight shows
            assert LOAD[system](folder).model.config.text.max_positions == value
            continue
        refused(LOAD[system], folder)
        refused(inspect, folder)


@pytest.mark.parametrize(
    "value", [[10**9], [10**9] * 4, [0] * 4, [-1] * 4, [], [[]] * 4, [[10**9]] * 4, ["x" * 100] * 4]
)
@pytest.mark.parametrize("name", sorted(to_dict(TINY_MODEL)["autoencoder"]))
def test_lists_that_the_weights_do_not_bear_out_cost_nothing(copy, folders, name, value):
    if value == to_dict(TINY_MODEL)["autoencoder"][name]:
        return
    folder = copy("spar")
    edit(folder, lambda header: header["model"]["autoencoder"].update({name: value}))
    refused(load_model, folder)
    refused(load_tokenizer, folder / "tokenizer")


def test_the_parts_for_training_are_no_way_around(copy):
    folder = copy("spar")
    edit(folder, lambda header: header["model"]["vision"].update(image_size=40_000))
    refused(lambda path: load_training_part(path, "teacher"), folder)


@pytest.mark.parametrize("system", LOAD)
@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", "1e999", "-1e999"])
def test_settings_are_finite(copy, system, value):
    def places(values: dict, *path: str) -> list[tuple[str, ...]]:
        found = []
        for name, one in values.items():
            found += places(one, *path, name) if isinstance(one, dict) else [(*path, name)] * (type(one) is float)
        return found

    folder = copy(system)
    plain = json.loads((folder / "config.json").read_text())
    both = [(part, *place) for part in ("model", "sampling") for place in places(plain[part])]
    for *path, name in both:
        header = json.loads(json.dumps(plain))
        part = header
        for step in path:
            part = part[step]
        part[name] = "HERE"
        for file in (folder / "config.json", folder / "tokenizer" / "config.json"):
            if file.exists():
                own = json.loads(file.read_text()) | {"model": header["model"]}
                own |= {"sampling": header["sampling"]} if "sampling" in own else {}
                file.write_text(json.dumps(own).replace('"HERE"', value))
        refused(LOAD[system], folder, f"{name}: expected a finite number")


@pytest.mark.parametrize("system", LOAD)
@pytest.mark.parametrize(
    "text",
    [
        '{"format": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"format": ' * 100_000 + "1" + "}" * 100_000,
        '{"format": ' + "9" * 5000 + "}",
        '{"format": "spar", "format": ["spar"]}',
        '{"format": {}, "model_type": []}',
        '"\\ud800"',
        "[]",
    ],
)
def test_json_of_any_form_gets_a_message(copy, system, text):
    folder = copy(system)
    for name in ("config.json", "manifest.json"):
        for load in (LOAD[system], inspect):
            kept = (folder / name).read_bytes()
            (folder / name).write_text(text)
            if name == "config.json" or "format" not in text[:40] or len(text) > 1000:
                refused(load, folder)
            (folder / name).write_bytes(kept)


@pytest.mark.parametrize("system", LOAD)
def test_a_file_of_json_has_a_limit(copy, system):
    folder = copy(system)
    with (folder / "config.json").open("ab") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    assert "expected a file of at most 64 MiB of JSON" in refused(LOAD[system], folder)


@pytest.mark.parametrize("system", LOAD)
@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_weights_are_floating_numbers(copy, system, kind):
    folder = copy(system)
    path = folder / "language" / "model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[0]
    save_file({**tensors, key: tensors[key].to(kind)}, path)
    name = str(kind).removeprefix("torch.")
    for load in (LOAD[system], inspect):
        assert f"1 of another type ({key} is {name}, expected float32)" in refused(load, folder)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_floating_type_are_loaded_in_float32(copy, kind):
    folder = copy("spar")
    path = folder / "router" / "model.safetensors"
    save_file({key: value.to(kind) for key, value in load_file(path).items()}, path)
    assert {value.dtype for value in load_model(folder).model.router.state_dict().values()} == {torch.float32}


def test_a_header_of_types_and_shapes_that_torch_has_not_gets_a_message(copy):
    folder = copy("spar")
    path = folder / "router" / "model.safetensors"
    for kind, shape in (("F4", [2, 0]), ("F32", [2**63, 0]), ("F32", [2**64 - 1, 0]), ("F99", [0])):
        header = json.dumps({"alpha": {"dtype": kind, "shape": shape, "data_offsets": [0, 0]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        for load in (load_model, inspect):
            refused(load, folder)


@pytest.mark.parametrize("scale", [float("inf"), float("-inf"), 1e300, 10**400, True, [1.0]])
def test_a_latent_scale_is_a_usable_number(copy, scale):
    folder = copy("spar")
    path = folder / "tokenizer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "latent_scale": scale}))
    for load, place in ((load_model, folder), (load_tokenizer, folder / "tokenizer"), (inspect, folder)):
        refused(load, place, "expected latent_scale above 0")


@pytest.mark.parametrize(
    ("system", "name", "values"),
    [
        ("spar", "steps", [0, -1, 1001, 2**62, 2.5, True, None, "20"]),
        ("spar", "guidance", [-1.0, 101, 1e300, True, None]),
        ("spar", "shift", [0, -1.0, 1e-9, 1e9]),
        ("spar", "method", ["", "ddim", None, 3]),
        ("spar", "max_prompt_tokens", [0, -1, 10**9, 2.5]),
        ("dualtoken", "temperature", [-1, 101]),
        ("dualtoken", "top_k", [-1, 2**21, 1.5]),
        ("dualtoken", "top_p", [0, -1, 1.5]),
        ("dualtoken", "guidance", [-1, 101]),
    ],
)
def test_sampling_defaults_are_checked_when_they_are_read(copy, system, name, values):
    folder = copy(system)
    for value in values:
        edit(folder, lambda header, value=value: header.get("sampling", {}).update({name: value}))
        for load in (LOAD[system], inspect):
            assert "config.json" in refused(load, folder, name)


@pytest.mark.parametrize("value", [0, -1, 10**9, 2.5, "64", None])
def test_dualtokens_longest_prompt_is_a_number_that_fits(copy, value):
    folder = copy("dualtoken")
    edit(folder, lambda header: header.update(max_prompt_tokens=value))
    for load in (load_dualtoken, inspect):
        refused(load, folder, "expected max_prompt_tokens of at least 1 and at most 512")
