"""One function a training step: images and words in, named loss terms out; `loss` is what trains.

B images, R noise draws an image, N visual tokens, D_p latent channels, h w the grid.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spar.data.batches import Captioned, Dialogues, Edits, Images, Tagged
from spar.flow.path import interpolate, sample_time, velocity_target
from spar.losses.adversarial import discriminator_hinge_loss, generator_hinge_loss
from spar.losses.alignment import alignment_loss, match_grid
from spar.losses.distillation import native_latent_loss, semantic_loss
from spar.losses.perceptual import FeatureLoss, PerceptualLoss
from spar.losses.reconstruction import mse, psnr
from spar.models.attention import attention_bias, position_ids_from_mask
from spar.models.router import normalize_hidden_states
from spar.models.spar import Condition
from spar.training.config import Recipe, StageConfig
from spar.training.distributed import SINGLE_PROCESS, DistributedContext
from spar.training.feature_cache import encode
from spar.training.modules import CENTER_BINS, TAGS, TrainingModules
from spar.training.shapes_data import InMemoryFeatureCache, TrainingData

Terms = dict[str, Tensor]
Rows = TypeVar("Rows", list, np.ndarray, Tensor)


@dataclass
class StepContext:
    """What a step works with. `features` holds frozen features by name, for as long as they stay frozen.

    Noise is drawn for the whole batch of a step, of which a micro-step takes its own rows.
    """

    modules: TrainingModules
    data: TrainingData
    recipe: Recipe
    stage: StageConfig
    device: torch.device
    external_teacher: Callable[[Tensor], tuple[Tensor, tuple[int, int]]] | None = None
    perceptual: tuple[tuple[float, PerceptualLoss], ...] = ()
    features: dict[str, InMemoryFeatureCache] = field(default_factory=dict)
    parallel: DistributedContext = SINGLE_PROCESS
    micro_step: int = 0

    def own_rows(self, values: Rows) -> Rows:
        """This process's rows of what was drawn for a whole batch: a list, an array or a tensor."""
        return values[self.parallel.rows(len(values), self.micro_step)]

    def autocast(self) -> torch.autocast:
        """The precision of this run's matrix products."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.parallel.config.precision == "bf16")

    def generator(self, step: int) -> torch.Generator:
        """The generator of one step's noise."""
        seed = int(self.data.rng(f"noise-{self.stage.name}", step).integers(0, 2**62))
        return torch.Generator(self.device).manual_seed(seed)

    def frozen_features(
        self, name: str, keys: np.ndarray, pixels: Tensor, compute: Callable[[Tensor], Terms]
    ) -> Terms:
        """Features of images `[B, 3, H, W]` that this stage does not train, computed once an image.

        A sharded encoder computes them anew: all processes must take part, and not all lack the same images. So do
        images that come once.
        """
        if self.parallel.sharded or (keys < 0).any():
            with torch.no_grad():
                return {key: rows.to(torch.bfloat16) for key, rows in compute(pixels).items()}
        return self.features.setdefault(name, InMemoryFeatureCache())(keys, pixels, compute)


def encoder_step(ctx: StepContext, batch: Tagged, step: int) -> Terms:
    """Dense pre-training of E_s: tags, centres, coverage and pixels, each read linearly off `f_v`."""
    weights, head = ctx.stage.losses, ctx.modules.dense_head
    config, pixels, targets = ctx.recipe.model, batch.pixels, batch.tags
    f_v = ctx.modules.model.tokenizer.encoder(pixels)                               # [B, N, D_s]
    terms: Terms = {}
    owned = targets["shape"] > 0
    for name in TAGS:  # an object's tags count on its own tokens: over all tokens the background drowns them
        logits, counted = head.tags[name](f_v).float(), torch.ones_like(owned) if name == "background" else owned
        terms[name] = F.cross_entropy(logits[counted], targets[name][counted])
    bins = (targets["center"] * CENTER_BINS).long().clamp(0, CENTER_BINS - 1)        # [B, N, 2]
    places = head.center(f_v).float().unflatten(-1, (2, CENTER_BINS))[owned]
    terms["center"] = F.cross_entropy(places.flatten(0, 1), bins[owned].flatten())
    coverage = head.coverage(f_v).float().squeeze(-1)
    terms["coverage"] = F.binary_cross_entropy_with_logits(coverage, targets["coverage"].float())
    stride = config.token_stride
    patches = F.pixel_unshuffle(pixels, stride).flatten(2).transpose(1, 2)           # [B, N, 3 stride^2]
    terms["pixels"] = F.mse_loss(head.pixels(f_v).float(), patches)
    dense = sum(value for name, value in terms.items() if name != "pixels")
    with torch.no_grad():
        right = (head.tags["shape"](f_v).argmax(-1) == targets["shape"])[owned].float().mean()
    return {"loss": weights.dense * dense + weights.pixel * terms["pixels"], **terms, "shape_accuracy": right}


def mllm_step(ctx: StepContext, batch: Dialogues, step: int) -> Terms:
    """Captioning and question answering on the frozen encoder: next-token loss on the answers only."""
    model = ctx.modules.model
    packed = ctx.data.prompts.pack(batch.turns)
    ids, weights = packed.ids.to(ctx.device), packed.weights.to(ctx.device)[:, 1:]
    f_v = ctx.frozen_features("f_v", batch.keys, batch.pixels, lambda x: {"f_v": model.tokenizer.encoder(x)})["f_v"]
    embeddings = model.embed(ids, f_v.float())
    bias = attention_bias(packed.allowed.to(ctx.device), embeddings, causal=False)
    final, _ = model.language(embeddings, bias, packed.positions.to(ctx.device))
    answered = weights > 0
    logits = model.language.logits(final[:, :-1][answered]).float()
    targets, weights = ids[:, 1:][answered], weights[answered]
    losses = F.cross_entropy(logits, targets, reduction="none")
    right = (logits.argmax(-1) == targets).float()
    words = targets != ctx.recipe.model.text.eos_token_id
    return {"loss": (losses * weights).sum() / weights.sum(), "word_accuracy": right[words].mean()}


def autoencoder_step(ctx: StepContext, batch: Images, step: int) -> Terms:
    """DC-AE on the world's images, encoder and decoder, with latents held near unit size."""
    weights = ctx.stage.losses
    pixels = batch.pixels.to(memory_format=torch.channels_last)
    latent = ctx.modules.native_latents(pixels)
    decoded = ctx.modules.model.tokenizer.decode(_add_latent_noise(ctx, step, latent))
    terms = {"mse": mse(decoded, pixels), "latent_square": latent.float().square().mean()}
    loss = weights.mse * terms["mse"] + weights.latent_penalty * terms["latent_square"]
    return {"loss": loss, **terms, "psnr": psnr(decoded.detach().clamp(0, 1), pixels).mean()}


def dit_step(ctx: StepContext, batch: Captioned, step: int) -> Terms:
    """Text to image on the autoencoder's own latents, conditioned on the frozen LLM's last states."""
    modules, model = ctx.modules, ctx.modules.model
    tokens = ctx.data.prompts.generation(_with_unconditional(ctx, step, batch.texts)).to(ctx.device)
    with torch.no_grad():
        embeddings = model.language.embed(tokens.ids)
        bias = attention_bias(tokens.mask, embeddings, causal=True)
        final, _ = model.language(embeddings, bias, position_ids_from_mask(tokens.mask))
        condition = Condition(normalize_hidden_states([final])[0], tokens.mask, final.new_ones(*final.shape[:2], 1))
    native = ctx.frozen_features("native", batch.keys, batch.pixels, lambda x: {"latent": modules.native_latents(x)})
    latent = native["latent"]
    return _flow_terms(ctx, step, latent.float() * modules.native_scale, condition, teacher=None)


def unified_step(ctx: StepContext, batch: Captioned, step: int) -> Terms:
    """L_fm + lambda_a L_align on `z_f`, for generation or, of `Edits`, for editing (SPAR section 3.3)."""
    model, editing = ctx.modules.model, isinstance(batch, Edits)
    texts = _with_unconditional(ctx, step, batch.texts)
    target, reference = _target_features(ctx, batch), None
    if editing:
        tokens, reference = ctx.data.prompts.edit(texts).to(ctx.device), _reference_features(ctx, batch).float()
    else:
        tokens = ctx.data.prompts.generation(texts).to(ctx.device)
    condition = model.condition(tokens.ids, tokens.mask, reference)
    latent, teacher = target["latent"].float(), None
    if ctx.recipe.alignment_weight(ctx.stage) and ctx.recipe.alignment.teacher == "external":
        teacher = external_features(ctx, batch.pixels)
    elif ctx.recipe.alignment_weight(ctx.stage):
        teacher = target["f_v"].unflatten(1, latent.shape[-2:])
    terms = _flow_terms(ctx, step, latent, condition, teacher=teacher)
    return {**terms, ("flow_edit" if editing else "flow_generate"): terms["flow"].detach()}


def _target_features(ctx: StepContext, batch: Captioned) -> Mapping[str, Tensor]:
    """`f_v` and the normalised latent of the images to be drawn."""
    if "latent" in batch.features:
        return batch.features
    name, tokenizer = "edited" if isinstance(batch, Edits) else "scenes", ctx.modules.model.tokenizer
    return ctx.frozen_features(name, batch.keys, batch.pixels, lambda x: encode(tokenizer, x))


def _reference_features(ctx: StepContext, batch: Edits) -> Tensor:
    """`f_v` of the images before the edit."""
    if "reference" in batch.features:
        return batch.features["reference"]
    tokenizer = ctx.modules.model.tokenizer
    return ctx.frozen_features("scenes", batch.keys, batch.references, lambda x: encode(tokenizer, x))["f_v"]


def external_features(ctx: StepContext, pixels: Tensor) -> Tensor:
    """The external teacher's features, `[B, rows, columns, D]`; asked anew each time, for they are too many to keep."""
    if ctx.external_teacher is None:
        raise ValueError("alignment with an external teacher is on, but no external teacher was loaded")
    features, grid = ctx.external_teacher(pixels)
    return features.unflatten(1, grid)


def _flow_terms(ctx: StepContext, step: int, latent: Tensor, condition: Condition, *, teacher: Tensor | None) -> Terms:
    """L_fm for R draws of noise and time an image, and where a teacher `[B, rows, columns, D]` is given, L_align."""
    flow, generator = ctx.recipe.flow, ctx.generator(step)
    clean = latent.repeat_interleave(ctx.stage.noise_samples, dim=0)                         # [B R, D_p, h, w]
    count = (ctx.stage.batch, ctx.stage.noise_samples)
    noise = ctx.own_rows(torch.randn((*count, *clean.shape[1:]), generator=generator, device=ctx.device)).flatten(0, 1)
    time = sample_time(
        math.prod(count), mean=flow.time_mean, std=flow.time_std, shift=flow.training_shift, generator=generator,
        device=ctx.device,
    )
    time = ctx.own_rows(time.view(count)).flatten()
    output = ctx.modules.model.velocity(interpolate(clean, noise, time), time, condition)
    error = (output.velocity.float() - velocity_target(clean, noise)).square().mean()
    if teacher is None:
        return {"loss": error, "flow": error.detach()}
    projected = ctx.modules.alignment_head(output.features)                         # [B R, N, D]
    center = ctx.recipe.alignment.center  # without it the teacher's mean is not measured
    aligned = alignment_loss(
        match_grid(projected, source=tuple(clean.shape[-2:]), target=tuple(teacher.shape[1:3])),
        teacher.flatten(1, 2).repeat_interleave(ctx.stage.noise_samples, dim=0),
        center=center,
        teacher_mean=ctx.modules.teacher_mean if center else None,
    )
    logged = {name: aligned[name] for name in ("cosine_plain", *(["cosine_centered"] if center else []))}
    return {"loss": error + ctx.recipe.alignment_weight(ctx.stage) * aligned["loss"], "flow": error.detach(), **logged}


def tokenizer_step(ctx: StepContext, batch: Images, step: int) -> Terms:
    """The tokenizer's three stages: which terms count is the stage's choice (SPAR section 3.1)."""
    weights, modules = ctx.stage.losses, ctx.modules
    tokenizer = modules.model.tokenizer
    keys, pixels = batch.keys, batch.pixels.to(memory_format=torch.channels_last)
    if any(parameter.requires_grad for parameter in tokenizer.encoder.parameters()):
        f_v = tokenizer.encoder(pixels)
    else:
        frozen = ctx.frozen_features("f_v", keys, batch.pixels, lambda x: {"f_v": tokenizer.encoder(x)})
        f_v = frozen["f_v"].float()
    latents = tokenizer.fuse(f_v, (pixels.shape[-2], pixels.shape[-1]))
    noisy = _add_latent_noise(ctx, step, latents.z_f)
    decoded = tokenizer.decode(noisy.contiguous(memory_format=torch.channels_last))
    terms: Terms = {"mse": mse(decoded, pixels), "latent_square": latents.z_f.float().square().mean()}
    loss = weights.mse * terms["mse"] + weights.latent_penalty * terms["latent_square"]
    if weights.perceptual:
        terms["perceptual"] = _perceptual(ctx, decoded, pixels)
        loss = loss + weights.perceptual * terms["perceptual"]
    if weights.native or weights.native_fused:
        native = ctx.frozen_features("native", keys, batch.pixels, lambda x: {"latent": modules.native_latents(x)})
        native = native["latent"]
        terms["native_fused"] = native_latent_loss(latents.z_f, native)
        loss = loss + weights.native_fused * terms["native_fused"]
        if weights.native:
            terms["native"] = native_latent_loss(latents.z_p, native.flatten(2).transpose(1, 2))
            loss = loss + weights.native * terms["native"]
    if weights.semantic:
        taught = ctx.frozen_features("teacher", keys, batch.pixels, lambda x: {"f_v": modules.teacher(x)})["f_v"]
        terms["semantic"] = semantic_loss(f_v, taught)
        loss = loss + weights.semantic * terms["semantic"]
    if weights.gan:
        adversarial = _adversarial(ctx, decoded, pixels)
        terms.update(adversarial)
        on = 1.0 if step >= weights.gan_start else 0.0
        loss = loss + on * weights.gan * adversarial["gan"] + adversarial["discriminator"]
    return {"loss": loss, **terms, "psnr": psnr(decoded.detach().clamp(0, 1), pixels).mean()}


def _perceptual(ctx: StepContext, decoded: Tensor, pixels: Tensor) -> Tensor:
    """L_perc: the weighted distances that the recipe's networks see."""
    total, own = decoded.new_zeros((), dtype=torch.float32), ctx.recipe.perceptual.autoencoder
    if own:
        total = total + own * FeatureLoss(ctx.modules.pixel_encoder.features)(decoded, pixels)
    for weight, loss in ctx.perceptual:
        total = total + weight * loss(decoded, pixels)
    return total


def _adversarial(ctx: StepContext, decoded: Tensor, pixels: Tensor) -> Terms:
    """Both sides of the hinge game in one graph: the generator's term does not reach the discriminator's weights,
    the discriminator's term does not reach the image."""
    discriminator, weights = ctx.modules.discriminator, ctx.stage.losses
    discriminator.requires_grad_(False)
    generator_term = generator_hinge_loss(discriminator(decoded))
    discriminator.requires_grad_(True)
    real, fake = discriminator(pixels), discriminator(decoded.detach())
    loss = discriminator_hinge_loss(real, fake) + weights.lecam * ctx.modules.lecam(real, fake, mean=ctx.parallel.mean)
    return {"gan": generator_term, "discriminator": loss}


def _add_latent_noise(ctx: StepContext, step: int, latent: Tensor) -> Tensor:
    """Noise of `losses.latent_noise` times the latent's own size, of a strength drawn for each image."""
    share, count = ctx.stage.losses.latent_noise, ctx.stage.batch
    if not share:
        return latent
    generator = ctx.generator(step)
    size = latent.detach().float().square().mean((1, 2, 3), keepdim=True).sqrt()
    strength = ctx.own_rows(share * torch.rand((count, 1, 1, 1), generator=generator, device=latent.device))
    noise = ctx.own_rows(torch.randn((count, *latent.shape[1:]), generator=generator, device=latent.device))
    return latent + (size * strength * noise).to(latent.dtype)


def _with_unconditional(ctx: StepContext, step: int, texts: Sequence[str | None]) -> list[str | None]:
    """The texts of a step with the recipe's share of the prompts replaced by the unconditional one."""
    marks = ctx.data.rng(f"unconditional-{ctx.stage.name}", step).random(ctx.stage.batch)
    share = ctx.recipe.flow.unconditional_share
    return [None if mark < share else text for mark, text in zip(ctx.own_rows(marks), texts, strict=True)]


STEPS: dict[str, Callable[[StepContext, Any, int], Terms]] = {
    "encoder": encoder_step,
    "mllm": mllm_step,
    "autoencoder": autoencoder_step,
    "dit": dit_step,
    "tokenizer": tokenizer_step,
    "unified": unified_step,
}
