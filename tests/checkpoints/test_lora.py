"""LoRA: no change at its start, merged equals unmerged, saved apart, refused where it does not belong."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from spar.checkpoints.lora import LoraConfig, adapter_tensors, add_lora, is_lora_key, merge_lora
from spar.checkpoints.lora_files import CONFIG, DIFFUSERS_WEIGHTS, WEIGHTS, merge_adapter, save_adapter
from spar.checkpoints.safetensors_io import read_tensors, write_tensors
from spar.checkpoints.spar_format import load_model
from spar.common.errors import InputError
from spar.inference.pipeline import SparPipeline
from spar.training.estimate import HardwareConfig, estimate
from spar.training.trainer import train

ALL = LoraConfig(rank=2, parts=("denoiser", "connector", "language"))


@pytest.fixture
def model(tiny_run):
    return load_model(tiny_run.path / "model").model


def answers(model) -> list[torch.Tensor]:
    """A condition and a velocity that depend on all parts that may be adapted."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.tensor([[7, 9, 11], [0, 12, 13]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    latent = torch.randn(2, model.config.autoencoder.latent_channels, 8, 8, generator=generator)
    with torch.no_grad():
        condition = model.condition(ids, mask)
        return [condition.states, model.velocity(latent, torch.tensor([0.3, 0.9]), condition).velocity]


def fill(model) -> None:
    """Additions that do something, and leave no softmax so steep that it enlarges the rounding."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if is_lora_key(name):
            value.data.copy_(torch.randn(value.shape, generator=generator) * 0.1)


def test_additions_begin_at_nothing_and_merge_into_what_they_computed(model):
    names, plain = model.state_dict().keys(), answers(model)
    add_lora(model, ALL)
    assert all(map(torch.equal, answers(model), plain))
    for part in ALL.parts:  # in each part some map is adapted, and only maps inside its layers are
        assert any(name.startswith(f"{part}.") for name in adapter_tensors(model))
    assert not any("proj_out" in name or "queries" in name for name in adapter_tensors(model))
    fill(model)
    apart = answers(model)
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in zip(apart, plain, strict=True))
    merge_lora(model)
    assert model.state_dict().keys() == names
    for a, b in zip(answers(model), apart, strict=True):
        assert float((a - b).norm()) < 1e-3 * float(b.norm())


def test_alpha_over_rank_is_how_much_the_additions_count(model, tiny_run):
    key = "denoiser.network.transformer_blocks.0.attn1.to_q"
    before = model.get_parameter(f"{key}.weight").clone()
    add_lora(model, LoraConfig(rank=4, alpha=6.0, parts=("denoiser",)))
    fill(model)
    a, b = (model.get_parameter(f"{key}.lora_{side}.default.weight").detach() for side in "AB")
    merge_lora(model)
    assert torch.allclose(model.get_parameter(f"{key}.weight"), before + 6 / 4 * b @ a, atol=1e-6)


@pytest.fixture
def saved(model, tmp_path):
    """An adapter's folder; `model` has it unmerged."""
    add_lora(model, ALL)
    fill(model)
    save_adapter(model, ALL, tmp_path / "adapter", {"made": "here"})
    return tmp_path / "adapter"


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether answers differ by the rounding of a merge alone."""
    return all(float((x - y).norm()) < 1e-3 * float(y.norm()) for x, y in zip(a, b, strict=True))


def test_an_adapter_is_saved_apart_and_belongs_to_one_model(model, tiny_run, saved):
    assert sum(map(torch.numel, read_tensors(saved / WEIGHTS).values())) == sum(
        map(torch.numel, adapter_tensors(model).values())
    )
    other = load_model(tiny_run.path / "model").model
    merge_adapter(other, saved)
    assert close(answers(other), answers(model))
    bundled = SparPipeline.from_pretrained().model
    before = {name: value.clone() for name, value in bundled.state_dict().items()}
    with pytest.raises(InputError, match="is no adapter of this model: .* do not fit: .*, expected "):
        merge_adapter(bundled, saved)
    assert all(map(torch.equal, bundled.state_dict().values(), before.values()))
    with pytest.raises(InputError, match=f"expected an adapter: a folder with {CONFIG}"):
        merge_adapter(other, tiny_run.path / "model")


def test_peft_loads_our_adapter(model, tiny_run, saved):
    peft = pytest.importorskip("peft")
    plain = load_model(tiny_run.path / "model").model
    wrapped = peft.PeftModel.from_pretrained(plain, str(saved))
    assert close(answers(wrapped.base_model.model), answers(model))


def test_diffusers_loads_our_adapter_of_the_dit(model, tiny_run, saved):
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    network = load_model(tiny_run.path / "model").model.denoiser.network
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": FlowMatchEulerDiscreteScheduler()}
    pipe = SanaPipeline(transformer=network, **parts)
    pipe.load_lora_weights(str(saved))
    pipe.fuse_lora(components=["transformer"])
    merge_lora(model)
    theirs, ours = network.state_dict(), model.denoiser.network.state_dict()
    adapted = [name.removesuffix("weight") for name in read_tensors(saved / DIFFUSERS_WEIGHTS)]
    names = {name.removeprefix("transformer.").partition(".lora_")[0] for name in adapted}
    assert len(names) == 6 * model.config.denoiser.layers + 2 * model.config.denoiser.layers
    for name in names:
        assert torch.allclose(theirs[f"{name}.base_layer.weight"], ours[f"{name}.weight"], atol=1e-6)


def test_adapters_of_other_libraries_are_merged(model, tiny_run, tmp_path):
    """diffusers' file with and without alphas, and peft's folders of the LLM and of the DiT alone."""
    for file, name, ours in (
        ("transformer.transformer_blocks.0.attn1.to_q", "", "denoiser.network.transformer_blocks.0.attn1.to_q"),
        ("transformer_blocks.0.attn2.to_k", "", "denoiser.network.transformer_blocks.0.attn2.to_k"),
        ("model.layers.1.self_attn.v_proj", CONFIG, "language.network.layers.1.self_attn.v_proj"),
        ("model.language_model.layers.0.mlp.up_proj", CONFIG, "language.network.layers.0.mlp.up_proj"),
        ("transformer_blocks.0.ff.conv_inverted", "", "denoiser.network.transformer_blocks.0.ff.conv_inverted"),
    ):
        plain = load_model(tiny_run.path / "model").model
        weight = plain.get_parameter(f"{ours}.weight")
        before, (out, width) = weight.detach().clone(), weight.shape[:2]
        a, b = torch.randn(2, width), torch.randn(out, 2)
        if weight.dim() == 4:
            a, b = a[..., None, None], b[..., None, None]
        sides = {f"{file}.lora_A.weight": a, f"{file}.lora_B.weight": b}
        path, scale = tmp_path / f"{ours}.safetensors", 1.0
        if name:
            path, scale = tmp_path / ours, 3.0 / 2
            header = {"peft_type": "LORA", "r": 2, "lora_alpha": 7, "alpha_pattern": {file.split(".")[-1]: 3}}
            write_tensors({f"base_model.model.{key}": value for key, value in sides.items()}, path / WEIGHTS)
            (path / CONFIG).write_text(json.dumps(header))
        elif weight.dim() == 4:
            sides[f"{file}.alpha"], scale = torch.tensor(5.0), 5.0 / 2
            write_tensors(sides, path)
        else:
            write_tensors(sides, path)
        merge_adapter(plain, path)
        expected = before + scale * (b.flatten(1) @ a.flatten(1)).view_as(before)
        assert torch.allclose(plain.get_parameter(f"{ours}.weight"), expected, atol=1e-5), file


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_unet_blocks_0_attn.lora_down.weight": (2, 4)}, "kohya's layout is not read"),
        ({"a.lora_A.weight": (2, 4)}, "expected A and B of one rank for a, got A 2 x 4"),
        ({"a.lora_A.weight": (2, 4), "a.lora_B.weight": (4, 3)}, "of one rank for a, got A 2 x 4, B 4 x 3"),
        ({"a.lora_A.weight": (0, 4), "a.lora_B.weight": (4, 0)}, "of one rank for a"),
        ({"a.lora_A.weight": (2, 4), "a.lora_B.weight": (4, 2)}, "1 of its 1 modules do not fit: a .no such module"),
        ({"a.weight": (2, 4)}, "expected matrices MODULE.lora_A.weight"),
        ({}, "got none"),
    ],
)
def test_a_file_that_is_no_adapter_is_refused(model, tmp_path, keys, message):
    save_file({name: torch.ones(shape) for name, shape in keys.items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        merge_adapter(model, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "expected peft_type 'LORA', got 'LOHA'"),
        ({"use_dora": True}, "expected plain LoRA.* it has use_dora"),
        ({"modules_to_save": ["norm"]}, "it has modules_to_save"),
        ({"bias": "all"}, "it has bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "it has init_lora_weights 'pissa_niter_4'"),
        ({"r": 10**6}, f"expected weights of rank 1000000 as its {CONFIG} says, got 2"),
        ({"r": True}, "expected numbers above 0 as r"),
        ({"lora_alpha": float("inf")}, "expected numbers above 0 as lora_alpha"),
        ({"alpha_pattern": [1]}, "in alpha_pattern"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "expected ends of modules' names in rank_pattern and alpha_pattern"),
    ],
)
def test_a_peft_configuration_that_is_not_read_is_refused(model, tiny_run, saved, fields, message):
    header = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**header, **fields}))
    with pytest.raises(InputError, match=message):
        merge_adapter(load_model(tiny_run.path / "model").model, saved)


def test_numbers_that_are_not_finite_are_refused(model, tiny_run, saved):
    tensors = read_tensors(saved / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, saved / WEIGHTS)
    with pytest.raises(InputError, match="expected finite weights"):
        merge_adapter(load_model(tiny_run.path / "model").model, saved)


def test_an_adapter_is_downloaded_from_the_hub(saved, tiny_run, monkeypatch):
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, local_files_only):
        asked.append((name, revision, sorted(allow_patterns)))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    pipe = SparPipeline.from_pretrained(tiny_run.path / "model", adapter="hf://me/lora@v1")
    assert asked == [("me/lora", "v1", sorted((CONFIG, WEIGHTS, DIFFUSERS_WEIGHTS)))]
    assert pipe.origin["adapter"] == "hf://me/lora@adapter"


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("denoiser", "connector"), ("language",)])
def test_training_moves_the_additions_alone_and_the_pipeline_takes_them(tiny_run, tmp_path, parts):
    base, run = tiny_run.path / "model", tmp_path / "run"
    recipe = replace(tiny_run.recipe, lora=LoraConfig(rank=2, parts=parts))
    (planned,) = estimate(recipe, HardwareConfig(), ("unified-3",))
    train(recipe, run, stages=("unified-3",), init_from=base)
    added = read_tensors(run / "adapter" / WEIGHTS)
    assert all(float(value.abs().max()) > 0 for value in added.values())  # both sides have moved from their start
    head = sum(rows[1] for rows in tiny_run.tables["unified-3"] if rows[0].startswith("alignment_head"))
    assert planned.trainable == sum(value.numel() for value in added.values()) + head
    pipe = SparPipeline.from_pretrained(base, adapter=run / "adapter")
    assert pipe.origin == {"model": "model", "adapter": "adapter"}  # which its images note
    with_adapter = pipe.model.state_dict()
    merged, plain = (load_model(path).model.state_dict() for path in (run / "model", base))
    assert merged.keys() == plain.keys() == with_adapter.keys()
    changed = {key for key in plain if not torch.equal(merged[key], plain[key])}
    assert changed == {key.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for key in added}
    assert all(torch.allclose(merged[key], with_adapter[key], atol=1e-6) for key in merged)


def test_a_stage_with_lora_is_no_start_for_a_plain_recipe(tiny_run, tmp_path):
    base = tiny_run.path / "model"
    train(replace(tiny_run.recipe, lora=ALL), tmp_path / "run", stages=("unified-3",), init_from=base)
    with pytest.raises(InputError, match="holds LoRA beside the model: expected the run's merged model"):
        done = tmp_path / "run" / "unified-3" / "done"
        train(tiny_run.recipe, tmp_path / "other", stages=("unified-3",), init_from=done)
    train(tiny_run.recipe, tmp_path / "again", stages=("unified-3",), init_from=tmp_path / "run" / "model")


def test_settings_without_sense_are_refused(tiny_run, tmp_path):
    for wrong, message in (
        ({"rank": -1}, "rank at least 0"), ({"rank": 1, "alpha": 0.0}, "alpha above 0"),
        ({"parts": ("router",)}, "some of denoiser, connector, language, got router"), ({"parts": ()}, "got none"),
    ):
        with pytest.raises(InputError, match=message):
            LoraConfig(**wrong)
    recipe = replace(tiny_run.recipe, lora=LoraConfig(rank=2))
    for stage in ("unified-1", "tokenizer-1"):
        with pytest.raises(InputError, match=f"expected unified stages after unified-1 alone .*got {stage}"):
            train(recipe, tmp_path / "run", stages=(stage,), init_from=tiny_run.path / "model")
    assert not (tmp_path / "run").exists()
