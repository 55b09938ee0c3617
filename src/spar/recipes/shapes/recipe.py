"""`shapes`: the whole of SPAR from random weights on the shapes world, on two CPU cores, within two hours.

Five foundation stages make what InternVL3, DC-AE and SANA bring at full size; the paper's six stages follow with its
trainable and frozen sets (SPAR sections 1 and 2). Between unified-1 and unified-2 stand three short lessons on where
things lie. Departures for the small setting are in docs/training.md.
"""

from dataclasses import replace

from spar.models.config import SparConfig, TextConfig
from spar.training.config import FlowConfig, LossWeights, Recipe, StageConfig
from spar.worlds.shapes.questions import QUESTION_KINDS

ENCODER = "model.tokenizer.encoder.*"
STREAMS = ("model.tokenizer.*_stream.*", "model.tokenizer.fusion.*")
DECODER = "model.tokenizer.decoder.*"
ROUTER_AND_CONNECTOR = ("model.router.*", "model.connector.*")
DENOISER = "model.denoiser.*"
MIXTURE = ("single", "multi", *2 * ("two",), *2 * ("count",), *3 * ("position",))  # the harder, the more often

FOUNDATIONS = (
    StageConfig(
        "encoder", "encoder", (ENCODER, "dense_head.*"), steps=1500, batch=32, lr=2.5e-3, lr_end=2e-5, warmup=50,
        optimizer="muon", losses=LossWeights(dense=1.0, pixel=10.0),
    ),
    StageConfig(
        "mllm", "mllm", ("model.language.*",), steps=1500, batch=32, lr=2e-3, lr_end=2e-5, warmup=60,
        optimizer="muon", questions=(*QUESTION_KINDS, *2 * ("place",), *4 * ("relation",), *3 * ("position",)),
    ),
    StageConfig(
        "mllm-2", "mllm", ("model.language.*",), steps=600, batch=32, lr=1.5e-3, lr_end=1e-5, warmup=20,
        optimizer="muon", questions=(*QUESTION_KINDS, "relation", *6 * ("position",)),
    ),
    StageConfig(
        "autoencoder", "autoencoder", ("pixel_encoder.*", DECODER), steps=1000, batch=16, lr=1e-3, lr_end=2e-5,
        warmup=50, max_grad_norm=0.3, optimizer="muon",
        losses=LossWeights(mse=1.0, latent_penalty=1e-3, latent_noise=0.1),
    ),
    StageConfig(
        "dit", "dit", (DENOISER,), steps=800, batch=16, noise_samples=4, lr=5e-3, lr_end=5e-4, warmup=50, ema=0.99,
        optimizer="muon",
    ),
)

TOKENIZER = (
    StageConfig(
        "tokenizer-1", "tokenizer", STREAMS, steps=500, batch=16, lr=3e-3, lr_end=1e-3, warmup=50, max_grad_norm=1.0,
        optimizer="muon", losses=LossWeights(mse=1.0, perceptual=0.02, native=1.0, native_fused=3.0),
    ),
    StageConfig(
        "tokenizer-2", "tokenizer", (*STREAMS, DECODER), steps=500, batch=16, lr=2e-3, lr_end=3e-4, warmup=50,
        max_grad_norm=0.3, lr_multipliers=((DECODER, 0.5),), optimizer="muon",
        losses=LossWeights(mse=1.0, perceptual=0.02, native_fused=0.3, latent_noise=0.1),
    ),
    StageConfig(
        "tokenizer-3", "tokenizer", (ENCODER, *STREAMS, DECODER, "discriminator.*"), steps=700, batch=16, lr=1.5e-3,
        lr_end=2e-5, warmup=50, max_grad_norm=0.3, ema=0.98, lr_multipliers=((ENCODER, 0.1), (DECODER, 0.5)),
        optimizer="muon",
        losses=LossWeights(
            mse=1.0, perceptual=0.02, semantic=1.0, gan=1e-4, lecam=1e-3,
            gan_start=500, native_fused=0.3, latent_noise=0.1,
        ),
    ),
)

_UNIFIED_1 = StageConfig(
    "unified-1", "unified", ROUTER_AND_CONNECTOR, steps=200, batch=16, noise_samples=4, lr=3e-3, lr_end=1e-3, warmup=20,
    optimizer="muon",
)
_JOINT = replace(
    _UNIFIED_1, trainable=(*ROUTER_AND_CONNECTOR, DENOISER, "alignment_head.*"), lr=2e-3, losses=LossWeights(align=0.5)
)
UNIFIED = (
    _UNIFIED_1,
    replace(_JOINT, name="places-1", steps=400, position_captions=1.0, scene_kinds=("single",)),
    replace(_JOINT, name="places-2", steps=500, position_captions=1.0, scene_kinds=("single", "two", "position")),
    replace(_JOINT, name="relations", steps=700, scene_kinds=("position",)),
    replace(
        _JOINT, name="unified-2", steps=5600, lr=3e-3, lr_end=3e-4, warmup=50, ema=0.998, edit_share=0.3,
        position_captions=0.25, scene_kinds=MIXTURE,
    ),
    replace(
        _JOINT, name="unified-3", steps=200, lr=3e-4, lr_end=1e-5, warmup=10, ema=0.99, edit_share=0.3
    ),
)


def shapes() -> Recipe:
    return Recipe(
        name="shapes",
        model=SparConfig(text=TextConfig(vocab_size=128)),
        stages=FOUNDATIONS + TOKENIZER + UNIFIED,
        flow=FlowConfig(training_shift=3.0, sampling_shift=3.0),
    )
