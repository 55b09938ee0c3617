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
from spar.recipes.shapes.recipe import shapes
from spar.training.config import DataConfig, Recipe

TINY_MODEL = SparConfig(
    vision=VisionConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64),
    text=TextConfig(hidden_size=32, layers=4, heads=2, kv_heads=1, intermediate_size=64),
    autoencoder=AutoencoderConfig(
        latent_channels=8,
        head_dim=8,
        channels=(16, 16, 16, 16),
        encoder_layers=(0, 1, 1, 1),
        decoder_layers=(0, 1, 1, 1),
    ),
    streams=StreamConfig(residual_blocks=1, pixel_layers=1, pixel_heads=2),
    connector=ConnectorConfig(queries=4, layers=1),
    denoiser=DenoiserConfig(
        layers=2, heads=2, head_dim=16, cross_heads=2, cross_head_dim=16, caption_channels=32, align_depth=1
    ),
)


def tiny() -> Recipe:
    """Three steps a stage, four images a step: a check of the way, not of the goal."""
    base = shapes()
    stages = tuple(
        replace(
            stage,
            steps=3,
            batch=4,
            warmup=1,
            noise_samples=min(stage.noise_samples, 2),
            losses=replace(stage.losses, gan_start=0),
        )
        for stage in base.stages
    )
    data = DataConfig(scenes=24, edits=16)
    return replace(base, name="tiny", model=TINY_MODEL, stages=stages, data=data, log_every=1)
