"""The modules: the autoencoder's latents lie on the tokens' grid, whatever the two strides are; the heads are those of
the objectives, and a seed means the same weights whatever the order of the stages."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from spar.models.config import AutoencoderConfig
from spar.recipes import recipe
from spar.training.checkpoint import load_group
from spar.training.initial_weights import random_modules
from spar.training.modules import AlignmentHead, TrainingModules
from spar.training.systems.spar import SparRecipe
from spar.training.trainer import train

TINY = recipe("tiny")


def with_stride(stride: int) -> SparRecipe:
    """`tiny` with an autoencoder of another stride; its tokens' is 8."""
    stages = {8: 4, 16: 5}[stride]
    autoencoder = AutoencoderConfig(
        latent_channels=8,
        head_dim=8,
        channels=(16,) * stages,
        encoder_layers=(0, *[1] * (stages - 1)),
        decoder_layers=(0, *[1] * (stages - 1)),
        encoder_blocks=("ResBlock",) * stages,  # no attention: what a cell shows, its surroundings hold
        decoder_blocks=("ResBlock",) * stages,
        encoder_multiscales=((),) * stages,
        decoder_multiscales=((),) * stages,
    )
    return replace(TINY, model=replace(TINY.model, autoencoder=autoencoder))


@pytest.fixture(scope="module", params=[8, 16])
def modules(request) -> TrainingModules:
    config = with_stride(request.param)
    assert (config.model.token_stride, config.model.autoencoder.stride) == (8, request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TrainingModules(config, {}).eval().requires_grad_(False)


def pixels(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_native_latents_are_those_of_the_picture_at_the_autoencoders_scale(modules):
    ratio = modules.config.autoencoder.stride // 8
    scaled = F.interpolate(pixels(64, 32), scale_factor=ratio, mode="bilinear", antialias=True)
    native = modules.native_latents(pixels(64, 32))
    torch.testing.assert_close(native, modules.pixel_encoder(scaled))
    assert native.shape == modules.model.tokenizer.encode(pixels()).z_f[..., :4].shape


@pytest.mark.parametrize("cell", [(0, 0), (2, 5), (7, 3)])
def test_a_change_inside_a_token_shows_at_that_cell_of_the_native_latents(modules, cell):
    before, (row, column) = pixels(), cell
    after = before.clone()
    after[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 5
    for picture in (modules.native_latents(after) - modules.native_latents(before)).square().sum(1):  # [8, 8]
        found = divmod(int(picture.argmax()), 8)
        assert max(abs(found[0] - row), abs(found[1] - column)) <= 1  # random kernels may lean to a neighbour


def test_a_run_whose_strides_differ_binds_the_streams_to_the_native_latents(tmp_path):
    config = with_stride(16)
    steps = {"autoencoder": 3, "dit": 3, "tokenizer-1": 30}
    chosen = tuple(replace(config.stage(name), steps=count) for name, count in steps.items())
    rows = []
    train(
        replace(config, stages=chosen), tmp_path / "run",
        report=lambda stage, step, steps, values: rows.append((stage, values)),
    )
    assert [stage for stage, _ in rows] == [name for name, count in steps.items() for _ in range(count)]
    bound = [values["native"] for stage, values in rows if stage == "tokenizer-1"]
    assert sum(bound[-5:]) < 0.9 * sum(bound[:5])
    assert float(load_group(tmp_path / "run" / "autoencoder" / "done", "modules")["native_scale"]) != 1


# ---- heads and teachers ----------------------------------------------------------------------------------------------


EVERYWHERE = {"model", "pixel_encoder"}


@pytest.mark.parametrize(
    ("stages", "heads"),
    [
        (("encoder",), {"dense_head"}),
        (("mllm", "mllm-2", "mllm-3", "mllm-4"), {"dense_head"}),  # tags after edits
        (("autoencoder", "dit", "tokenizer-1", "tokenizer-2"), set()),
        (("tokenizer-3",), {"discriminator", "lecam", "teacher"}),
        (("unified-1", "unified-2"), {"alignment_head"}),
        (tuple(stage.name for stage in TINY.stages),
         {"dense_head", "discriminator", "lecam", "teacher", "alignment_head"}),
    ],
)  # fmt: skip
def test_training_holds_the_heads_of_its_objectives_and_no_others(stages, heads):
    with torch.device("meta"):
        modules = TrainingModules(replace(TINY, stages=tuple(TINY.stage(name) for name in stages)), {})
    assert {name for name, _ in modules.named_children()} == EVERYWHERE | heads


def test_a_teacher_from_outside_sets_the_width_that_is_aligned():
    class Wide:
        def width(self):
            return 48

    with torch.device("meta"):
        modules = TrainingModules(TINY, {"external_teacher": Wide()})
    assert modules.teacher_mean.shape == (48,) and modules.alignment_head.layers[-1].out_features == 48
    assert isinstance(modules.alignment_head, AlignmentHead)


def test_a_seed_means_the_same_weights_whatever_the_order_of_the_stages():
    plain, turned, other = (
        random_modules(one, "cpu", {}).state_dict()
        for one in (TINY, replace(TINY, stages=TINY.stages[::-1]), replace(TINY, seed=1))
    )
    assert plain.keys() == turned.keys() and all(torch.equal(plain[name], turned[name]) for name in plain)
    head = "alignment_head.layers.0.weight"
    assert not torch.equal(plain[head], other[head])


def test_the_semantic_teacher_has_the_encoders_form_and_shares_none_of_its_weights():
    modules = random_modules(TINY, "cpu", {})
    encoder, teacher = modules.model.tokenizer.encoder, modules.teacher
    for (name, own), (_, copied) in zip(encoder.named_parameters(), teacher.named_parameters(), strict=True):
        assert own.shape == copied.shape and own.data_ptr() != copied.data_ptr(), name


def test_an_ablation_without_an_adversary_starts_from_the_same_weights():
    base = recipe("tiny")
    stage = base.stage("tokenizer-3")
    plain = replace(
        stage, objective=replace(stage.objective, gan=0.0, lecam=0.0),
        trainable=tuple(pattern for pattern in stage.trainable if pattern != "discriminator.*"),
    )  # fmt: skip
    without = replace(base, stages=tuple(plain if one.name == stage.name else one for one in base.stages))
    ours, theirs = (random_modules(one, "cpu", {}).state_dict() for one in (base, without))
    assert not any(name.startswith("discriminator.") for name in theirs)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())

