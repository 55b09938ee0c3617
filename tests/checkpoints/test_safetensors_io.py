"""Tensors on disk: whole or in shards the same, and no index is believed blindly."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spar.checkpoints.safetensors_io import (
    JoinedTensors,
    PartTensors,
    SafetensorsReader,
    load_into_meta,
    read_tensors,
    write_tensors,
)
from spar.common.errors import InputError


@pytest.fixture
def module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), nn.Embedding(4, 100))


@pytest.fixture
def sharded(module, tmp_path):
    """Shards of at most 600 bytes, but for one tensor that is larger alone."""
    write_tensors(module.state_dict(), tmp_path / "model.safetensors", shard_bytes=600)
    return tmp_path / "model.safetensors"


def test_shards_hold_what_one_file_holds(module, sharded, tmp_path):
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == 4 and files[0] == "model-00001-of-00004.safetensors" and not sharded.exists()
    sizes = [sum(t.nbytes for t in load_file(tmp_path / name).values()) for name in files]
    assert all(size <= 600 for size in sorted(sizes)[:-1])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(p.nbytes for p in module.parameters())
    read = read_tensors(sharded)
    assert read.keys() == module.state_dict().keys()
    assert all(torch.equal(value, read[key]) for key, value in module.state_dict().items())


def test_shapes_are_known_without_reading_and_tensors_outlive_their_file(module, sharded):
    files = SafetensorsReader(sharded)
    assert {key: value.shape for key, value in files.shapes.items()} == {
        key: value.shape for key, value in module.state_dict().items()
    }
    assert all(value.is_meta for value in files.shapes.values())
    weight = files.read("0.weight")
    with open(files.files[0], "r+b") as file:
        file.truncate(10)
    assert torch.equal(weight, module[0].weight)


def test_rows_are_read_alone_from_shards_from_joined_sources_and_from_values_that_stand_in(module, sharded, tmp_path):
    own, files = module.state_dict(), SafetensorsReader(sharded)
    joined = JoinedTensors({"a.": files, "b.": files}, {"b.6.weight": torch.ones(3, 2)})
    assert joined.shapes.keys() == {f"{prefix}.{key}" for prefix in "ab" for key in own}
    assert joined.shapes["b.6.weight"].shape == (3, 2) and joined.shapes["a.6.weight"].shape == (4, 100)
    for rows in (slice(0, 4), slice(1, 3), slice(2, 2), slice(3, 4)):
        for source, key in ((files, "6.weight"), (joined, "a.6.weight"), (PartTensors(joined, "a."), "6.weight")):
            assert torch.equal(source.read_rows(key, rows), own["6.weight"][rows])
    assert torch.equal(joined.read_rows("b.6.weight", slice(1, 3)), torch.ones(2, 2))
    assert PartTensors(joined, "b.").read("6.weight", torch.float16).dtype == torch.float16
    write_tensors(PartTensors(joined, "a."), tmp_path / "again.safetensors")
    again = read_tensors(tmp_path / "again.safetensors")
    assert again.keys() == own.keys() and all(torch.equal(value, again[key]) for key, value in own.items())
    piece = files.read_rows("6.weight", slice(1, 2))
    for file in files.files:
        with open(file, "r+b") as opened:
            opened.truncate(10)
    assert torch.equal(piece, own["6.weight"][1:2])


def test_a_module_without_memory_gets_the_stored_weights(module, sharded):
    with torch.device("meta"):
        other = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), nn.Embedding(4, 100))
    load_into_meta(other, SafetensorsReader(sharded))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in module.state_dict().items())
    with pytest.raises(InputError, match=r"\d does not fit this model: .*unexpected \(1.bias, 1.weight, 2.bias"):
        load_into_meta(nn.Sequential(nn.Linear(8, 8)), SafetensorsReader(sharded))


def rename_a_shard(index: dict, name: str) -> None:
    first = next(iter(index["weight_map"].values()))
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: rename_a_shard(i, "../secret.safetensors"), "names of files beside it, got '../secret.safetensors'"),
        (lambda i: rename_a_shard(i, "gone.safetensors"), "gone.safetensors is missing in"),
        (lambda i: i["weight_map"].pop("0.weight"), "disagree about 1 tensors, 0.weight among them"),
        (lambda i: i["weight_map"].update(ghost=i["weight_map"]["0.weight"]), "disagree about 1 tensors, ghost among"),
        (lambda i: i.pop("weight_map"), "expected a weight_map"),
        (lambda i: i.update(weight_map={}), "expected a weight_map"),
    ],
)
def test_an_index_that_its_shards_do_not_bear_out_is_refused(sharded, change, message):
    path = sharded.with_name("model.safetensors.index.json")
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        SafetensorsReader(sharded)


def test_a_damaged_shard_is_refused_by_name(sharded, tmp_path):
    (tmp_path / "model-00002-of-00004.safetensors").write_bytes(b"\x80\x04pickle" * 99)
    with pytest.raises(InputError, match="model-00002-of-00004.safetensors is damaged or no safetensors file"):
        read_tensors(sharded)


def test_integers_keep_their_type_where_floats_are_converted(tmp_path):
    save_file({"n": torch.tensor([3]), "x": torch.tensor([0.5])}, tmp_path / "a.safetensors")
    files = SafetensorsReader(tmp_path / "a.safetensors")
    assert files.read("n", torch.bfloat16).dtype == torch.int64
    assert files.read("x", torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_neither_written_nor_loaded(tmp_path, value):
    from safetensors.torch import save_file

    tensors = {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, value])}
    said = "^part/model.safetensors: expected finite weights, got bias with numbers that are not, in float32$"
    with pytest.raises(InputError, match=said):  # without the passing name of a folder that is written aside
        write_tensors(tensors, tmp_path / ".model.1-0.part" / "part" / "model.safetensors")
    assert not [*tmp_path.rglob("*.safetensors")]
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        module = torch.nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"model.safetensors: expected finite weights, got bias"):
        load_into_meta(module, SafetensorsReader(tmp_path / "model.safetensors"))


def test_eight_bits_are_judged_written_and_loaded_as_any_other_type(tmp_path):
    tensors = {"weight": torch.tensor([[0.5, -1.75, 448.0], [0.0, 2**-9, 1.0]]), "bias": torch.zeros(2)}
    small = {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}
    write_tensors(small, tmp_path / "model.safetensors")
    with torch.device("meta"):
        module = torch.nn.Linear(3, 2)
    load_into_meta(module, SafetensorsReader(tmp_path / "model.safetensors"))
    assert torch.equal(module.weight, tensors["weight"]) and module.weight.dtype == torch.float32
    small["bias"] = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match="got bias with numbers that are not, in float8_e4m3fn"):
        write_tensors(small, tmp_path / "model.safetensors")


def test_a_number_that_a_smaller_type_cannot_hold_is_refused(tmp_path):
    tensors = {"weight": torch.tensor([1e6])}
    with pytest.raises(InputError, match="got weight with numbers that are not, in float16"):
        write_tensors(tensors, tmp_path / "model.safetensors", torch.float16)
    write_tensors(tensors, tmp_path / "model.safetensors", torch.bfloat16)
