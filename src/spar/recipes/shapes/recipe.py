"""`shapes`: the whole of SPAR from random weights on the shapes world, on two CPU cores, within two hours.

Five foundation stages make what InternVL3, DC-AE and SANA bring at full size; the paper's six stages follow with its
trainable and frozen sets (SPAR sections 1 and 2). Between unified-1 and unified-2 stand three short lessons on where
things lie. Departures for the small setting are in docs/training.md.
"""

from spar.models.config import SparConfig, TextConfig
from spar.training.config import FlowConfig, LossWeights, Recipe, Stage
from spar.worlds.shapes.questions import QUESTION_KINDS

ENCODER = "model.tokenizer.encoder.*"
STREAMS = ("model.tokenizer.*_stream.*", "model.tokenizer.fusion.*")
DECODER = "model.tokenizer.decoder.*"
BRIDGE = ("model.router.*", "model.connector.*")
DENOISER = "model.denoiser.*"
MIXTURE = ("single", "multi", *2 * ("two",), *2 * ("count",), *3 * ("position",))  # the harder, the more often

FOUNDATIONS = (
    Stage(
        "encoder", "encoder", (ENCODER, "dense_head.*"), steps=1500, batch=32, lr=2.5e-3, lr_end=2e-5, warmup=50,
        optimizer="muon", losses=LossWeights(dense=1.0, pixel=10.0),
    ),
    Stage(
        "mllm", "mllm", ("model.language.*",), steps=1500, batch=32, lr=2e-3, lr_end=2e-5, warmup=60,
        optimizer="muon", questions=(*QUESTION_KINDS, *2 * ("place",), *4 * ("relation",), *3 * ("position",)),
    ),
    Stage(
        "mllm-2", "mllm", ("model.language.*",), steps=600, batch=32, lr=1.5e-3, lr_end=1e-5, warmup=20,
        optimizer="muon", questions=(*QUESTION_KINDS, "relation", *6 * ("position",)),
    ),
    Stage(
        "autoencoder", "autoencoder", ("pixel_encoder.*", DECODER), steps=1000, batch=16, lr=1e-3, lr_end=2e-5,
        warmup=50, clip=0.3, optimizer="muon", losses=LossWeights(mse=1.0, latent_penalty=1e-3, latent_noise=0.1),
    ),
    Stage(
        "dit", "dit", (DENOISER,), steps=800, batch=16, draws=4, lr=5e-3, lr_end=5e-4, warmup=50, ema=0.99,
        optimizer="muon",
    ),
)

TOKENIZER = (
    Stage(
        "tokenizer-1", "tokenizer", STREAMS, steps=500, batch=16, lr=3e-3, lr_end=1e-3, warmup=50, clip=1.0,
        optimizer="muon", losses=LossWeights(mse=1.0, perceptual=0.02, native=1.0, native_fused=3.0),
    ),
    Stage(
        "tokenizer-2", "tokenizer", (*STREAMS, DECODER), steps=500, batch=16, lr=2e-3, lr_end=3e-4, warmup=50, clip=0.3,
        rates=((DECODER, 0.5),), optimizer="muon",
        losses=LossWeights(mse=1.0, perceptual=0.02, native_fused=0.3, latent_noise=0.1),
    ),
    Stage(
        "tokenizer-3", "tokenizer", (ENCODER, *STREAMS, DECODER, "discriminator.*"), steps=700, batch=16, lr=1.5e-3,
        lr_end=2e-5, warmup=50, clip=0.3, ema=0.98, rates=((ENCODER, 0.1), (DECODER, 0.5)), optimizer="muon",
        losses=LossWeights(
            mse=1.0, perceptual=0.02, semantic=1.0, gan=1e-4, lecam=1e-3, gan_start=500, native_fused=0.3,
            latent_noise=0.1,
        ),
    ),
)

UNIFIED = (
    Stage(
        "unified-1", "unified", BRIDGE, steps=200, batch=16, draws=4, lr=3e-3, lr_end=1e-3, warmup=20, optimizer="muon"
    ),
    Stage(
        "places-1", "unified", (*BRIDGE, DENOISER, "alignment_head.*"), steps=400, batch=16, draws=4, lr=2e-3,
        lr_end=1e-3, warmup=20, places=1.0, scenes=("single",), optimizer="muon", losses=LossWeights(align=0.5),
    ),
    Stage(
        "places-2", "unified", (*BRIDGE, DENOISER, "alignment_head.*"), steps=500, batch=16, draws=4, lr=2e-3,
        lr_end=1e-3, warmup=20, places=1.0, scenes=("single", "two", "position"), optimizer="muon",
        losses=LossWeights(align=0.5),
    ),
    Stage(
        "relations", "unified", (*BRIDGE, DENOISER, "alignment_head.*"), steps=700, batch=16, draws=4, lr=2e-3,
        lr_end=1e-3, warmup=20, scenes=("position",), optimizer="muon", losses=LossWeights(align=0.5),
    ),
    Stage(
        "unified-2", "unified", (*BRIDGE, DENOISER, "alignment_head.*"), steps=5600, batch=16, draws=4, lr=3e-3,
        lr_end=3e-4, warmup=50, ema=0.998, edit_share=0.3, places=0.25, scenes=MIXTURE, optimizer="muon",
        losses=LossWeights(align=0.5),
    ),
    Stage(
        "unified-3", "unified", (*BRIDGE, DENOISER, "alignment_head.*"), steps=200, batch=16, draws=4, lr=3e-4,
        lr_end=1e-5, warmup=10, ema=0.99, edit_share=0.3, optimizer="muon", losses=LossWeights(align=0.5),
    ),
)


def shapes() -> Recipe:
    return Recipe(
        name="shapes",
        model=SparConfig(text=TextConfig(vocab_size=128)),
        stages=FOUNDATIONS + TOKENIZER + UNIFIED,
        flow=FlowConfig(training_shift=3.0, sampling_shift=3.0),
    )
