"""The tokenizer's stages: which terms count is the stage's choice (SPAR section 3.1)."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from spar.checkpoints.spar_format import open_teacher
from spar.common.errors import InputError
from spar.data.batches import Images
from spar.losses.adversarial import LeCam, PatchDiscriminator, discriminator_hinge_loss, generator_hinge_loss
from spar.losses.distillation import native_latent_loss, semantic_loss
from spar.losses.perceptual import FeatureLoss
from spar.losses.reconstruction import mse, psnr
from spar.training.checkpoint import load_stored
from spar.training.config import StageConfig
from spar.training.cost import Cost, meta_input, part_cost
from spar.training.data import TrainingData
from spar.training.distributed import copy_weights
from spar.training.objectives.base import Networks, Objective, StepContext, Terms, check_at_least
from spar.training.objectives.common import (
    add_latent_noise,
    check_discriminator,
    image_side,
    measure_scale,
    refuse_model_folder,
)
from spar.training.teacher import PERCEPTUAL_MACS, perceptual_networks

if TYPE_CHECKING:
    from spar.training.modules import TrainingModules
    from spar.training.plan import InitFolder, Origin, PlannedStage
    from spar.training.systems.spar import SparRecipe

TEACHER_FROM_ENCODER, TEACHER_FROM_FOLDER = "teacher from encoder", "teacher from folder"


@dataclass(frozen=True)
class TokenizerObjective(Objective["SparRecipe"]):
    """Weights of the named terms; 0 switches a term off.

    native is lambda_p, semantic lambda_s; `gan_start` is the step from which the adversarial term counts,
    `discriminator_start` the one from which the discriminator learns (before it, its gradients are zero). Departures
    for the small setting: `native_fused` holds `z_f`, not only `z_p`, near the autoencoder's own latents;
    `latent_penalty` weighs the square of the latent; `latent_noise` is the standard deviation of noise on the latent
    before decoding, relative to the latent's own.
    """

    kind: ClassVar[str] = "tokenizer"
    takes: ClassVar[tuple[type[Images], ...]] = (Images,)
    measures: ClassVar[str] = "latent scale"
    takes_teacher: ClassVar[bool] = True
    clipped_apart: ClassVar[str | None] = "discriminator."
    mse: float = 1.0
    perceptual: float = 0.0
    native: float = 0.0
    native_fused: float = 0.0
    semantic: float = 0.0
    gan: float = 0.0
    lecam: float = 0.0
    gan_start: int = 0
    discriminator_start: int = 0
    latent_penalty: float = 0.0
    latent_noise: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(0, **vars(self))
        if not self.gan and (self.lecam or self.gan_start or self.discriminator_start):
            raise InputError("lecam, gan_start and discriminator_start belong to an adversary, but gan is 0")

    def check(self, recipe: "SparRecipe", stage: StageConfig) -> None:
        if self.gan:
            check_discriminator(recipe, stage)
        if self.native and not recipe.model.streams.pixel_stream:
            raise InputError(
                f"stage {stage.name}: native is about the pixel stream, which model.streams.pixel_stream switches "
                "off; expected 0"
            )

    def networks(self, recipe: "SparRecipe") -> Mapping[str, Callable[[], nn.Module]]:
        return perceptual_networks(recipe.perceptual) if self.perceptual else {}

    def build(self, recipe: "SparRecipe", networks: Networks) -> Mapping[str, Callable[[Any], nn.Module]]:
        """The adversary, and the semantic teacher: a copy of the encoder."""
        found: dict[str, Callable[[Any], nn.Module]] = {}
        if self.gan:
            found["discriminator"] = lambda _: PatchDiscriminator(recipe.discriminator)
            found["lecam"] = lambda _: LeCam()
        if self.semantic:
            found["teacher"] = lambda modules: copy.deepcopy(modules.model.tokenizer.encoder)
        return found

    def check_folder(self, stage: StageConfig, init: "InitFolder") -> None:
        reads_native = self.native or self.native_fused or self.perceptual
        if reads_native and "pixel_encoder" not in init.holds:
            refuse_model_folder(stage, init)

    def preparations(self, recipe: "SparRecipe", stage: StageConfig, origin: "Origin") -> tuple[str, ...]:
        """The semantic teacher is the encoder as it was before the first tokenizer stage; later stages find it with
        the weights that they start from.
        """
        objectives = (one.objective for one in recipe.stages)
        if not any(isinstance(one, TokenizerObjective) and one.semantic for one in objectives):
            return ()
        init, model = origin.init, origin.is_model
        if origin.teacher is not None or (init is not None and model and "teacher" in init.holds):
            return (TEACHER_FROM_FOLDER,)
        # What spar build or spar convert made has parts: no tokenizer stage has trained its encoder yet.
        if (init is not None and model and init.parts) or (not model and not self._encoder_trained(recipe, origin)):
            return (TEACHER_FROM_ENCODER,)
        if init is None or (not model and "teacher" in init.holds):
            return ()
        raise InputError(
            f"stage {stage.name}: {init.path} keeps no semantic teacher (no teacher.*), and its encoder may have "
            "been trained since; name the SPAR folder that the tokenizer's training began with: --teacher FOLDER"
        )

    def _encoder_trained(self, recipe: "SparRecipe", origin: "Origin") -> bool:
        """Whether a tokenizer stage has trained the encoder of the weights before, as far as these tell."""
        tokenizers = [isinstance(stage.objective, TokenizerObjective) for stage in recipe.stages]
        if origin.init is not None:  # an objective that this recipe does not have before its tokenizer may have
            return origin.init.kind not in {one.objective.kind for one in recipe.stages[: tokenizers.index(True)]}
        return origin.before is not None and any(tokenizers[: recipe.stages.index(origin.before) + 1])

    def prepare(self, ctx: StepContext, data: TrainingData, planned: "PlannedStage") -> None:
        modules = ctx.modules
        if TEACHER_FROM_ENCODER in planned.prepares:
            copy_weights(modules.teacher, modules.model.tokenizer.encoder)
        if TEACHER_FROM_FOLDER in planned.prepares:
            folder = planned.require_teacher()
            load_stored(modules.teacher, open_teacher(folder), f"the teacher of {folder}")

    def __call__(self, ctx: StepContext, batch: Images) -> Terms:
        modules = ctx.modules
        tokenizer = modules.model.tokenizer
        pixels = batch.require_pixels().to(memory_format=torch.channels_last)
        f_v = self._encoded(ctx, batch, pixels)
        latents = tokenizer.fuse(f_v, (pixels.shape[-2], pixels.shape[-1]))
        noisy = add_latent_noise(ctx, latents.z_f, self.latent_noise)
        decoded = tokenizer.decode(noisy.contiguous(memory_format=torch.channels_last))
        terms: Terms = {"mse": mse(decoded, pixels), "latent_square": latents.z_f.float().square().mean()}
        loss = self.mse * terms["mse"] + self.latent_penalty * terms["latent_square"]
        if self.perceptual:
            terms["perceptual"] = _perceptual(ctx, decoded, pixels)
            loss = loss + self.perceptual * terms["perceptual"]
        if self.native or self.native_fused:
            native = ctx.frozen_features("native", batch, lambda x: {"latent": modules.native_latents(x)})["latent"]
            terms["native_fused"] = native_latent_loss(latents.z_f, native)
            loss = loss + self.native_fused * terms["native_fused"]
            if self.native:
                terms["native"] = native_latent_loss(latents.z_p, native.flatten(2).transpose(1, 2))
                loss = loss + self.native * terms["native"]
        if self.semantic:
            taught = ctx.frozen_features("teacher", batch, lambda x: {"f_v": modules.teacher(x)})
            terms["semantic"] = semantic_loss(f_v, taught["f_v"])
            loss = loss + self.semantic * terms["semantic"]
        if self.gan:
            adversarial = self._adversarial(ctx, decoded, pixels)
            terms.update(adversarial)
            on, learns = (float(ctx.step >= start) for start in (self.gan_start, self.discriminator_start))
            loss = loss + on * self.gan * adversarial["gan"] + learns * adversarial["discriminator"]
        return {"loss": loss, **terms, "psnr": psnr(decoded.detach().clamp(0, 1), pixels).mean()}

    def _encoded(self, ctx: StepContext, batch: Images, pixels: Tensor) -> Tensor:
        """`f_v` `[B, N, D_s]`: anew where the encoder trains, else computed once an image."""
        encoder = ctx.modules.model.tokenizer.encoder
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            return encoder(pixels)
        return ctx.frozen_features("f_v", batch, lambda x: {"f_v": encoder(x)})["f_v"].float()

    def _adversarial(self, ctx: StepContext, decoded: Tensor, pixels: Tensor) -> Terms:
        """Both sides of the hinge game in one graph: the generator's term does not reach the discriminator's weights,
        the discriminator's term does not reach the image.
        """
        discriminator = ctx.modules.discriminator
        discriminator.requires_grad_(False)
        generator_term = generator_hinge_loss(discriminator(decoded))
        discriminator.requires_grad_(True)
        real, fake = discriminator(pixels), discriminator(decoded.detach())
        lecam = ctx.modules.lecam(real, fake, mean=ctx.parallel.mean)
        return {"gan": generator_term, "discriminator": discriminator_hinge_loss(real, fake) + self.lecam * lecam}

    def finish(self, ctx: StepContext, data: TrainingData) -> None:
        """Store the scale of `z_f`."""
        tokenizer = ctx.modules.model.tokenizer
        tokenizer.latent_scale.copy_(measure_scale(ctx, data, lambda images: tokenizer.encode(images).z_f))

    def cost(self, modules: "TrainingModules", recipe: "SparRecipe", stage: StageConfig) -> Cost:
        """Encoder, streams and fusion, decoder, and the networks of the terms that are on."""
        tokenizer, config, side = modules.model.tokenizer, recipe.model, image_side(recipe, stage)
        grid, width = side // config.token_stride, config.text.hidden_size
        image, f_v = meta_input(1, 3, side, side), meta_input(1, grid * grid, width)
        cost = part_cost(lambda: tokenizer.encoder(image), tokenizer.encoder, through=False)
        cost += part_cost(lambda: tokenizer.fuse(f_v, (side, side)), tokenizer.fusion)
        latent = meta_input(1, config.autoencoder.latent_channels, grid, grid)
        cost += part_cost(lambda: tokenizer.decoder(latent), tokenizer.decoder)
        if self.semantic:
            cost += part_cost(lambda: modules.teacher(image.detach()), modules.teacher, through=False)
        if self.native or self.native_fused:
            native = torch.zeros(1, 3, *2 * (grid * config.autoencoder.stride,), dtype=torch.bfloat16, device="meta")
            cost += part_cost(lambda: modules.pixel_encoder(native), modules.pixel_encoder, through=False)
        if self.perceptual:  # two images forward, one of them back again
            macs = sum(PERCEPTUAL_MACS[name] for name in perceptual_networks(recipe.perceptual))
            cost += Cost(3 * 2 * macs * (side / 224) ** 2)
            if recipe.perceptual.autoencoder:
                one = part_cost(lambda: modules.pixel_encoder(image), modules.pixel_encoder)
                cost += one + Cost(one.flops / 2)
        if self.gan:  # the generator's pass, then the discriminator's own on both kinds of images
            one = part_cost(lambda: modules.discriminator(image), modules.discriminator)
            cost += Cost(one.flops * 2 / 3, one.kept) + one * 2
        return cost


def _perceptual(ctx: StepContext, decoded: Tensor, pixels: Tensor) -> Tensor:
    """L_perc: the weighted distances that the recipe's networks see."""
    total, config = decoded.new_zeros((), dtype=torch.float32), ctx.recipe.perceptual
    if config.autoencoder:
        total = total + config.autoencoder * FeatureLoss(ctx.modules.pixel_encoder.features)(decoded, pixels)
    for name in perceptual_networks(config):
        total = total + getattr(config, name) * ctx.networks[name](decoded, pixels)
    return total
