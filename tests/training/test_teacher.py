"""The external teacher: an image encoder of transformers, its tokens on their grid, refused before a run begins."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Qwen2Config,
    Qwen2Model,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from spar.checkpoints.bundled import bundled_folder
from spar.checkpoints.dualtoken_format import load_dualtoken
from spar.cli.main import main
from spar.common.config import from_dict, read_json
from spar.common.errors import InputError
from spar.recipes import REGISTRY, recipe
from spar.recipes.shapes.data import ShapesTrainingData
from spar.training.checkpoint import load_group
from spar.training.config import Recipe
from spar.training.estimate import HardwareConfig, estimate
from spar.training.stage_model import load_stage_model
from spar.training.systems.spar import AlignmentConfig
from spar.training.teacher import load_external_teacher
from spar.training.trainer import train

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
SIZES = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
)


def vision(kind: str) -> nn.Module:
    """A random encoder of 4 x 4 patches."""
    if kind == "vit":
        return ViTModel(ViTConfig(**SIZES))
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**SIZES))
    if kind == "registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3))
    if kind == "convnext":
        return ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1], image_size=128))
    words = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64)
    return SiglipModel(SiglipConfig(vision_config=SIZES, text_config=words))


KINDS = {"vit": 1, "dinov2": 1, "registers": 4, "convnext": 0, "siglip": 0}  # tokens before the patches


def save(kind: str, folder: Path) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vision(kind).eval()
    model.save_pretrained(folder)
    return model


def pixels(side: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


# ---- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_librarys_patch_tokens_in_row_major_order(tmp_path, kind):
    model, teacher = save(kind, tmp_path), load_external_teacher(str(tmp_path))
    image = pixels(128 if kind == "convnext" else 32)
    features, grid = teacher(image)
    with torch.no_grad():
        states = getattr(model, "vision_model", model)(pixel_values=(image - MEAN) / STD).last_hidden_state
    wanted = states.flatten(2).transpose(1, 2) if states.dim() == 4 else states[:, KINDS[kind] :]
    assert grid == (4, 4) and teacher.width() == 32
    torch.testing.assert_close(features, wanted)


def test_pictures_are_resized_to_the_encoders_side(tmp_path):
    save("vit", tmp_path)
    teacher, small = load_external_teacher(str(tmp_path)), pixels(32)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert teacher(large)[1] == (4, 4)
    apart = (teacher(large)[0] - teacher(small)[0]).norm(), (teacher(small.roll(1, 0))[0] - teacher(small)[0]).norm()
    assert apart[0] < 0.3 * apart[1]


def test_the_normalisation_is_that_of_its_own_image_processor(tmp_path):
    save("vit", tmp_path)
    plain = load_external_teacher(str(tmp_path))
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(tmp_path)
    own = load_external_teacher(str(tmp_path))
    assert torch.allclose(plain.mean, MEAN) and torch.allclose(plain.std, STD)  # ImageNet's, where none is given
    assert own.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert own.std.flatten().tolist() == pytest.approx([0.5, 0.6, 0.7])
    ViTImageProcessor(do_normalize=False).save_pretrained(tmp_path)
    assert not load_external_teacher(str(tmp_path)).mean.any()


def test_dualtokens_image_tower_teaches_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = load_external_teacher("dualtoken")
    tower = load_dualtoken(bundled_folder("dualtoken")).model.tokenizer.encoder
    image = pixels(64)
    features, grid = teacher(image)
    assert grid == (8, 8) and teacher.width() == 160
    with torch.no_grad():
        (last,) = tower.run(tower.embed(image), range(1, 9), (8,))
        torch.testing.assert_close(features, tower.network.post_layernorm(last))
    save("vit", tmp_path / "dualtoken")  # a folder of that name comes first
    assert load_external_teacher("dualtoken").width() == 32


def test_it_is_frozen_and_gives_no_gradient(tmp_path):
    save("dinov2", tmp_path)
    teacher = load_external_teacher(str(tmp_path))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(pixels(32).requires_grad_())[0].requires_grad


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(folder: Path, reason: str = "") -> None:
    with pytest.raises(InputError, match=f"alignment.external: expected the folder or Hub id .*{reason}"):
        load_external_teacher(str(folder))


def test_what_is_no_whole_image_encoder_in_safetensors_is_refused(tmp_path):
    refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty")
    words = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64)
    Qwen2Model(Qwen2Config(**words, num_key_value_heads=2)).save_pretrained(tmp_path / "language")
    refused(tmp_path / "language")
    model = save("vit", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    refused(tmp_path / "pickled")
    save("vit", tmp_path / "partial")
    tensors = load_file(tmp_path / "partial" / "model.safetensors")
    tensors.pop("embeddings.position_embeddings")
    save_file(tensors, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "partial", "1 of its tensors are missing")


def test_code_that_comes_with_a_model_never_runs(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\nclass C: pass\n")
    (tmp_path / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}'
    )
    refused(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("sizes", [{"image_size": (32, 64)}, {"patch_size": (8, 4)}])
def test_a_grid_that_is_not_square_is_refused(tmp_path, sizes):
    ViTModel(ViTConfig(**{**SIZES, **sizes})).save_pretrained(tmp_path)
    refused(tmp_path, "expected square images and patches")


def test_tokens_without_a_known_grid_are_refused(tmp_path):
    save("vit", tmp_path)
    teacher = load_external_teacher(str(tmp_path))
    teacher.network.config.patch_size = 16
    with pytest.raises(InputError, match="expected patch tokens on a square grid, got 17 tokens .* 2 x 2"):
        teacher(pixels(32))


# ---- in a run --------------------------------------------------------------------------------------------------------


def outside(folder: Path, **changes) -> Recipe:
    return replace(recipe("tiny"), alignment=AlignmentConfig(teacher="external", external=str(folder)), **changes)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_run_from_another_runs_tokenizer_aligns_with_it(tiny_run, tmp_path, kind):
    """The teacher is as wide as the tokenizer's encoder: only a mean of its own tells them apart."""
    save(kind, tmp_path / "encoder")
    config, run, rows = outside(tmp_path / "encoder"), tmp_path / "run", []
    before = {path: path.read_bytes() for path in (tmp_path / "encoder").iterdir()}
    train(
        config, run, stages=("unified-1", "unified-2"), init_from=tiny_run.path / "tokenizer-3" / "done",
        report=lambda stage, step, steps, values: rows.append((stage, values)),
    )
    aligned = [values for stage, values in rows if stage == "unified-2"]
    assert len(aligned) == 3 and all(-1 <= values["cosine_centered"] <= 1 for values in aligned)
    assert all("cosine_plain" in values for values in aligned)
    done, selfs = (load_group(path / "unified-2" / "done", "modules") for path in (run, tiny_run.path))
    teacher = load_external_teacher(str(tmp_path / "encoder"))
    training_data = ShapesTrainingData(config.data, config.model.grid, config.seed, run / "cache")
    features = teacher(training_data.pixels(range(len(training_data.scenes))))[0]
    torch.testing.assert_close(done["teacher_mean"], features.mean((0, 1)), rtol=0.05, atol=0.02)  # bfloat16 there
    assert not torch.allclose(done["teacher_mean"], selfs["teacher_mean"], atol=0.1)
    assert not torch.equal(done["alignment_head.layers.4.weight"], selfs["alignment_head.layers.4.weight"])
    assert before == {path: path.read_bytes() for path in (tmp_path / "encoder").iterdir()}
    assert from_dict(Recipe, read_json(run / "recipe.json"), complete=True, registry=REGISTRY) == config


SHARDED = """
import json, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from spar.cli.main import main
from spar.training.distributed import DistributedContext, ParallelismConfig
from spar.training.teacher import load_external_teacher

folders, command = sys.argv[1:6], sys.argv[6:]
parallel, found = DistributedContext.initialize(ParallelismConfig(strategy="fsdp"), "cpu"), {}
pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
for folder in folders:
    teacher = load_external_teacher(folder)
    width, wanted, whole = teacher.width(), teacher(pixels)[0], sum(p.numel() for p in teacher.parameters() if p.dim())
    teacher.shard(parallel)
    for _ in range(2):
        same = torch.equal(teacher(pixels)[0], wanted)
        kept = sum(p.to_local().numel() for p in teacher.parameters() if isinstance(p, DTensor))
    found[folder] = same, teacher.width() == width, kept, whole
Path(f"{parallel.rank}.json").write_text(json.dumps(found))
sys.exit(main(command))
"""


@pytest.mark.slow
def test_in_a_sharded_run_each_process_keeps_a_part_of_it(tiny_run, tmp_path, monkeypatch):
    """All kinds give the same features to the last bit, and a run has the losses of one process."""
    monkeypatch.chdir(tmp_path)
    for kind in KINDS:
        save(kind, tmp_path / kind)
    Path("script.py").write_text(SHARDED)
    words = [
        "train", "tiny", "--stage", "unified-2", "--init-from", str(tiny_run.path / "unified-1" / "done"),
        "--alignment.teacher", "external", "--alignment.external", "dinov2", "--parallelism.precision", "fp32",
        "--stages.unified-2.optimizer", "adamw", "--stages.unified-2.lr", "1e-5", "--stages.unified-2.lr-end", "1e-6",
    ]  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", "script.py"]
    done = subprocess.run(
        [*start, *KINDS, *words, "--run", "two", "--parallelism.strategy", "fsdp"], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(Path(f"{rank}.json").read_text()) for rank in range(2))
    for kind in KINDS:
        (*right, kept, whole), (*also, rest, _) = first[kind], second[kind]
        assert all(right) and all(also) and kept + rest == whole and kept < 0.6 * whole, kind
    assert main([*words, "--run", "one"]) == 0
    one, two = (Path(run, "metrics.jsonl").read_text().splitlines() for run in ("one", "two"))
    for a, b in zip(map(json.loads, one), map(json.loads, two), strict=True):
        for name in ("loss", "cosine_plain", "cosine_centered"):
            assert a[name] == pytest.approx(b[name], rel=5e-4, abs=2e-5)


def test_a_teacher_of_another_width_sets_that_of_the_head(tiny_run, tmp_path):
    with torch.random.fork_rng():
        ViTModel(ViTConfig(**{**SIZES, "hidden_size": 24})).save_pretrained(tmp_path / "encoder")
    config, run = outside(tmp_path / "encoder"), tmp_path / "run"
    train(config, run, stages=("unified-1",), init_from=tiny_run.path / "tokenizer-3" / "done")
    train(config, run, stages=("unified-1", "unified-2"), resume=True)
    done = load_group(run / "unified-2" / "done", "modules")
    assert done["alignment_head.layers.4.weight"].shape[0] == len(done["teacher_mean"]) == 24
    assert done["teacher_mean"].any()
    assert load_stage_model(run, REGISTRY, "unified-2").model.config == config.model  # without the teacher at hand
    wide, narrow = (estimate(c, HardwareConfig(), ("unified-2",))[0] for c in (recipe("tiny"), config))
    assert wide.trainable - narrow.trainable == 8 * 257


def test_a_teacher_that_is_not_there_is_refused_before_anything_is_made(tmp_path):
    for refuse in (lambda c: train(c, tmp_path / "run"), lambda c: estimate(c, HardwareConfig())):
        with pytest.raises(InputError, match="alignment.external: expected the folder or Hub id"):
            refuse(outside(tmp_path / "nothing"))
    assert not (tmp_path / "run").exists()
