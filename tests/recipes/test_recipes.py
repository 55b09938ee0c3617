"""Recipes: complete, JSON and back, feasible, each with the paper's stages and losses (SPAR.md sections 1 and 2)."""

import json
from dataclasses import replace

import pytest

from spar.common.config import from_dict, to_dict
from spar.common.errors import InputError
from spar.models.router import routed_layers
from spar.recipes import RECIPES, REGISTRY, recipe
from spar.training.config import Recipe, freeze
from spar.training.estimate import HardwareConfig, check_sizes, estimate
from spar.training.objectives.tokenizer import TokenizerObjective
from spar.training.systems.spar import SparRecipe

STAGES = ("tokenizer-1", "tokenizer-2", "tokenizer-3", "unified-1", "unified-2", "unified-3")
# Which of the paper's terms each of its stages has.
TERMS = {
    "tokenizer-1": {"mse", "perceptual", "native"},
    "tokenizer-2": {"mse", "perceptual"},
    "tokenizer-3": {"mse", "perceptual", "semantic", "gan", "lecam"},
    "unified-1": set(),
    "unified-2": {"align"},
    "unified-3": {"align"},
}
PAPERS = {"mse", "perceptual", "native", "semantic", "gan", "lecam", "align"}

every = pytest.mark.parametrize("name", RECIPES)
APART = ("shapes-few-steps", "shapes-self-flow")  # one goes on from a model, one has another teacher
WHOLE = [name for name in RECIPES if isinstance(recipe(name), SparRecipe) and name not in APART]
of_spar = pytest.mark.parametrize("name", WHOLE)
of_the_world = pytest.mark.parametrize("name", ["shapes", "tiny"])


def test_the_longer_recipe_differs_in_the_length_of_its_last_lessons_alone():
    long, base = recipe("shapes-long"), recipe("shapes")
    longer = {"mllm-4", "unified-2", "unified-3"}
    assert {a.name for a, b in zip(long.stages, base.stages, strict=True) if a.steps > b.steps} == longer
    same = tuple(replace(a, steps=b.steps, lr=b.lr) for a, b in zip(long.stages, base.stages, strict=True))
    assert replace(long, name="shapes", stages=same) == base


@every
def test_a_recipe_goes_through_json_unchanged(name):
    original = recipe(name)
    assert original.name == name
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(original))), complete=True, registry=REGISTRY) == original


@every
def test_a_recipe_can_be_built_and_frozen(name):
    chosen = recipe(name)
    modules = check_sizes(chosen, chosen.stages)
    for stage in chosen.stages:
        assert 0 < len(freeze(modules, stage)) < len([*modules.parameters()])


@of_the_world
def test_the_foundations_come_first_then_the_papers_stages_in_order(name):
    names = [stage.name for stage in recipe(name).stages]
    first = ["encoder", "mllm", "mllm-2", "mllm-3", "mllm-4", "autoencoder", "dit"]
    assert names[:7] == first and tuple(names[7:]) == STAGES


@of_spar
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_exactly_the_papers_terms(name, stage):
    objective = recipe(name).stage(stage).objective
    assert {term for term in PAPERS if getattr(objective, term, 0)} == TERMS[stage]


@of_spar
def test_the_encoder_learns_at_a_tenth_in_stage_three(name):
    stage = recipe(name).stage("tokenizer-3")
    assert dict(stage.lr_multipliers)["model.tokenizer.encoder.*"] == 0.1 and stage.ema > 0


@of_spar
def test_editing_comes_with_joint_pre_training(name):
    shares = {stage: recipe(name).stage(stage).data.edit_share for stage in STAGES[3:]}
    assert shares["unified-1"] == 0 and 0 < shares["unified-2"] < 1 and 0 < shares["unified-3"] < 1


@of_the_world
def test_the_world_of_a_recipe_has_edits(name):
    assert recipe(name).data.edits > 0


@of_spar
def test_the_paper_settings_that_no_small_size_touches(name):
    config = recipe(name)
    model = config.model
    assert (config.flow.time_mean, config.flow.time_std, config.flow.unconditional_share) == (0.0, 1.0, 0.1)
    assert (config.flow.sampling_steps, config.flow.guidance) == (20, 4.5)
    assert (model.router.kind, model.router.count, model.router.temperature) == ("dtr", 4, 1.0)
    assert routed_layers(model.text.layers, 4)[-1] == model.text.layers
    assert config.alignment.teacher == "self"
    assert [config.stage(s).objective.align for s in ("unified-2", "unified-3")] == [0.5, 0.5]


@of_the_world
def test_the_parts_fit_each_other(name):
    model = recipe(name).model
    assert model.autoencoder.stride == model.token_stride  # L_p compares token with latent, cell by cell
    assert model.denoiser.caption_channels == model.text.hidden_size  # the DiT's own stage reads the LLM directly


def test_a_caption_width_that_the_dit_stage_cannot_use_is_refused():
    base = recipe("tiny")
    model = replace(base.model, denoiser=replace(base.model.denoiser, caption_channels=48))
    with pytest.raises(InputError, match="expected model.denoiser.caption_channels 32 .* got 48"):
        replace(base, model=model)
    without = tuple(stage for stage in base.stages if stage.objective.kind != "dit")
    assert check_sizes(replace(base, model=model, stages=without), without)


def test_the_pixel_stream_can_be_ablated_once_no_stage_binds_it():
    base = recipe("tiny")
    model = replace(base.model, streams=replace(base.model.streams, pixel_stream=False))
    with pytest.raises(InputError, match="stage tokenizer-1: native is about the pixel stream, .* expected 0"):
        replace(base, model=model)
    free = tuple(
        replace(stage, objective=replace(stage.objective, native=0.0))
        if isinstance(stage.objective, TokenizerObjective)
        else stage
        for stage in base.stages
    )
    without = replace(base, model=model, stages=free)
    fewer, more = (estimate(r, HardwareConfig(), ("tokenizer-1",))[0] for r in (without, base))
    assert 0 < fewer.trainable < more.trainable


def test_tiny_is_shapes_cut_down():
    small, large = recipe("tiny"), recipe("shapes")
    for a, b in zip(small.stages, large.stages, strict=True):
        assert type(a.objective) is type(b.objective) and a.data == b.data
        assert (a.name, a.trainable, a.lr_multipliers, a.ema) == (b.name, b.trainable, b.lr_multipliers, b.ema)
        assert a.steps <= b.steps and a.batch <= b.batch
    assert small.flow == large.flow and small.alignment == large.alignment
    sizes = [estimate(r, HardwareConfig(), ("mllm",))[0] for r in (small, large)]
    assert 4 * (sizes[0].trainable + sizes[0].frozen) < sizes[1].trainable + sizes[1].frozen


def test_self_flow_changes_the_teacher_alone():
    own, base = recipe("shapes-self-flow"), recipe("shapes")
    assert replace(own, name=base.name, stages=base.stages) == base
    for a, b in zip(own.stages, base.stages, strict=True):
        if not getattr(b.objective, "align", 0):
            assert a == b
            continue
        assert replace(a, objective=b.objective, trainable=b.trainable) == b
        assert (a.objective.align, a.objective.noise_samples) == (b.objective.align, b.objective.noise_samples)
        assert own.model.denoiser.align_depth < a.objective.teacher_depth <= own.model.denoiser.layers


def test_a_recipe_is_made_anew_each_time():
    assert recipe("tiny") == recipe("tiny") and recipe("tiny") is not recipe("tiny")


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="unknown recipe 'small'; expected one of shapes, shapes-long, shapes-few-"):
        recipe("small")
