import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spar.checkpoints.spar_format import (
    LATER_FIELDS,
    ModelBundle,
    SamplingConfig,
    load_model,
    load_tokenizer,
    read_config,
    save_model,
    save_tokenizer,
)
from spar.common.config import to_dict
from spar.common.errors import InputError
from spar.models.spar import SparModel
from spar.worlds.shapes.tokenizer import build_tokenizer

SCALE = 0.7310584  # no power of two: a scale that went through bfloat16 would show
PARTS = ("tokenizer", "language", "router", "connector", "denoiser")


@pytest.fixture(scope="module")
def loaded(config, randomize) -> ModelBundle:
    model = randomize(SparModel(config))
    model.tokenizer.latent_scale.fill_(SCALE)
    sampling = SamplingConfig(shift=2.5, method="euler", steps=7, guidance=3.0, max_prompt_tokens=33)
    return ModelBundle(model, build_tokenizer(), sampling, {"recipe": "none", "scores": {"x": 0.5}})


@pytest.fixture
def folder(loaded, tmp_path) -> Path:
    save_model(loaded, tmp_path / "model")
    return tmp_path / "model"


def digest(state: dict[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for key in sorted(state):
        whole.update(key.encode() + state[key].numpy().tobytes())
    return whole.hexdigest()


def assert_equal_state(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert own.keys() == other.keys()
    assert [key for key in own if not torch.equal(own[key], other[key])] == []


def test_a_saved_model_comes_back_bit_for_bit(loaded, folder):
    again = load_model(folder)
    assert_equal_state(again.model.state_dict(), loaded.model.state_dict())
    assert again.model.config == loaded.model.config
    assert again.sampling == loaded.sampling and again.manifest == loaded.manifest
    assert not again.model.training and not any(p.requires_grad for p in again.model.parameters())


def test_the_text_tokenizer_comes_back_with_its_special_tokens(loaded, folder):
    again = load_model(folder).text_tokenizer
    text = "<|im_start|>user\ngenerate an image: a red circle<|im_end|>\n"
    assert again.encode(text) == loaded.text_tokenizer.encode(text)
    for name in ("pad_token_id", "eos_token_id", "unk_token_id", "chat_template"):
        assert getattr(again, name) == getattr(loaded.text_tokenizer, name)
    assert set(again.all_special_ids) == set(loaded.text_tokenizer.all_special_ids) != set()


FRESH = """
import sys
from pathlib import Path
import numpy as np
import torch
from spar.checkpoints.spar_format import load_model
loaded = load_model(Path(sys.argv[1]))
sys.path.insert(0, sys.argv[3])
from test_spar_format import digest, image
np.save(sys.argv[2], image(loaded.model).numpy())
print(digest(loaded.model.state_dict()))
"""


def image(model: SparModel) -> torch.Tensor:
    """One step of every part: words and a reference to a velocity, decoded."""
    with torch.no_grad():
        ids = torch.tensor([[1, 9, 3, *[5] * 16, 4, 50, 60]])
        f_v = model.tokenizer.encode(torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)).f_v
        condition = model.condition(ids, torch.ones_like(ids), f_v)
        latent = torch.linspace(-1, 1, 8 * 16).view(1, 8, 4, 4)
        return model.decode(model.velocity(latent, torch.tensor([0.5]), condition).velocity)


@pytest.mark.slow
def test_a_fresh_process_finds_the_same_bits_and_generates_the_same_image(loaded, folder, tmp_path):
    import numpy as np

    out = tmp_path / "image.npy"
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder), str(out), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == digest(loaded.model.state_dict())
    torch.testing.assert_close(torch.from_numpy(np.load(out)), image(loaded.model), rtol=0, atol=1e-6)


def test_half_the_bytes_keep_the_rounded_weights_and_the_exact_scale(loaded, tmp_path):
    save_model(loaded, tmp_path / "half", torch.bfloat16)
    again = load_model(tmp_path / "half").model
    rounded = {key: value.bfloat16().float() for key, value in loaded.model.state_dict().items()}
    rounded["tokenizer.latent_scale"] = torch.tensor(SCALE)
    assert_equal_state(again.state_dict(), rounded)
    assert load_file(tmp_path / "half/denoiser/model.safetensors").popitem()[1].dtype == torch.bfloat16


def test_the_tokenizer_alone_comes_back_bit_for_bit(loaded, tmp_path):
    tokenizer = loaded.model.tokenizer
    save_tokenizer(tokenizer, tmp_path / "alone")
    again = load_tokenizer(tmp_path / "alone")
    assert_equal_state(again.state_dict(), tokenizer.state_dict())
    assert float(again.latent_scale) == float(tokenizer.latent_scale)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.decode(again.encode(pixels).z_f), tokenizer.decode(tokenizer.encode(pixels).z_f))


def test_the_tokenizer_loads_out_of_a_whole_model(loaded, folder):
    assert_equal_state(load_tokenizer(folder / "tokenizer").state_dict(), loaded.model.tokenizer.state_dict())
    with pytest.raises(InputError, match="no spar-tokenizer folder"):
        load_tokenizer(folder)
    with pytest.raises(InputError, match="no spar folder"):
        load_model(folder / "tokenizer")


def test_a_folder_without_a_manifest_is_a_model_too(folder):
    (folder / "manifest.json").unlink()
    assert load_model(folder).manifest == {}


# ---- what does not fit is refused -----------------------------------------------------------------------------------


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        tensors = {key: value.clone() for key, value in load_file(path).items()}  # not a view of the file
        change(tensors)
        save_file(tensors, path)

    return damage


def grow(tensors: dict[str, torch.Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key] = torch.zeros(3, 1, 4)


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    """As many numbers, another shape."""
    key = next(key for key, value in tensors.items() if value.dim() == 2 and value.shape[0] != value.shape[1])
    tensors[key] = tensors[key].T.contiguous()


DAMAGES = {
    "missing key": (edit_tensors(lambda t: t.popitem()), "1 missing"),
    "unexpected key": (edit_tensors(lambda t: t.update(stranger=torch.ones(1))), r"1 unexpected \(stranger\)"),
    "another shape": (edit_tensors(grow), "1 of another shape"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "no safetensors": (lambda path: path.write_bytes(b"\x80\x04pickle" * 99), "damaged"),
    "absent": (lambda path: path.unlink(), "is missing in"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_are_refused(folder, part, damage):
    how, message = DAMAGES[damage]
    how(folder / part / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert part in str(caught.value)


def test_a_transposed_matrix_is_refused(folder):
    edit_tensors(transpose)(folder / "language" / "model.safetensors")
    with pytest.raises(InputError, match="1 of another shape"):
        load_model(folder)


def edit_json(path: Path, **fields: object) -> None:
    values = json.loads(path.read_text())
    values.update(fields)
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.mark.parametrize("where", ["", "tokenizer"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "other"}, "format 'other'"),
        ({"format": ..., "model_type": "qwen2"}, "format None"),
        ({"format_version": 0}, "has format version 0; this spar reads version 3"),
        ({"format_version": 2}, "has format version 2; this spar reads version 3"),
        ({"format_version": ...}, "has format version None"),
        ({"model": ...}, "expected a field 'model'"),
    ],
)
def test_a_foreign_or_old_folder_is_refused(folder, where, fields, message):
    edit_json(folder / where / "config.json", **fields)
    with pytest.raises(InputError, match=message):
        load_model(folder)


@pytest.mark.parametrize("scale", [..., None, 0.0, -1.0, float("nan"), "1"])
def test_a_tokenizer_without_a_true_latent_scale_is_refused(folder, scale):
    edit_json(folder / "tokenizer" / "config.json", latent_scale=scale)
    with pytest.raises(InputError, match="expected latent_scale above 0"):
        load_model(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sampling", ..., "expected a field 'sampling'"),
        ("sampling", {"stepz": 3}, "unknown field stepz"),
        ("sampling", {"steps": "many"}, "steps: expected int, got 'many'"),
        ("model", {"wings": {}}, "unknown field wings"),
        ("model", [], "expected an object"),
    ],
)
def test_a_header_with_unknown_or_odd_fields_is_refused(folder, field, value, message):
    edit_json(folder / "config.json", **{field: value})
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_a_header_that_leaves_a_field_out_is_refused_and_none_is_guessed(folder, loaded):
    model = to_dict(loaded.model.config)
    del model["denoiser"]["align_depth"]  # no weight's shape tells
    for path in (folder / "config.json", folder / "tokenizer" / "config.json"):
        edit_json(path, model=model)
    for load, path in ((load_model, folder), (load_tokenizer, folder / "tokenizer")):
        with pytest.raises(InputError, match="denoiser: missing field align_depth"):
            load(path)
    edit_json(folder / "config.json", model=to_dict(loaded.model.config), sampling={"steps": 3})
    edit_json(folder / "tokenizer" / "config.json", model=to_dict(loaded.model.config))
    with pytest.raises(InputError, match="SamplingConfig: missing field guidance, max_prompt_tokens, method, shift"):
        load_model(folder)


def test_sizes_that_do_not_match_the_weights_are_refused(folder, loaded):
    model = to_dict(loaded.model.config)
    model["text"]["intermediate_size"] += 2
    edit_json(folder / "config.json", model=model)
    edit_json(folder / "tokenizer" / "config.json", model=model)
    with pytest.raises(InputError, match="of another shape"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", "", "\x00"])
def test_a_header_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json"):
        load_model(folder)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_that_is_no_folder_is_refused(load, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="which is a file"):
        load(tmp_path / "file")
    with pytest.raises(InputError, match="which does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="config.json is missing in"):
        load(tmp_path / "empty")


def test_a_model_without_its_text_tokenizer_is_refused(folder):
    path = folder / "text_tokenizer" / "tokenizer.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(InputError, match="no readable text tokenizer"):
        load_model(folder)
    path.unlink()
    with pytest.raises(InputError, match="tokenizer.json is missing"):
        load_model(folder)


def test_a_text_tokenizer_without_its_special_tokens_is_refused(folder):
    (folder / "text_tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(InputError):
        load_model(folder)


def test_a_tokenizer_of_other_sizes_but_equal_shapes_is_refused(folder, loaded):
    model = to_dict(loaded.model.config)
    model["streams"]["pixel_heads"] = 4  # the same weights, read as other heads
    edit_json(folder / "tokenizer" / "config.json", model=model)
    with pytest.raises(InputError):
        load_model(folder)


@pytest.mark.parametrize("name", ["image_token_id", "eos_token_id", "pad_token_id"])
def test_a_text_tokenizer_with_other_special_ids_than_the_model_is_refused(folder, loaded, name):
    model = to_dict(loaded.model.config)
    model["text"][name] = 99
    for path in (folder / "config.json", folder / "tokenizer" / "config.json"):
        edit_json(path, model=model)
    with pytest.raises(InputError):
        load_model(folder)


@pytest.mark.parametrize("part", ["vision", "autoencoder", "denoiser"])
def test_a_configuration_may_leave_out_no_field(loaded, folder, part):
    """Today's defaults are never taken for what a file does not say."""
    model = to_dict(loaded.model.config)
    name = sorted(model[part])[0]
    del model[part][name]
    edit_json(folder / "config.json", model=model)
    with pytest.raises(InputError, match=f"SparConfig.{part}: missing field {name}"):
        load_model(folder)


@pytest.mark.parametrize(("part", "field"), LATER_FIELDS)
def test_a_folder_from_before_a_field_does_what_it_did(loaded, folder, part, field):
    model = to_dict(loaded.model.config)
    del model[part][field]
    edit_json(folder / "config.json", model=model)
    assert getattr(getattr(load_model(folder).model.config, part), field) == LATER_FIELDS[part, field]
    assert getattr(getattr(read_config(folder), part), field) == LATER_FIELDS[part, field]


def test_the_bundled_weights_are_of_todays_version():
    from spar.inference.pipeline import BUNDLED

    header = json.loads((BUNDLED / "config.json").read_text())
    for (part, field), value in LATER_FIELDS.items():
        header["model"].setdefault(part, {}).setdefault(field, value)
    assert to_dict(load_model(BUNDLED).model.config) == header["model"]


# ---- writing --------------------------------------------------------------------------------------------------------


def test_saving_replaces_an_older_model_and_leaves_nothing_beside_it(config, randomize, loaded, folder):
    (folder / "old-file").write_text("x")
    model = randomize(SparModel(config), seed=1)
    save_model(ModelBundle(model, loaded.text_tokenizer, SamplingConfig()), folder)
    assert_equal_state(load_model(folder).model.state_dict(), model.state_dict())
    assert not (folder / "old-file").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_save_that_fails_leaves_the_older_model_whole(loaded, folder, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loaded.text_tokenizer, "save_pretrained", full)
    with pytest.raises(InputError, match="cannot write .*No space left on device"):
        save_model(loaded, folder)
    monkeypatch.undo()
    assert_equal_state(load_model(folder).model.state_dict(), loaded.model.state_dict())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_ctrl_c_at_any_moment_of_a_save_leaves_a_whole_model(loaded, folder, monkeypatch):
    """Here: just after the removal of the older folder, or after its replacement."""
    remove = shutil.rmtree

    def interrupted(path: Path, **keywords: object) -> None:
        there = Path(path).exists()
        remove(path, **keywords)
        if there:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(loaded, folder)
    monkeypatch.undo()
    assert_equal_state(load_model(folder).model.state_dict(), loaded.model.state_dict())


def test_the_working_folder_can_be_written_to(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(precious(tmp_path / "here"))
    save_model(loaded, Path("."))
    assert load_model(tmp_path / "here").sampling == loaded.sampling


def precious(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("thesis.tex",),
        ("config.json", "model.bin"),
    ],
)
def test_a_folder_that_is_no_spar_folder_is_left_alone(loaded, tmp_path, names):
    folder = precious(tmp_path / "mine", *names)
    with pytest.raises(InputError, match="is no SPAR folder"):
        save_model(loaded, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_an_empty_folder_is_filled(loaded, tmp_path):
    save_model(loaded, precious(tmp_path / "empty"))
    assert load_model(tmp_path / "empty").sampling == loaded.sampling


@pytest.mark.parametrize(
    "below",
    [
        "",
        "below",
    ],
)
def test_a_path_that_cannot_be_a_folder_is_refused(loaded, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError):
        save_model(loaded, file / below)
    assert file.read_text() == "mine"
