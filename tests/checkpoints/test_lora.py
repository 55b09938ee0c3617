"""LoRA: no change at its start, merged equals unmerged, saved apart, refused where it does not belong."""

import json
from dataclasses import replace

import pytest
import torch

from spar.checkpoints.lora import (
    LoraConfig,
    adapter_tensors,
    add_lora,
    is_lora_key,
    load_adapter,
    merge_lora,
    save_adapter,
)
from spar.checkpoints.safetensors_io import read_tensors
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


def test_an_adapter_is_saved_apart_and_belongs_to_one_model(model, tiny_run, tmp_path):
    add_lora(model, ALL)
    fill(model)
    save_adapter(model, ALL, tmp_path, {"made": "here"})
    assert set(read_tensors(tmp_path / "adapter.safetensors")) == set(adapter_tensors(model))
    other = load_model(tiny_run.path / "model").model
    assert load_adapter(other, tmp_path) == ALL
    assert all(map(torch.equal, answers(other), answers(model)))
    with pytest.raises(InputError, match="is no adapter of this model: .* of another shape"):
        load_adapter(SparPipeline.from_pretrained().model, tmp_path)
    with pytest.raises(InputError, match="expected an adapter .*got 'spar', version 3"):
        load_adapter(other, tiny_run.path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("denoiser", "connector"), ("language",)])
def test_training_moves_the_additions_alone_and_the_pipeline_takes_them(tiny_run, tmp_path, parts):
    base, run = tiny_run.path / "model", tmp_path / "run"
    recipe = replace(tiny_run.recipe, lora=LoraConfig(rank=2, parts=parts))
    (planned,) = estimate(recipe, HardwareConfig(), ("unified-3",))
    train(recipe, run, stages=("unified-3",), init_from=base)
    added = read_tensors(run / "adapter" / "adapter.safetensors")
    assert all(float(value.abs().max()) > 0 for value in added.values())  # both sides have moved from their start
    head = sum(rows[1] for rows in tiny_run.tables["unified-3"] if rows[0].startswith("alignment_head"))
    assert planned.trainable == sum(value.numel() for value in added.values()) + head
    pipe = SparPipeline.from_pretrained(base, adapter=run / "adapter")
    assert pipe.origin == {"model": "model", "adapter": "adapter"}  # which its images note
    with_adapter = pipe.model.state_dict()
    merged, plain = (load_model(path).model.state_dict() for path in (run / "model", base))
    assert merged.keys() == plain.keys() == with_adapter.keys()
    changed = {key for key in plain if not torch.equal(merged[key], plain[key])}
    assert changed == {key.split(".lora_")[0] + ".weight" for key in added}
    assert all(torch.allclose(merged[key], with_adapter[key], atol=1e-6) for key in merged)


def test_a_stage_with_lora_is_no_start_for_a_plain_recipe_and_its_adapter_is_checked(model, tiny_run, tmp_path):
    base = tiny_run.path / "model"
    train(replace(tiny_run.recipe, lora=ALL), tmp_path / "run", stages=("unified-3",), init_from=base)
    with pytest.raises(InputError, match="holds LoRA beside the model: expected the run's merged model"):
        done = tmp_path / "run" / "unified-3" / "done"
        train(tiny_run.recipe, tmp_path / "other", stages=("unified-3",), init_from=done)
    adapter = tmp_path / "run" / "adapter"
    header = json.loads((adapter / "config.json").read_text())
    for rank in (0, 10**6):
        (adapter / "config.json").write_text(json.dumps({**header, "lora": {**header["lora"], "rank": rank}}))
        with pytest.raises(InputError, match=f"expected weights of rank {rank} as its config.json says, got 2"):
            load_adapter(model, adapter)
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
