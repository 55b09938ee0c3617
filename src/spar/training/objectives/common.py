"""What several of SPAR's objectives share."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spar.common.errors import InputError
from spar.training.config import matches
from spar.training.data import TrainingData, resized
from spar.training.objectives.base import SAMPLE, StepContext

if TYPE_CHECKING:
    from spar.training.config import StageConfig
    from spar.training.plan import InitFolder
    from spar.training.systems.dualtoken import DualTokenRecipe
    from spar.training.systems.spar import SparRecipe


def refuse_model_folder(stage: "StageConfig", init: "InitFolder") -> None:
    """Refuse a SPAR folder as the start of a stage that reads what no finished model keeps: E_p and its scale."""
    if init.is_model:
        raise InputError(
            f"stage {stage.name} needs the autoencoder's encoder, which {init.path} does not hold: give a stage's "
            "folder (RUN/STAGE/done), or for a tokenizer stage a folder that spar build made"
        )


def check_discriminator(recipe: "SparRecipe | DualTokenRecipe", stage: "StageConfig") -> None:
    """Refuse an adversary that does not train in its stage, or cannot read the stage's images; InputError."""
    if not matches("discriminator.", stage.trainable):
        raise InputError(f"stage {stage.name}: gan is on, expected discriminator.* among trainable")
    config, shortest = recipe.discriminator, min(min(size) for size in recipe.data.sizes(recipe, stage))
    if config.channels != 3 or shortest < config.smallest_side:
        raise InputError(
            f"stage {stage.name}: expected a discriminator that reads 3 channels and sides of {shortest} pixels, got "
            f"one of {config.channels} channels and {config.layers} layers, which reads {config.smallest_side} and more"
        )


def add_latent_noise(ctx: StepContext, latent: Tensor, share: float) -> Tensor:
    """Noise of `share` times the latent's own size, of a strength drawn for each image."""
    if not share:
        return latent
    count, generator = ctx.stage.batch, ctx.generator()
    size = latent.detach().float().square().mean((1, 2, 3), keepdim=True).sqrt()
    strength = ctx.own_rows(share * torch.rand((count, 1, 1, 1), generator=generator, device=latent.device))
    noise = ctx.own_rows(torch.randn((count, *latent.shape[1:]), generator=generator, device=latent.device))
    return latent + (size * strength * noise).to(latent.dtype)


def image_side(recipe: "SparRecipe", stage: "StageConfig") -> int:
    """The side of a stage's images in pixels."""
    return stage.image_size or recipe.model.image_size


def sample_images(ctx: StepContext, data: TrainingData, count: int = SAMPLE) -> list[Tensor]:
    """The first images of the training data at the stage's size, in chunks."""
    return [resized(chunk.to(ctx.device), ctx.stage.image_size) for chunk in data.sample(count)]


@torch.no_grad()
def measure_scale(ctx: StepContext, data: TrainingData, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """The factor that brings an encoder's latents of the training data to unit size."""
    chunks = sample_images(ctx, data)
    with ctx.autocast():
        latent = torch.cat([encode(chunk) for chunk in chunks]).float()
    return 1 / latent.square().mean().sqrt()
