"""`tiny`: `shapes` with every size and count cut down, so that all stages run in seconds inside the tests."""

from dataclasses import replace

from spar.models.config import (
    AutoencoderConfig,
    ConnectorConfig,
    DenoiserConfig,
    SparConfig,
    StreamConfig,
    TextConfig,
    VisionConfig,
)
from spar.recipes.shapes.data import ShapesData
from spar.recipes.shapes.recipe import shapes
from spar.training.objectives.base import Objective
from spar.training.objectives.dit import DitObjective
from spar.training.objectives.tokenizer import TokenizerObjective
from spar.training.objectives.unified import UnifiedObjective
from spar.training.systems.spar import SparRecipe

TINY_MODEL = SparConfig(
    vision=VisionConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64),
    text=TextConfig(hidden_size=32, layers=4, heads=2, kv_heads=1, intermediate_size=64),
    autoencoder=AutoencoderConfig(
        latent_channels=8, head_dim=8, channels=(16, 16, 16, 16), encoder_layers=(0, 1, 1, 1),
        decoder_layers=(0, 1, 1, 1),
    ),
    streams=StreamConfig(residual_blocks=1, pixel_layers=1, pixel_heads=2),
    connector=ConnectorConfig(queries=4, layers=1, reference="added"),
    denoiser=DenoiserConfig(
        layers=2, heads=2, head_dim=16, cross_heads=2, cross_head_dim=16, caption_channels=32, align_depth=1,
        self_attention="softmax", reference_states=True,
    ),
)


def tiny() -> SparRecipe:
    """Three steps a stage, four images a step: shows that all stages run, not what they reach."""
    base = shapes()
    stages = tuple(replace(stage, objective=_cut(stage.objective), steps=3, batch=4, warmup=1) for stage in base.stages)
    data = ShapesData(scenes=48, edits=32)  # enough that each kind of scene is among them
    return replace(base, name="tiny", model=TINY_MODEL, stages=stages, data=data, log_every=1)


def _cut(objective: Objective) -> Objective:
    """At most two draws an image, and an adversary from the first step on."""
    if isinstance(objective, TokenizerObjective):
        return replace(objective, gan_start=0)
    if isinstance(objective, DitObjective | UnifiedObjective):
        return replace(objective, noise_samples=2)
    return objective
