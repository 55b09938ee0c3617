"""`shapes`: the whole of SPAR from random weights on the shapes world, on two CPU cores, within two hours.

Four foundation stages make what InternVL3, DC-AE and SANA bring at full size; the paper's six stages follow with its
trainable and frozen sets (SPAR sections 1 and 2). Departures for the small setting are in docs/training.md.
"""

from spar.models.config import SparConfig, TextConfig
from spar.training.stages import FlowConfig, LossWeights, Recipe, Stage

ENCODER = "model.tokenizer.encoder.*"
STREAMS = ("model.tokenizer.semantic_stream.*", "model.tokenizer.pixel_stream.*", "model.tokenizer.fusion.*")
DECODER = "model.tokenizer.decoder.*"
BRIDGE = ("model.router.*", "model.connector.*")
DENOISER = "model.denoiser.*"

FOUNDATIONS = (
    Stage(
        "encoder", "encoder", (ENCODER, "dense_head.*"), steps=1300, batch=64, lr=1e-3, lr_end=5e-5,
        losses=LossWeights(dense=1.0, pixel=10.0),
    ),
    Stage("mllm", "mllm", ("model.language.*",), steps=1600, lr=1e-3, lr_end=2e-5),
    Stage(
        "autoencoder", "autoencoder", ("pixel_encoder.*", DECODER), steps=500, lr=1e-3, lr_end=5e-5,
        losses=LossWeights(mse=1.0, latent_penalty=1e-3, latent_noise=0.2),
    ),
    Stage("dit", "dit", (DENOISER,), steps=700, draws=4, lr=1e-3, lr_end=2e-4, ema=0.99),
)

TOKENIZER = (
    Stage(
        "tokenizer-1", "tokenizer", STREAMS, steps=400, lr=1e-3, lr_end=3e-4,
        losses=LossWeights(mse=1.0, perceptual=0.05, native=1.0, native_fused=1.0),
    ),
    Stage(
        "tokenizer-2", "tokenizer", (*STREAMS, DECODER), steps=300, lr=6e-4, lr_end=1e-4,
        losses=LossWeights(mse=1.0, perceptual=0.05, native_fused=0.02, latent_noise=0.2),
    ),
    Stage(
        "tokenizer-3", "tokenizer", (ENCODER, *STREAMS, DECODER, "discriminator.*"), steps=400, lr=6e-4, lr_end=2e-5,
        ema=0.98, rates=((ENCODER, 0.1),),
        losses=LossWeights(
            mse=1.0, perceptual=0.05, semantic=1.0, gan=1e-4, lecam=1e-3, gan_start=200, native_fused=0.02,
            latent_noise=0.2,
        ),
    ),
)

UNIFIED = (
    Stage("unified-1", "unified", BRIDGE, steps=150, draws=4, lr=1e-3, lr_end=5e-4),
    Stage(
        "unified-2", "unified", (*BRIDGE, DENOISER, "alignment_head.*"), steps=1500, draws=4, lr=1e-3, lr_end=1e-4,
        ema=0.995, edit_share=0.35, losses=LossWeights(align=0.5),
    ),
    Stage(
        "unified-3", "unified", (*BRIDGE, DENOISER, "alignment_head.*"), steps=150, draws=4, lr=1e-4, lr_end=1e-5,
        warmup=10, ema=0.99, edit_share=0.35, losses=LossWeights(align=0.5),
    ),
)


def shapes() -> Recipe:
    return Recipe(
        name="shapes",
        model=SparConfig(text=TextConfig(vocab_size=128)),
        stages=FOUNDATIONS + TOKENIZER + UNIFIED,
        flow=FlowConfig(training_shift=1.0, sampling_shift=1.0),
    )
