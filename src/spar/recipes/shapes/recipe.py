"""`shapes`: the whole of SPAR from random weights on version 2 of the shapes world, on two CPU cores.

Seven foundation stages make what InternVL3, DC-AE and SANA bring at full size; the paper's six stages follow with its
trainable and frozen sets (SPAR sections 1 and 2). Between unified-1 and unified-2 stand three short lessons on where
things lie. Departures for the small setting are in docs/training.md.
"""

from dataclasses import replace

from spar.models.config import ConnectorConfig, DenoiserConfig, SparConfig
from spar.recipes.shapes.curricula import MixedLessons, QuestionData
from spar.recipes.shapes.data import ShapesData
from spar.recipes.shapes.dense_tagging import DenseTaggingObjective, TagData, TagWordsObjective
from spar.training.config import StageConfig
from spar.training.data import CaptionData
from spar.training.objectives.autoencoder import AutoencoderObjective
from spar.training.objectives.dit import DitObjective
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
BINDING_MIXTURE = ("single", "two", "count", "position", "multi", *3 * ("shared",), *2 * ("twins",))
QUESTIONS = tuple(dict.fromkeys((*QUESTION_KINDS, *BINDING_QUESTION_KINDS)))
HARD_QUESTIONS = ("exists", "size", "attribute")

_MLLM_2 = StageConfig(
    "mllm-2", TagWordsObjective(edit_tags=0.3), ("model.language.*",), steps=1300, batch=32, lr=1.5e-3, lr_end=1e-5,
    warmup=20, optimizer="muon",
    data=QuestionData(
        (*QUESTIONS, "relation", *3 * ("position",)), per_image=8, prompt_share=0.65, edit_prompts=0.8,
        scene_kinds=BINDING_MIXTURE,
    ),
)
FOUNDATIONS = (
    StageConfig(
        "encoder", DenseTaggingObjective(dense=1.0, pixel=10.0), (ENCODER, "dense_head.*"), data=TagData(), steps=1500,
        batch=32, lr=2.5e-3, lr_end=2e-5, warmup=50, optimizer="muon",
    ),
    StageConfig(
        "mllm", TagWordsObjective(edit_tags=0.3), ("model.language.*",), steps=1600, batch=32, lr=2e-3, lr_end=2e-4,
        warmup=60, optimizer="muon",
        data=QuestionData(
            (*QUESTIONS, *2 * ("place",), *4 * ("relation",), *2 * ("position",)), per_image=8, prompt_share=0.3,
            edit_prompts=0.7,
        ),
    ),
    _MLLM_2,
    replace(
        _MLLM_2, name="mllm-3", steps=1600,
        data=QuestionData(
            (*QUESTIONS, *HARD_QUESTIONS, *2 * ("relation",), *5 * ("position",)), per_image=10, prompt_share=0.5,
            edit_prompts=0.85, scene_kinds=BINDING_MIXTURE,
        ),
    ),
    replace(
        _MLLM_2, name="mllm-4", steps=1400,
        data=QuestionData(
            (*QUESTIONS, *4 * ("place",), *6 * ("relation",), *8 * ("position",)), per_image=16, prompt_share=0.15,
            edit_prompts=0.85, scene_kinds=BINDING_MIXTURE,
        ),
    ),
    replace(
        _MLLM_2, name="mllm-5", steps=1000,
        data=QuestionData(
            (*QUESTIONS, *3 * ("place",), *4 * ("relation",), *12 * ("position",)), per_image=16, prompt_share=0.15,
            edit_prompts=0.85, scene_kinds=BINDING_MIXTURE,
        ),
    ),
    replace(
        _MLLM_2, name="mllm-6", objective=TagWordsObjective(edit_tags=1.0), steps=1600,
        data=QuestionData(
            (*QUESTIONS, *4 * ("position",), *3 * ("relation", "size", "neighbor", "attribute", "count_color")),
            per_image=10, prompt_share=0.6, edit_prompts=0.5, layouts=True, scene_kinds=BINDING_MIXTURE,
        ),
    ),
    replace(
        _MLLM_2, name="mllm-7", objective=TagWordsObjective(edit_tags=1.0), steps=1400,
        data=QuestionData(
            (*QUESTIONS, *8 * ("position",), *3 * ("relation", "neighbor", "attribute", "count_color")),
            per_image=12, prompt_share=0.7, edit_prompts=0.35, layouts=True, scene_kinds=BINDING_MIXTURE,
        ),
    ),
    StageConfig(
        "autoencoder", AutoencoderObjective(mse=1.0, latent_penalty=1e-3, latent_noise=0.1),
        ("pixel_encoder.*", DECODER), steps=1000, batch=16, lr=1e-3, lr_end=2e-5, warmup=50, max_grad_norm=0.3,
        optimizer="muon",
    ),
    StageConfig(
        "dit", DitObjective(noise_samples=4), (DENOISER,), data=CaptionData(), steps=800, batch=16, lr=5e-3,
        lr_end=5e-4, warmup=50, ema=0.99, optimizer="muon",
    ),
)

TOKENIZER = (
    StageConfig(
        "tokenizer-1", TokenizerObjective(mse=1.0, perceptual=0.02, native=1.0, native_fused=3.0), STREAMS, steps=500,
        batch=16, lr=3e-3, lr_end=1e-3, warmup=50, max_grad_norm=1.0, optimizer="muon",
    ),
    StageConfig(
        "tokenizer-2", TokenizerObjective(mse=1.0, perceptual=0.02, native_fused=0.3, latent_noise=0.1),
        (*STREAMS, DECODER), steps=500, batch=16, lr=2e-3, lr_end=3e-4, warmup=50, max_grad_norm=0.3,
        lr_multipliers=((DECODER, 0.5),), optimizer="muon",
    ),
    StageConfig(
        "tokenizer-3",
        TokenizerObjective(
            mse=1.0, perceptual=0.02, semantic=1.0, gan=1e-4, lecam=1e-3, gan_start=500, native_fused=0.3,
            latent_noise=0.1,
        ),
        (ENCODER, *STREAMS, DECODER, "discriminator.*"), steps=700, batch=16, lr=1.5e-3, lr_end=2e-5, warmup=50,
        max_grad_norm=0.3, ema=0.98, lr_multipliers=((ENCODER, 0.1), (DECODER, 0.5)), optimizer="muon",
    ),
)

_UNIFIED_1 = StageConfig(
    "unified-1", UnifiedObjective(noise_samples=4, balance=BALANCE), ROUTER_AND_CONNECTOR, data=MixedLessons(),
    steps=200, batch=16, lr=3e-3, lr_end=1e-3, warmup=20, optimizer="muon",
)
_JOINT = replace(
    _UNIFIED_1, objective=UnifiedObjective(align=0.5, noise_samples=4, balance=BALANCE),
    trainable=(*ROUTER_AND_CONNECTOR, DENOISER, "alignment_head.*"), lr=2e-3,
)
_SINGLE = MixedLessons(position_captions=1.0, scene_kinds=("single",))
UNIFIED = (
    _UNIFIED_1,
    replace(_JOINT, name="places-1", steps=300, data=_SINGLE),
    replace(_JOINT, name="places-2", steps=400, data=replace(_SINGLE, scene_kinds=("single", "two", "position"))),
    replace(_JOINT, name="relations", steps=500, data=MixedLessons(scene_kinds=("position",))),
    replace(
        _JOINT, name="unified-2", steps=5600, lr=3e-3, lr_end=3e-4, warmup=50, ema=0.998,
        data=MixedLessons(edit_share=0.3, position_captions=0.15, layouts=0.7, scene_kinds=MIXTURE),
    ),
    replace(
        _JOINT, name="unified-3", steps=200, lr=3e-4, lr_end=1e-5, warmup=10, ema=0.99,
        data=MixedLessons(edit_share=0.3, layouts=0.7),
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
        flow=FlowConfig(training_shift=3.0, sampling_shift=3.0),
    )
