"""Stages as data: what trains is exactly what the paper trains, what does not train does not move, nothing is idle."""

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from spar.common.config import from_dict
from spar.common.errors import InputError
from spar.recipes import RECIPES, REGISTRY, STAGE_DATA, recipe
from spar.recipes.shapes.curricula import CaptionLessons, MixedLessons, QuestionData
from spar.recipes.shapes.dense_tagging import DenseTaggingObjective, TagData, TagWordsObjective
from spar.training.checkpoint import load_group
from spar.training.config import StageConfig, freeze, freezing_table
from spar.training.data import CaptionData, DialogueData, ImageData, MixedData, StageData
from spar.training.modules import TrainingModules
from spar.training.objectives.autoencoder import AutoencoderObjective
from spar.training.objectives.base import Objective
from spar.training.objectives.dit import DitObjective
from spar.training.objectives.next_token import NextTokenObjective
from spar.training.objectives.tokenizer import TokenizerObjective
from spar.training.objectives.unified import UnifiedObjective
from spar.training.systems.spar import AlignmentConfig, SparRecipe

ENCODER, DECODER = "model.tokenizer.encoder", "model.tokenizer.decoder"
STREAMS = {"model.tokenizer.semantic_stream", "model.tokenizer.pixel_stream", "model.tokenizer.fusion"}
BRIDGE = {"model.router", "model.connector"}
JOINT = {*BRIDGE, "model.denoiser", "alignment_head"}

# SPAR.md's tables (sections 1 and 2), and what the foundations make: the InternViT, the LLM, DC-AE, SANA.
TRAINS = {
    "encoder": {ENCODER, "dense_head"},
    **dict.fromkeys(("mllm", "mllm-2", "mllm-3", "mllm-4"), {"model.language"}),
    "autoencoder": {"pixel_encoder", DECODER},
    "dit": {"model.denoiser"},
    "tokenizer-1": STREAMS,
    "tokenizer-2": {*STREAMS, DECODER},
    "tokenizer-3": {ENCODER, *STREAMS, DECODER, "discriminator"},
    "unified-1": BRIDGE,
    "unified-2": JOINT,
    "unified-3": JOINT,
}
WORLD = ("shapes", "tiny")
# Distillation, which goes on from these, and the denoiser's own average as its teacher have tests of their own.
APART = ("shapes-few-steps", "shapes-self-flow")
OF_SPAR = [name for name in RECIPES if isinstance(recipe(name), SparRecipe) and name not in APART]
# The objectives of SPAR's stages; tests/training/test_dualtoken.py has the others.
SPARS = {type(stage.objective) for name in OF_SPAR for stage in recipe(name).stages} | {NextTokenObjective}
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
IDLE = {
    "dit": {"model.denoiser.reference_embed.weight"}, "unified-1": {"model.connector.reference_gain"},
}


def part(name: str) -> str:
    """The part of the training modules that a parameter belongs to; each belongs to exactly one."""
    (found,) = [p for p in PARTS if name.startswith(f"{p}.")]
    return found


@pytest.fixture(scope="module")
def modules() -> dict[str, TrainingModules]:
    """Each recipe's modules without memory: names and shapes are enough."""
    with torch.device("meta"):
        return {name: TrainingModules(recipe(name), {}) for name in OF_SPAR}


@pytest.mark.parametrize(("name", "stage"), [(name, stage.name) for name in OF_SPAR for stage in recipe(name).stages])
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
        ("dense_tagging", "mse"), ("dense_tagging", "align"), ("next_token", "mse"), ("next_token", "dense"),
        ("next_token", "noise_samples"), ("next_token_from_tags", "dense"), ("autoencoder", "perceptual"),
        ("autoencoder", "gan"), ("autoencoder", "native"), ("dit", "align"), ("dit", "mse"), ("tokenizer", "align"),
        ("tokenizer", "dense"), ("tokenizer", "noise_samples"), ("unified", "mse"), ("unified", "semantic"),
        ("unified", "latent_noise"), ("unified", "gan_start"),
    ],
)
def test_a_loss_weight_that_the_objective_cannot_read_is_refused(kind, weight):
    assert from_dict(Objective, {"kind": kind}, registry=REGISTRY).kind == kind
    with pytest.raises(InputError, match=f"objective: unknown field {weight}; known fields are "):
        from_dict(Objective, {"kind": kind, weight: 3}, "objective", registry=REGISTRY)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("images", "edit_share", 0.5), ("images", "position_captions", 0.5), ("images", "questions", ["color"]),
        ("captions", "image_size", 32), ("captions", "edit_share", 0.5), ("captions", "position_captions", 0.5),
        ("captions_and_edits", "scene_kinds", ["two"]), ("caption_lessons", "edit_share", 0.5),
        ("lessons", "image_size", 32), ("tags", "questions", ["color"]), ("tags", "image_size", 32),
        ("questions", "position_captions", 0.5), ("questions", "edit_share", 0.5),
    ],
)
def test_a_setting_that_the_data_cannot_follow_is_refused(kind, field, value):
    assert from_dict(StageData, {"kind": kind}, registry=REGISTRY).kind == kind
    with pytest.raises(InputError, match=f"data: unknown field {field}; known fields are "):
        from_dict(StageData, {"kind": kind, field: value}, "data", registry=REGISTRY)


TAKES = {
    DenseTaggingObjective: (TagData(),),
    NextTokenObjective: (QuestionData(), DialogueData()),
    AutoencoderObjective: (ImageData(),),
    DitObjective: (CaptionData(), CaptionLessons()),
    TokenizerObjective: (ImageData(),),
    UnifiedObjective: (CaptionData(), CaptionLessons(), MixedData(), MixedLessons()),
}


@pytest.mark.parametrize("objective", TAKES)
def test_an_objective_takes_the_data_that_gives_its_batches_and_no_other(objective):
    for data in (cls() for cls in STAGE_DATA):
        stage = {"objective": objective(), "trainable": ("*",), "steps": 1, "warmup": 0, "data": data}
        if data in TAKES[objective]:
            assert StageConfig("s", **stage).data == data
            continue
        with pytest.raises(InputError, match=rf"stage s: the objective {objective.kind} takes .*\({data.kind}\) gives"):
            StageConfig("s", **stage)


def test_batches_that_are_not_taken_are_named():
    said = r"the objective dit takes batches of Captioned, its data \(lessons\) gives Captioned, Layouts, Edits"
    with pytest.raises(InputError, match=said):
        replace(recipe("tiny").stage("dit"), data=MixedLessons(edit_share=0.5))


ALL_ON = TokenizerObjective(
    mse=1.0, perceptual=1.0, native=1.0, native_fused=1.0, semantic=1.0, gan=1.0, lecam=1.0, latent_penalty=1.0,
    latent_noise=0.5,
)
# Every weight that each objective reads: see the test behind the next.
READ = [
    ("encoder", DenseTaggingObjective(dense=1.0, pixel=1.0), ("dense", "pixel")),
    ("mllm", TagWordsObjective(edit_tags=1.0), ("edit_tags",)),
    (
        "autoencoder", AutoencoderObjective(mse=1.0, latent_penalty=1.0, latent_noise=0.5),
        ("mse", "latent_penalty", "latent_noise"),
    ),
    ("dit", DitObjective(noise_samples=1), ("noise_samples",)),
    ("tokenizer-3", ALL_ON, tuple(sorted(vars(ALL_ON)))),
    ("unified-2", UnifiedObjective(align=1.0, noise_samples=1, balance=1.0), ("align", "noise_samples", "balance")),
]


@pytest.mark.parametrize(("stage", "base", "weight"), [(s, b, w) for s, b, names in READ for w in names])
def test_a_loss_weight_that_the_objective_reads_has_an_effect(start, stage, base, weight):
    losses = []
    for factor in (1, 2):
        value = getattr(base, weight) * factor if not weight.endswith("_start") else factor - 1
        edits = {"prompt_share": 1.0, "edit_prompts": 1.0} if stage == "mllm" else {}
        begun = start(stage, objective=replace(base, **{weight: value}), **edits)
        with torch.no_grad():  # at the stage's start the teacher and the encoder are one
            begun.modules.teacher.multi_modal_projector.linear_2.weight.mul_(1.5)
        losses.append(float(begun.terms()["loss"]))
    assert losses[0] != losses[1]


def test_no_objective_may_read_a_weight_that_is_not_tried_above():
    tried = {type(base): {*names} for _, base, names in READ}
    own = {cls: {item.name for item in fields(cls)} - {"mean_over", "gradient_share"} for cls in SPARS}  # no weights
    assert own == {
        **dict.fromkeys(SPARS, set()), **tried
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"lr": 0.0}, "expected lr > 0"),
        ({"lr": 1e-4, "lr_end": 1e-3}, "lr_end <= lr"),
        ({"lr_end": -1e-5}, "0 <= lr_end"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm must be above 0 and finite, got inf"),
        ({"lr": float("inf")}, "expected lr > 0"),
        ({"lr": float("nan"), "lr_end": 0.0}, "expected lr > 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got 0.9, 1.0"),
        ({"betas": (-0.1, 0.9)}, r"betas must be in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay: expected at least 0, got -0.1"),
        ({"weight_decay": float("inf")}, "weight_decay: expected at least 0, got inf"),
        ({"lr_multipliers": (("model.*", -1.0),)}, r"lr_multipliers of model.\*: expected at least 0, got -1"),
        ({"warmup": -1}, "expected warmup from 0 to steps 3, got -1"),
        ({"warmup": 4}, "expected warmup from 0 to steps 3, got 4"),
    ],
)
def test_a_stage_refuses_settings_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=f"stage encoder: .*{message}"):
        replace(recipe("tiny").stage("encoder"), **changes)


@pytest.mark.parametrize("name", ["../../other", "", "a/b", ".hidden", "model", "adapter", "cache", "lock"])
def test_a_stage_whose_name_is_no_folder_of_its_own_is_refused(name):
    """Its folder is removed when it is trained anew."""
    with pytest.raises(InputError, match=f"stage: expected a name of letters, .*got {name!r}"):
        replace(recipe("tiny").stage("encoder"), name=name)
    assert replace(recipe("tiny").stage("encoder"), name="encoder.2_b-\u00e9").name


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (DitObjective, {"noise_samples": 0}, "noise_samples: expected at least 1, got 0"),
        (UnifiedObjective, {"noise_samples": 0}, "noise_samples: expected at least 1, got 0"),
        (UnifiedObjective, {"align": -0.5}, "align: expected at least 0, got -0.5"),
        (UnifiedObjective, {"balance": -0.5}, "balance: expected at least 0, got -0.5"),
        (DenseTaggingObjective, {"pixel": -1.0}, "pixel: expected at least 0, got -1"),
        (AutoencoderObjective, {"latent_noise": float("nan")}, "latent_noise: expected at least 0, got nan"),
        (TokenizerObjective, {"perceptual": float("inf")}, "perceptual: expected at least 0, got inf"),
        (TokenizerObjective, {"gan": 1.0, "gan_start": -1}, "gan_start: expected at least 0, got -1"),
        (TokenizerObjective, {"lecam": 1.0}, "lecam, gan_start and discriminator_start .* but gan is 0"),
        (TokenizerObjective, {"discriminator_start": 1}, "lecam, gan_start and discriminator_start .* but gan is 0"),
        (TokenizerObjective, {"gan_start": 1}, "lecam, gan_start and discriminator_start .* but gan is 0"),
        (MixedData, {"edit_share": 1.5}, "edit_share: expected 0 to 1, got 1.5"),
        (MixedLessons, {"edit_share": 1.5}, "edit_share: expected 0 to 1, got 1.5"),
        (MixedLessons, {"position_captions": -0.1}, "position_captions: expected 0 to 1, got -0.1"),
        (CaptionLessons, {"position_captions": 1.1}, "position_captions: expected 0 to 1, got 1.1"),
        (
            CaptionLessons, {"scene_kinds": ("single", "many")},
            "scene_kinds: expected single, two, count, position, multi, shared, twins, got single, many",
        ),
        (QuestionData, {"scene_kinds": ("few",)}, "scene_kinds: expected single, .*, twins, got few"),
        (QuestionData, {"questions": ("weight",)}, "questions: expected color, .*, got weight"),
        (QuestionData, {"prompt_share": -0.5}, "prompt_share: expected 0 to 1, got -0.5"),
        (ImageData, {"image_size": 0}, "image_size: expected at least 1, got 0"),
    ],
)
def test_objectives_and_data_refuse_settings_that_cannot_be(cls, changes, message):
    with pytest.raises(InputError, match=message):
        cls(**changes)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("tokenizer-2", {"objective": TokenizerObjective(gan=0.1)}, r"gan is on, expected discriminator.\* among"),
        ("tokenizer-1", {"data": ImageData(image_size=36)}, "expected image_size as a multiple of 8, got 36"),
    ],
)
def test_a_recipe_refuses_a_stage_that_does_not_suit_it(stage, changes, message):
    tiny = recipe("tiny")
    stages = tuple(replace(one, **changes) if one.name == stage else one for one in tiny.stages)
    with pytest.raises(InputError, match=f"stage {stage}: {message}"):
        replace(tiny, stages=stages)


def test_an_unknown_stage_is_named_with_the_known_ones():
    with pytest.raises(InputError, match="recipe tiny has no stage 'unified-4'; it has encoder, mllm, .*unified-3$"):
        recipe("tiny").stage("unified-4")


@pytest.mark.parametrize("fields", [{"teacher": "external"}, {"external": "some/encoder"}])
def test_an_external_teacher_and_its_folder_go_together(fields):
    with pytest.raises(InputError, match="teacher 'external' and the field external"):
        AlignmentConfig(**fields)


def test_two_stages_of_one_name_are_refused():
    stage = StageConfig("s", AutoencoderObjective(), ("*",), steps=1, warmup=0)
    with pytest.raises(InputError, match="expected stages of different names, got s, s"):
        SparRecipe(name="r", stages=(stage, stage))
