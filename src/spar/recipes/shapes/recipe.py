"""`shapes`: the whole of SPAR from random weights on version 2 of the shapes world, on two CPU cores.

Seven foundation stages make what InternVL3, DC-AE and SANA bring at full size; the paper's six stages follow with its
trainable and frozen sets (SPAR sections 1 and 2). Departures for the small setting are in docs/training.md.
"""

from dataclasses import replace
from typing import Any

from spar.models.config import ConnectorConfig, DenoiserConfig, SparConfig
from spar.recipes.shapes.curricula import MixedLessons, QuestionData
from spar.recipes.shapes.data import ShapesData
from spar.recipes.shapes.dense_tagging import DenseTaggingObjective, TagData, TagWordsObjective
from spar.training.config import StageConfig
from spar.training.data import CaptionData
from spar.training.objectives.autoencoder import AutoencoderObjective
from spar.training.objectives.dit import DitObjective
from spar.training.objectives.few_step import FewStepObjective
from spar.training.objectives.self_flow import SelfFlowObjective
from spar.training.objectives.tokenizer import TokenizerObjective
from spar.training.objectives.unified import UnifiedObjective
from spar.training.systems.spar import FlowConfig, SparRecipe
from spar.worlds.shapes.questions import BINDING_QUESTION_KINDS, QUESTION_KINDS

ENCODER = "model.tokenizer.encoder.*"
STREAMS = ("model.tokenizer.*_stream.*", "model.tokenizer.fusion.*")
DECODER = "model.tokenizer.decoder.*"
ROUTER_AND_CONNECTOR = ("model.router.*", "model.connector.*")
DENOISER = "model.denoiser.*"
BALANCE = 0.02  # keeps the router from settling on one layer for every token
# The harder, the more often.
MIXTURE = ("single", "multi", *2 * ("two",), *3 * ("count",), *3 * ("position",), *4 * ("shared",), *2 * ("twins",))
LAYOUT_MIXTURE = (
    "single", "two", "multi", *2 * ("count",), *2 * ("position",), *4 * ("shared",), *2 * ("twins",)
)
QUESTIONS = tuple(dict.fromkeys((*QUESTION_KINDS, *BINDING_QUESTION_KINDS)))

_QUESTIONS_AND_PROMPTS = QuestionData(
    (
        *QUESTIONS, *2 * ("place", "count_color"), *3 * ("relation", "neighbor", "size"), *4 * ("attribute",),
        *8 * ("position",),
    ),
    per_image=12, prompt_share=0.55, edit_prompts=0.5, layouts=True, edit_layouts=True, scene_kinds=LAYOUT_MIXTURE,
)  # fmt: skip
_MLLM_2 = StageConfig(
    "mllm-2", TagWordsObjective(edit_tags=1.0), ("model.language.*",), data=_QUESTIONS_AND_PROMPTS, steps=3600,
    batch=32, lr=1.5e-3, lr_end=1e-5, warmup=20, optimizer="muon",
)
# Of two runs one had not learned to compare two places by the end of mllm-2: a lesson of that at a high rate.
_POSITIONS = replace(
    _QUESTIONS_AND_PROMPTS, per_image=8, prompt_share=0.1,
    questions=(
        *8 * ("position",), *2 * ("relation",), *2 * ("place",), "exists", "color", "count", "size", "attribute"
    ),
)  # fmt: skip
FOUNDATIONS = (
    StageConfig(
        "encoder", DenseTaggingObjective(dense=1.0, pixel=10.0), (ENCODER, "dense_head.*"), data=TagData(), steps=1200,
        batch=32, lr=2.5e-3, lr_end=2e-5, warmup=50, optimizer="muon",
    ),
    StageConfig(
        "mllm", TagWordsObjective(edit_tags=1.0), ("model.language.*",), steps=3000, batch=32, lr=2e-3, lr_end=1e-3,
        warmup=60, optimizer="muon",
        data=QuestionData(
            (*QUESTIONS, *3 * ("place",), *4 * ("relation",), *6 * ("position",)), per_image=8, prompt_share=0.4,
            edit_prompts=0.5, layouts=True, edit_layouts=True,
        ),
    ),
    _MLLM_2,
    replace(_MLLM_2, name="mllm-3", data=_POSITIONS, steps=500, lr=2e-3, lr_end=2e-4),
    replace(_MLLM_2, name="mllm-4", steps=1000, lr=8e-4),
    StageConfig(
        "autoencoder", AutoencoderObjective(mse=1.0, latent_penalty=1e-3, latent_noise=0.1),
        ("pixel_encoder.*", DECODER), steps=800, batch=16, lr=1e-3, lr_end=2e-5, warmup=50, max_grad_norm=0.3,
        optimizer="muon",
    ),
    StageConfig(
        "dit", DitObjective(noise_samples=4), (DENOISER,), data=CaptionData(), steps=300, batch=16, lr=5e-3,
        lr_end=5e-4, warmup=50, ema=0.99, optimizer="muon",
    ),
)

TOKENIZER = (
    StageConfig(
        "tokenizer-1", TokenizerObjective(mse=1.0, perceptual=0.02, native=1.0, native_fused=3.0), STREAMS, steps=400,
        batch=16, lr=3e-3, lr_end=1e-3, warmup=50, max_grad_norm=1.0, optimizer="muon",
    ),
    StageConfig(
        "tokenizer-2", TokenizerObjective(mse=1.0, perceptual=0.02, native_fused=0.3, latent_noise=0.1),
        (*STREAMS, DECODER), steps=400, batch=16, lr=2e-3, lr_end=3e-4, warmup=50, max_grad_norm=0.3,
        lr_multipliers=((DECODER, 0.5),), optimizer="muon",
    ),
    StageConfig(
        "tokenizer-3",
        TokenizerObjective(
            mse=1.0, perceptual=0.02, semantic=1.0, gan=1e-4, lecam=1e-3, gan_start=450, native_fused=0.3,
            latent_noise=0.1,
        ),
        (ENCODER, *STREAMS, DECODER, "discriminator.*"), steps=600, batch=16, lr=1.5e-3, lr_end=2e-5, warmup=50,
        max_grad_norm=0.3, ema=0.98, lr_multipliers=((ENCODER, 0.1), (DECODER, 0.5)), optimizer="muon",
    ),
)

_UNIFIED_1 = StageConfig(
    "unified-1", UnifiedObjective(noise_samples=4, balance=BALANCE), ROUTER_AND_CONNECTOR, data=MixedLessons(),
    steps=100, batch=16, lr=3e-3, lr_end=1e-3, warmup=20, optimizer="muon",
)
_JOINT = replace(
    _UNIFIED_1, objective=UnifiedObjective(align=0.5, noise_samples=4, balance=BALANCE),
    trainable=(*ROUTER_AND_CONNECTOR, DENOISER, "alignment_head.*"),
)
UNIFIED = (
    _UNIFIED_1,
    replace(
        _JOINT, name="unified-2", steps=3000, lr=3e-3, lr_end=5e-5, warmup=50, ema=0.998,
        data=MixedLessons(
            edit_share=0.4, position_captions=0.15, layouts=0.9, edit_layouts=0.9, layout_errors=0.4,
            scene_kinds=MIXTURE,
        ),
    ),
    replace(
        _JOINT, name="unified-3", steps=80, lr=3e-4, lr_end=1e-5, warmup=10, ema=0.99,
        data=MixedLessons(edit_share=0.4, layouts=0.9, edit_layouts=0.9, layout_errors=0.4),
    ),
)


FEW_STEPS = StageConfig(
    "few-steps", FewStepObjective(windows=4, teacher_steps=5), (DENOISER,), steps=600, batch=16, lr=1e-3, lr_end=2e-5,
    warmup=20, ema=0.99, optimizer="muon",
    data=MixedLessons(
        edit_share=0.4, position_captions=0.15, layouts=0.9, edit_layouts=0.9, layout_errors=0.4,
        scene_kinds=MIXTURE,
    ),
)


def shapes() -> SparRecipe:
    """The system of the bundled weights, from random weights; those began with weights of an earlier form."""
    return SparRecipe(
        name="shapes",
        model=SparConfig(
            connector=ConnectorConfig(reference="added"),
            denoiser=DenoiserConfig(self_attention="softmax", reference_states=True),
        ),
        stages=FOUNDATIONS + TOKENIZER + UNIFIED,
        data=ShapesData(),
        flow=FlowConfig(training_shift=3.0, sampling_shift=3.0, edit_guidance=1.5),
    )


def shapes_long() -> SparRecipe:
    """`shapes` with longer last stages of the LLM and of the DiT, for bundled weights (about five hours there)."""
    base = shapes()
    longer: dict[str, dict[str, Any]] = {
        "mllm-4": {"steps": 5000, "lr": 1.5e-3},
        "unified-2": {"steps": 8000},
        "unified-3": {"steps": 300},
    }
    stages = tuple(replace(stage, **longer.get(stage.name, {})) for stage in base.stages)
    return replace(base, name="shapes-long", stages=stages)


def shapes_self_flow() -> SparRecipe:
    """`shapes` whose denoiser is taught by its own average instead of the tokenizer's encoder (an ablation)."""
    base = shapes()

    def own(stage: StageConfig) -> StageConfig:
        if not (isinstance(stage.objective, UnifiedObjective) and stage.objective.align):
            return stage
        objective = SelfFlowObjective(
            align=stage.objective.align, noise_samples=stage.objective.noise_samples, balance=stage.objective.balance,
            teacher_depth=4,
        )
        return replace(stage, objective=objective, trainable=(*ROUTER_AND_CONNECTOR, DENOISER, "self_flow_head.*"))

    return replace(base, name="shapes-self-flow", stages=tuple(map(own, base.stages)))


def shapes_few_steps() -> SparRecipe:
    """A trained model of `shapes` distilled to four steps without guidance."""
    return replace(shapes(), name="shapes-few-steps", stages=(FEW_STEPS,))
