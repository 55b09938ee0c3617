"""DualToken's tokenizer: pixels from the pixel codes, the frozen teacher's features from the semantic codes.

Weights and adaptive adversary follow the public code (docs/dualtoken.md); both codebooks follow their averages.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from spar.common.errors import InputError
from spar.data.batches import Images
from spar.losses.adversarial import LeCam, PatchDiscriminator, discriminator_hinge_loss, generator_hinge_loss
from spar.losses.distillation import cosine_distance, feature_mse
from spar.losses.perceptual import FeatureLoss
from spar.losses.reconstruction import mse, psnr
from spar.models.dualtoken.tokenizer import DualTokenizerOutput
from spar.training.config import StageConfig
from spar.training.cost import Cost, meta_input, part_cost
from spar.training.data import TrainingData
from spar.training.distributed import copy_weights
from spar.training.objectives.base import Networks, Objective, StepContext, Terms, check_at_least
from spar.training.objectives.common import check_discriminator, sample_images
from spar.training.plan import RANDOM
from spar.training.teacher import PERCEPTUAL_MACS, perceptual_networks

if TYPE_CHECKING:
    from spar.training.plan import Origin, PlannedStage
    from spar.training.systems.dualtoken import DualTokenRecipe

TEACHER_FROM_ENCODER, CODEBOOKS_FROM_DATA = "teacher from encoder", "codebooks from data"
RANDOM_PART = "tokenizer.reduce_pixel"  # of a folder that spar build made, of random weights
ADAPTIVE_RANGE = (0.3, 10.0)  # of the adversary's adaptive weight (public code)


@dataclass(frozen=True)
class DualTokenizerObjective(Objective["DualTokenRecipe"]):
    """Weights of the named terms; 0 switches a term off. The defaults are those of the public code, whose `mse` of 5 is
    of pixels in [-1, 1]: 20 of ours in [0, 1].

    `mse` and `perceptual` are of the decoded image; `semantic` weighs squared error plus cosine distance between the
    quantised features and the teacher's at the semantic layer, `pooled` the same of the pooled features; `commitment`
    weighs both vocabularies' commitment; `gan` is multiplied by the ratio of the gradients of reconstruction (squared
    error of pixels in [-1, 1] plus the perceptual term, unweighted) and adversary at the decoder's last layer, and
    counts from the step `gan_start` on; the discriminator learns from `discriminator_start` on.
    """

    kind: ClassVar[str] = "dual_tokenizer"
    takes: ClassVar[tuple[type[Images], ...]] = (Images,)
    clipped_apart: ClassVar[str | None] = "discriminator."
    mse: float = 20.0
    perceptual: float = 1.0
    semantic: float = 5.0
    pooled: float = 1.0
    commitment: float = 5.0
    gan: float = 0.75
    lecam: float = 0.0
    gan_start: int = 0
    discriminator_start: int = 0

    def __post_init__(self) -> None:
        check_at_least(0, **vars(self))
        if not self.gan and (self.lecam or self.gan_start or self.discriminator_start):
            raise InputError("lecam, gan_start and discriminator_start belong to an adversary, but gan is 0")

    def check(self, recipe: "DualTokenRecipe", stage: StageConfig) -> None:
        if self.gan:
            check_discriminator(recipe, stage)

    def networks(self, recipe: "DualTokenRecipe") -> Mapping[str, Callable[[], nn.Module]]:
        return perceptual_networks(recipe.perceptual) if self.perceptual else {}

    def build(self, recipe: "DualTokenRecipe", networks: Networks) -> Mapping[str, Callable[[Any], nn.Module]]:
        """The frozen teacher, a copy of the image tower, and the adversary."""
        found: dict[str, Callable[[Any], nn.Module]] = {}
        if self._taught(recipe):
            found["teacher"] = lambda modules: copy.deepcopy(modules.model.tokenizer.encoder)
        if self.gan:
            found["discriminator"] = lambda _: PatchDiscriminator(recipe.discriminator)
            found["lecam"] = lambda _: LeCam()
        return found

    def preparations(self, recipe: "DualTokenRecipe", stage: StageConfig, origin: "Origin") -> tuple[str, ...]:
        """Before the first stage of this kind the image tower becomes the teacher, and data begin the codebooks."""
        init = origin.init
        if init is not None and init.is_model and not init.parts.get(RANDOM_PART, "").startswith(RANDOM):
            raise InputError(
                f"stage {stage.name}: {init.path} holds a trained tokenizer, of which a finished model keeps no "
                "teacher: start from the end of a stage (RUN/STAGE/done), or from a folder that spar build made"
            )
        if origin.made_by(DualTokenizerObjective):
            return ()
        return (TEACHER_FROM_ENCODER, CODEBOOKS_FROM_DATA) if self._taught(recipe) else (CODEBOOKS_FROM_DATA,)

    def _taught(self, recipe: "DualTokenRecipe") -> bool:
        """Whether some term reads the frozen teacher."""
        return bool(self.semantic or self.pooled or (self.perceptual and recipe.perceptual.teacher))

    def prepare(self, ctx: StepContext, data: TrainingData, planned: "PlannedStage") -> None:
        parallel, tokenizer = ctx.parallel, ctx.modules.model.tokenizer
        sharded = parallel.sharded and parallel.config.shard_frozen
        if sharded and self.gan and self.perceptual and ctx.recipe.perceptual.teacher:
            raise InputError(  # the adaptive weight's own backward pass would free the teacher's shards
                f"stage {ctx.stage.name}: the adversary's adaptive weight needs the teacher whole on each process; "
                "expected --parallelism.shard-frozen False, or --perceptual.teacher 0"
            )
        if TEACHER_FROM_ENCODER in planned.prepares:
            copy_weights(ctx.modules.teacher, tokenizer.encoder)
        if CODEBOOKS_FROM_DATA in planned.prepares:
            chunks = sample_images(ctx, data)
            with ctx.autocast():
                features = ctx.compute(lambda: [tokenizer.features(chunk) for chunk in chunks])
            for name, quantizer in tokenizer.quantizers.items():
                vectors = torch.cat([feature.inputs[name].float() for feature in features])
                quantizer.init_from_data(vectors, ctx.generator())

    def __call__(self, ctx: StepContext, batch: Images) -> Terms:
        tokenizer = ctx.modules.model.tokenizer
        pixels = batch.require_pixels()
        out = tokenizer(pixels, noise=self._noise(ctx, tokenizer))
        decoded = tokenizer.decoder(out.image_vectors, tokenizer.config.grid)
        terms: Terms = {"mse": mse(decoded, pixels)}
        loss, reconstruction = self.mse * terms["mse"], 4 * terms["mse"]       # the latter of pixels in [-1, 1]
        if self.perceptual:
            terms["perceptual"] = _perceptual(ctx, decoded, pixels)
            loss = loss + self.perceptual * terms["perceptual"]
            reconstruction = reconstruction + terms["perceptual"]
        loss = loss + self._semantic(ctx, batch, out, terms)
        for name, quantized in out.quantized.items():
            terms[f"commitment_{name}"] = quantized.commitment
            loss = loss + self.commitment * terms[f"commitment_{name}"]
        if self.gan:
            loss = loss + self._adversarial(ctx, decoded, pixels, reconstruction, terms)
        return {"loss": loss, **terms, "psnr": psnr(decoded.detach().clamp(0, 1), pixels).mean()}

    def _noise(self, ctx: StepContext, tokenizer: Any) -> dict[str, Tensor]:
        """This micro-step's noise for the vectors that may restart entries, drawn for the whole batch."""
        generator, found = ctx.generator(), {}
        for name, quantizer in tokenizer.quantizers.items():
            shape = (ctx.stage.batch, tokenizer.config.grid**2, quantizer.config.depth)
            drawn = torch.rand(shape, generator=generator, device=ctx.device).clamp(min=1e-20)
            found[name] = ctx.own_rows(-(-drawn.log()).log())
        return found

    def _semantic(self, ctx: StepContext, batch: Images, out: DualTokenizerOutput, terms: Terms) -> Tensor:
        """Distances to the teacher, of features and pooled; the features' parts go into `terms`."""
        total = out.features.new_zeros((), dtype=torch.float32)
        if not (self.semantic or self.pooled):
            return total
        teacher = ctx.modules.teacher

        def taught(images: Tensor) -> Terms:
            deep, pooled = teacher(images)
            return {"deep": deep, "pooled": pooled}

        wanted = ctx.frozen_features("teacher", batch, taught)
        for name, own, target, weight in (
            ("semantic", out.features, wanted["deep"], self.semantic),
            ("pooled", out.pooled, wanted["pooled"], self.pooled),
        ):
            if weight:
                terms[f"{name}_mse"] = feature_mse(own, target, names=(f"{name} features", "the teacher's"))
                terms[f"{name}_cosine"] = cosine_distance(own, target)
                total = total + weight * (terms[f"{name}_mse"] + terms[f"{name}_cosine"])
        return total

    def _adversarial(
        self, ctx: StepContext, decoded: Tensor, pixels: Tensor, reconstruction: Tensor, terms: Terms
    ) -> Tensor:
        """Both sides of the game in one graph, as in SPAR's tokenizer; the generator's side has an adaptive weight."""
        discriminator, last = ctx.modules.discriminator, ctx.modules.model.tokenizer.decoder.network.conv_out.weight
        discriminator.requires_grad_(False)
        generator_term = generator_hinge_loss(discriminator(decoded))
        discriminator.requires_grad_(True)
        real, fake = discriminator(pixels), discriminator(decoded.detach())
        lecam = ctx.modules.lecam(real, fake, mean=ctx.parallel.mean)
        terms["discriminator"] = discriminator_hinge_loss(real, fake) + self.lecam * lecam
        terms["gan"] = generator_term
        learned = float(ctx.step >= self.discriminator_start) * terms["discriminator"]
        if ctx.step < self.gan_start:
            return learned
        terms["gan_weight"] = adaptive_weight(reconstruction, generator_term, last, ctx.parallel.mean)
        return self.gan * terms["gan_weight"] * generator_term + learned

    def cost(self, modules: Any, recipe: "DualTokenRecipe", stage: StageConfig) -> Cost:
        """Encoder and projections, both searches, decoder, teacher, and the networks of the terms that are on."""
        tokenizer, config, side = modules.model.tokenizer, recipe.model, recipe.image_size
        positions = config.grid**2
        image = meta_input(1, 3, side, side)
        cost = part_cost(lambda: tokenizer.features(image), tokenizer.encoder)
        semantic = meta_input(1, positions, config.semantic.width)
        cost += part_cost(lambda: tokenizer.semantic_features(semantic), tokenizer.expand_semantic)
        pixel = meta_input(1, positions, config.pixel.width)
        cost += part_cost(lambda: tokenizer.decoder(pixel, config.grid), tokenizer.decoder)
        for codes in config.vocabularies.values():
            cost += Cost(2 * positions * codes.depth * codes.entries * codes.width)
        if self._taught(recipe):
            cost += part_cost(lambda: modules.teacher(image.detach()), modules.teacher, through=False)
        if self.perceptual:  # two images forward, one of them back again
            macs = sum(PERCEPTUAL_MACS[name] for name in perceptual_networks(recipe.perceptual))
            cost += Cost(3 * 2 * macs * (side / 224) ** 2)
        if self.gan:
            one = part_cost(lambda: modules.discriminator(image), modules.discriminator)
            cost += Cost(one.flops * 2 / 3, one.kept) + one * 2
        return cost

    def after_step(self, ctx: StepContext) -> None:
        """Move both codebooks."""
        for quantizer in ctx.modules.model.tokenizer.quantizers.values():
            quantizer.update(ctx.parallel.sum, ctx.parallel.gather)


def _perceptual(ctx: StepContext, decoded: Tensor, pixels: Tensor) -> Tensor:
    """The weighted distances that the recipe's networks see; the teacher's are of its two shallow layers."""
    total, config = decoded.new_zeros((), dtype=torch.float32), ctx.recipe.perceptual
    if config.teacher:
        total = total + config.teacher * FeatureLoss(ctx.modules.teacher.shallow_maps)(decoded, pixels)
    for name in perceptual_networks(config):
        total = total + getattr(config, name) * ctx.networks[name](decoded, pixels)
    return total


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last: Tensor, mean: Callable[[Tensor], Tensor]
) -> Tensor:
    """VQGAN's weight of the adversary (arXiv 2012.09841, equation 7): the ratio of the gradients' sizes at the
    decoder's `last` weight, within ADAPTIVE_RANGE; `mean` averages a gradient over the processes.
    """
    if not last.requires_grad:
        return last.new_ones(())
    wanted, given = (
        mean(torch.autograd.grad(term, last, retain_graph=True)[0]).norm() for term in (reconstruction, adversarial)
    )
    return (wanted / (given + 1e-4)).clamp(*ADAPTIVE_RANGE).detach()
