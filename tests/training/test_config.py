"""Stages as data: what trains is exactly what the paper trains, what does not train does not move, nothing is idle."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from spar.common.errors import InputError
from spar.recipes import RECIPES, recipe
from spar.training.checkpoint import load_group
from spar.training.config import (
    LOSS_WEIGHTS_BY_STEP,
    AlignmentConfig,
    LossWeights,
    Recipe,
    StageConfig,
    freeze,
    freezing_table,
)
from spar.training.modules import TrainingModules
from spar.training.steps import STEPS

ENCODER, DECODER = "model.tokenizer.encoder", "model.tokenizer.decoder"
STREAMS = {"model.tokenizer.semantic_stream", "model.tokenizer.pixel_stream", "model.tokenizer.fusion"}
BRIDGE = {"model.router", "model.connector"}
JOINT = {*BRIDGE, "model.denoiser", "alignment_head"}

# SPAR.md's tables (sections 1 and 2), and what the foundations make: the InternViT, the LLM, DC-AE, SANA.
TRAINS = {
    "encoder": {ENCODER, "dense_head"},
    "mllm": {"model.language"},
    "mllm-2": {"model.language"},
    "autoencoder": {"pixel_encoder", DECODER},
    "dit": {"model.denoiser"},
    "tokenizer-1": STREAMS,
    "tokenizer-2": {*STREAMS, DECODER},
    "tokenizer-3": {ENCODER, *STREAMS, DECODER, "discriminator"},
    "unified-1": BRIDGE,
    "places-1": JOINT,
    "places-2": JOINT,
    "relations": JOINT,
    "unified-2": JOINT,
    "unified-3": JOINT,
}
WORLD = ("shapes", "tiny")
PARTS = {
    ENCODER, DECODER, *STREAMS, *JOINT, "model.language", "pixel_encoder", "dense_head", "discriminator", "teacher"
}
# What a stage measures and stores when it ends, or keeps beside its weights.
MEASURES = {
    "autoencoder": {"native_scale"},
    "tokenizer-1": {"model.tokenizer.latent_scale"},
    "tokenizer-2": {"model.tokenizer.latent_scale"},
    "tokenizer-3": {"model.tokenizer.latent_scale", "lecam.real", "lecam.fake", "lecam.updates"},
}
# A generation prompt has no reference image, so what places one in an edit has no gradient.
REFERENCE = {"model.denoiser.reference_embed.weight", "model.connector.reference_gain"}
IDLE = {
    "dit": {"model.denoiser.reference_embed.weight"}, "unified-1": {"model.connector.reference_gain"},
    "places-1": REFERENCE, "places-2": REFERENCE, "relations": REFERENCE,
}


def part(name: str) -> str:
    """The part of the training modules that a parameter belongs to; each belongs to exactly one."""
    (found,) = [p for p in PARTS if name.startswith(f"{p}.")]
    return found


@pytest.fixture(scope="module")
def modules() -> dict[str, TrainingModules]:
    """Each recipe's modules without memory: names and shapes are enough."""
    with torch.device("meta"):
        return {name: TrainingModules(recipe(name)) for name in RECIPES}


@pytest.mark.parametrize(("name", "stage"), [(name, stage.name) for name in RECIPES for stage in recipe(name).stages])
def test_the_trainable_set_is_exactly_the_papers(modules, name, stage):
    modules = modules[name]
    listed = freeze(modules, recipe(name).stage(stage))
    trains = TRAINS[{"tokenizer-448": "tokenizer-3"}.get(stage, stage)]
    wanted = {n for n, _ in modules.named_parameters() if part(n) in trains}
    assert set(listed) == wanted
    assert {n for n, p in modules.named_parameters() if p.requires_grad} == wanted
    assert {part(n) for n in wanted} == trains


@pytest.mark.parametrize("name", WORLD)
def test_every_stage_is_in_the_table(name):
    assert [stage.name for stage in recipe(name).stages] == list(TRAINS)


@pytest.mark.parametrize("stage", TRAINS)
def test_what_is_frozen_stays_bit_identical_and_what_trains_moves(tiny_run, start, stage):
    ctx = start(stage)
    before, after = ctx.modules.state_dict(), load_group(tiny_run.path / stage / "done", "modules")
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    trains = {n for n, _ in ctx.modules.named_parameters() if part(n) in TRAINS[stage]}
    assert moved - trains <= MEASURES.get(stage, set()), "frozen, yet it moved"
    assert trains - moved == IDLE.get(stage, set()), "trainable, yet it stayed"


@pytest.mark.parametrize("stage", MEASURES)
def test_what_a_stage_measures_is_new(tiny_run, start, stage):
    before, after = start(stage).modules.state_dict(), load_group(tiny_run.path / stage / "done", "modules")
    assert not {name for name in MEASURES[stage] if torch.equal(before[name], after[name])}


def test_the_announced_table_counts_every_parameter(tiny_run, start):
    assert list(tiny_run.tables) == list(TRAINS)
    sizes = {n: p.numel() for n, p in start("encoder").modules.named_parameters()}
    for name, table in tiny_run.tables.items():
        assert sum(trains + frozen for _, trains, frozen in table) == sum(sizes.values())
        assert sum(trains for _, trains, _ in table) == sum(v for n, v in sizes.items() if part(n) in TRAINS[name])


def test_the_table_has_one_row_a_part_at_any_depth():
    module = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 3), "c": nn.Linear(1, 1)}), "d": nn.Linear(1, 2)})
    module["a"]["c"].requires_grad_(False)
    assert freezing_table(module, depth=1) == [("a", 9, 2), ("d", 4, 0)]
    assert freezing_table(module) == [("a.b", 9, 0), ("a.c", 0, 2), ("d.weight", 2, 0), ("d.bias", 2, 0)]


@pytest.mark.parametrize("where", ["trainable", "lr_multipliers"])
def test_a_pattern_that_matches_nothing_raises(modules, where):
    stage = recipe("tiny").stage("mllm")
    wrong = ("model.langauge.*",) if where == "trainable" else (("model.langauge.*", 0.1),)
    with pytest.raises(InputError, match=r"stage mllm: pattern 'model.langauge.\*' matches no parameter"):
        freeze(modules["tiny"], replace(stage, **{where: wrong}))


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        ("encoder", "mse"), ("encoder", "align"), ("mllm", "mse"), ("mllm", "dense"), ("autoencoder", "perceptual"),
        ("autoencoder", "gan"), ("autoencoder", "native"), ("dit", "align"), ("dit", "mse"), ("tokenizer", "align"),
        ("tokenizer", "dense"), ("unified", "mse"), ("unified", "semantic"), ("unified", "latent_noise"),
        ("unified", "gan_start"),
    ],
)
def test_a_loss_weight_that_the_step_cannot_read_is_refused(kind, weight):
    losses = LossWeights(**{weight: 3})
    with pytest.raises(InputError, match=rf"stage s: a {kind} step has no use for {weight}; it reads "):
        StageConfig("s", kind, ("*",), steps=1, warmup=0, losses=losses)


ALL_ON = LossWeights(
    mse=1.0, perceptual=1.0, native=1.0, native_fused=1.0, semantic=1.0, gan=1.0, lecam=1.0, latent_penalty=1.0,
    latent_noise=0.5,
)
# Every weight that each step reads: see the test behind the next.
READ = [
    ("encoder", LossWeights(dense=1.0, pixel=1.0), ("dense", "pixel")),
    (
        "autoencoder", LossWeights(mse=1.0, latent_penalty=1.0, latent_noise=0.5),
        ("mse", "latent_penalty", "latent_noise"),
    ),
    (
        "tokenizer-3", ALL_ON,
        tuple(sorted(vars(ALL_ON).keys() - {"dense", "pixel", "align"})),
    ),
    ("unified-2", LossWeights(align=1.0), ("align",)),
]


@pytest.mark.parametrize(("stage", "base", "weight"), [(s, b, w) for s, b, names in READ for w in names])
def test_a_loss_weight_that_the_step_reads_has_an_effect(start, stage, base, weight):
    losses = []
    for factor in (1, 2):
        value = getattr(base, weight) * factor if weight != "gan_start" else factor - 1
        ctx = start(stage, losses=replace(base, **{weight: value}))
        with torch.no_grad():  # at the stage's start the teacher and the encoder are one
            ctx.modules.teacher.multi_modal_projector.linear_2.weight.mul_(1.5)
        losses.append(
            float(
                STEPS[ctx.stage.step](ctx, ctx.data.get_batch(ctx.stage, 0, ctx.parallel.rows(ctx.stage.batch, 0)), 0)[
                    "loss"
                ]
            )
        )
    assert losses[0] != losses[1]


def test_no_step_may_read_a_weight_that_is_not_tried_above():
    tried = {recipe("tiny").stage(stage).step: set(names) for stage, _, names in READ}
    assert {kind: set(names) for kind, names in LOSS_WEIGHTS_BY_STEP.items()} == {"mllm": set(), "dit": set(), **tried}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"noise_samples": 0}, "noise_samples must be at least 1"),
        ({"lr": 0.0}, "expected lr > 0"),
        ({"lr": 1e-4, "lr_end": 1e-3}, "lr_end <= lr"),
        ({"lr_end": -1e-5}, "0 <= lr_end"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"position_captions": -0.1}, r"position_captions must be in \[0, 1\]"),
        (
            {"step": "mllm", "losses": LossWeights(), "position_captions": 0.5},
            "only a dit or unified step reads position_captions, got 0.5",
        ),
        ({"scene_kinds": ("single", "many")}, "kinds single, two, count, position, multi, got single, many"),
        ({"edit_share": 1.5}, r"edit_share must be in \[0, 1\]"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"warmup": -1}, "expected warmup from 0 to steps 3, got -1"),
        ({"warmup": 4}, "expected warmup from 0 to steps 3, got 4"),
        (
            {"step": "mllm", "losses": LossWeights(), "noise_samples": 4},
            "only a dit or unified step reads noise_samples, got 4",
        ),
        ({"step": "mllm", "losses": LossWeights(), "edit_share": 0.5}, "only a unified step reads edit_share, got 0.5"),
        ({"image_size": 32}, "only a tokenizer step reads image_size, got 32"),
        ({"questions": ("color",)}, "only a mllm step reads questions"),
        ({"step": "mllm", "losses": LossWeights(), "questions": ("size",)}, "kinds color, .*, got size"),
        ({"step": "tokenizer", "losses": LossWeights(mse=1.0, lecam=1.0)}, "lecam and gan_start .* but gan is 0"),
        ({"step": "tokenizer", "losses": LossWeights(mse=1.0, gan_start=1)}, "lecam and gan_start .* but gan is 0"),
        ({"step": "tokenizer", "losses": LossWeights(mse=1.0, gan=0.1)}, r"expected discriminator.\* among trainable"),
    ],
)
def test_a_stage_refuses_settings_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        replace(recipe("tiny").stage("encoder"), **changes)


def test_an_unknown_stage_is_named_with_the_known_ones():
    with pytest.raises(InputError, match="recipe tiny has no stage 'unified-4'; it has encoder, mllm, .*unified-3$"):
        recipe("tiny").stage("unified-4")


@pytest.mark.parametrize("fields", [{"teacher": "external"}, {"external": "some/encoder"}])
def test_an_external_teacher_and_its_folder_go_together(fields):
    with pytest.raises(InputError, match="teacher 'external' and the field external"):
        AlignmentConfig(**fields)


def test_two_stages_of_one_name_are_refused():
    stage = StageConfig("s", "mllm", ("*",), steps=1, warmup=0)
    with pytest.raises(InputError, match="expected stages of different names, got s, s"):
        Recipe("r", (stage, stage))
