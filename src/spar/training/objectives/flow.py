"""Flow matching on latents, which the DiT's own pre-training and the unified stages share (SPAR section 3.3)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spar.flow.path import interpolate, sample_time, velocity_target
from spar.losses.alignment import alignment_loss, match_grid
from spar.models.spar import Condition
from spar.training.cost import meta_input
from spar.training.objectives.base import StepContext, Terms

if TYPE_CHECKING:
    from spar.models.denoiser import DenoiserOutput

PROMPT_TOKENS = 64  # of a caption with its template, in what a step costs; one of 300 tokens costs the LLM alone


@dataclass(frozen=True)
class Noised:
    """R draws of noise and time an image: `clean` and `noise` `[B R, D_p, h, w]`, `time` `[B R]`, or `[B R, N]` where
    tokens have times of their own.
    """

    clean: Tensor
    noise: Tensor
    time: Tensor

    def latent(self, time: Tensor) -> Tensor:
        """The noisy latent at other times of either shape."""
        cells = time if time.ndim == 1 else time.unflatten(1, self.clean.shape[2:])[:, None]
        return interpolate(self.clean, self.noise, cells)


def draw_noise(ctx: StepContext, latent: Tensor, draws: int) -> Noised:
    """`draws` noises and times an image of a clean `latent` `[B, D_p, h, w]`."""
    generator = ctx.generator()
    clean, count = latent.repeat_interleave(draws, dim=0), (ctx.stage.batch, draws)
    noise = ctx.own_rows(torch.randn((*count, *clean.shape[1:]), generator=generator, device=ctx.device)).flatten(0, 1)
    return Noised(clean, noise, draw_times(ctx, draws, generator))


def draw_times(ctx: StepContext, draws: int, generator: torch.Generator) -> Tensor:
    """`draws` training times an image, `[B R]`, by the recipe's flow settings."""
    flow = ctx.recipe.flow
    time = sample_time(
        (ctx.stage.batch, draws), mean=flow.time_mean, std=flow.time_std, shift=flow.training_shift,
        generator=generator, device=ctx.device,
    )
    return ctx.own_rows(time).flatten()


def flow_matching(ctx: StepContext, noised: Noised, condition: Condition) -> tuple[Tensor, "DenoiserOutput"]:
    """L_fm, and the denoiser's output, `[B R, ...]`."""
    output = ctx.modules.model.velocity(noised.latent(noised.time), noised.time, condition)
    return (output.velocity.float() - velocity_target(noised.clean, noised.noise)).square().mean(), output


def alignment_terms(ctx: StepContext, features: Tensor, grid: tuple[int, int], teacher: Tensor, draws: int) -> Terms:
    """L_align as `loss`, and the cosines that are logged.

    Args:
        features: of the denoiser, `[B R, N, D]` on `grid`.
        teacher: `[B, rows, columns, D_s]`.
    """
    return alignment_loss(
        match_grid(ctx.modules.alignment_head(features), source=grid, target=(teacher.shape[1], teacher.shape[2])),
        teacher.flatten(1, 2).repeat_interleave(draws, dim=0),
        teacher_mean=ctx.modules.teacher_mean if ctx.recipe.alignment.center else None,
    )


def meta_velocity(model: Any, tokens: int, denoiser: Any = None) -> Tensor:
    """One pass of the denoiser (the model's, or another) on the meta device, conditioned on `tokens` tokens."""
    config = model.config
    latent = meta_input(1, config.autoencoder.latent_channels, config.grid, config.grid)
    time = torch.zeros(1, dtype=torch.bfloat16, device="meta")
    mask = torch.ones(1, tokens, dtype=torch.long, device="meta")
    states, network = meta_input(1, tokens, config.denoiser.caption_channels), denoiser or model.denoiser
    return network(latent, time, states, mask).velocity


def meta_layers(model: Any, layers: Any, tokens: int) -> Tensor:
    """Layers of the LLM or the connector; their own rotary tables look at positions, which meta tensors do not have."""
    config = model.config.text
    x = meta_input(1, tokens, config.hidden_size)
    angles = torch.zeros(1, tokens, config.hidden_size // config.heads, dtype=x.dtype, device="meta")
    bias = torch.zeros(1, 1, tokens, tokens, dtype=x.dtype, device="meta")
    for layer in layers:
        x = layer(x, attention_mask=bias, position_embeddings=(angles, angles))
    return x
