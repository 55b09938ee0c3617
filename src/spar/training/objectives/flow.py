"""Flow matching on latents, which the DiT's own pre-training and the unified stages share (SPAR section 3.3)."""

import math
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


def flow_matching(
    ctx: StepContext, latent: Tensor, condition: Condition, draws: int
) -> tuple[Tensor, "DenoiserOutput"]:
    """L_fm of `draws` noises and times an image, and the denoiser's output for them, `[B R, ...]`.

    Args:
        latent: clean, `[B, D_p, h, w]`.
    """
    flow, generator = ctx.recipe.flow, ctx.generator()
    clean = latent.repeat_interleave(draws, dim=0)                                           # [B R, D_p, h, w]
    count = (ctx.stage.batch, draws)
    noise = ctx.own_rows(torch.randn((*count, *clean.shape[1:]), generator=generator, device=ctx.device)).flatten(0, 1)
    time = sample_time(
        math.prod(count), mean=flow.time_mean, std=flow.time_std, shift=flow.training_shift, generator=generator,
        device=ctx.device,
    )
    time = ctx.own_rows(time.view(count)).flatten()
    output = ctx.modules.model.velocity(interpolate(clean, noise, time), time, condition)
    return (output.velocity.float() - velocity_target(clean, noise)).square().mean(), output


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
