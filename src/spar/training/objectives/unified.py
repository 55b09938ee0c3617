"""The unified stages: generation and editing on `z_f`, taught by the tokenizer's own encoder (SPAR section 3.3)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from spar.common.errors import InputError
from spar.data.batches import Captioned, Edits, Images, Layouts
from spar.models.spar import Condition
from spar.training.cost import Cost, meta_input, part_cost
from spar.training.data import MixedData, TrainingData
from spar.training.distributed import copy_weights
from spar.training.feature_cache import encode
from spar.training.modules import EXTERNAL_TEACHER, AlignmentHead
from spar.training.objectives.base import SAMPLE, Networks, Objective, StepContext, Terms, check_at_least
from spar.training.objectives.common import sample_images
from spar.training.objectives.flow import (
    PROMPT_TOKENS,
    Noised,
    alignment_terms,
    draw_noise,
    flow_matching,
    meta_layers,
    meta_velocity,
)
from spar.training.teacher import load_external_teacher

if TYPE_CHECKING:
    from spar.training.config import StageConfig
    from spar.training.modules import TrainingModules
    from spar.training.plan import InitFolder, Origin, PlannedStage
    from spar.training.systems.spar import SparRecipe

CONNECTOR_FROM_LLM, TEACHER_MEAN = "connector from LLM", "teacher mean"
FEW_STEP = "few_step"  # the kind of the objective that goes on from a unified stage, and keeps its connector


@dataclass(frozen=True)
class UnifiedObjective(Objective["SparRecipe"]):
    """L_fm + align L_align; align is lambda_a, `noise_samples` the draws of noise and time an image.

    `balance` weighs a term that is no part of the paper's loss: log K less the entropy of the routing weights, their
    mean over a prompt's tokens. Without it the router of a small model settles on one layer for every token.

    `gradient_share` logs, as `align_share`, what part of the gradient that reaches the aligned block is the
    alignment's: |g_align| / (|g_align| + |g_fm|), the mean over samples; the later blocks then go back twice.
    """

    kind: ClassVar[str] = "unified"
    takes: ClassVar[tuple[type[Images], ...]] = (Captioned, Layouts, Edits)
    reads_features: ClassVar[bool] = True
    align: float = 0.0
    noise_samples: int = 1
    balance: float = 0.0
    gradient_share: bool = False

    def __post_init__(self) -> None:
        check_at_least(0, align=self.align, balance=self.balance)
        check_at_least(1, noise_samples=self.noise_samples)

    @property
    def draws(self) -> int:
        return self.noise_samples

    def weight(self, recipe: "SparRecipe") -> float:
        """lambda_a: 0 where the recipe has no teacher."""
        return 0.0 if recipe.alignment.teacher == "none" else self.align

    def check(self, recipe: "SparRecipe", stage: "StageConfig") -> None:
        if recipe.data.has_cache and recipe.alignment.teacher == "external":
            raise InputError("data.cache: an external teacher reads images, which a run from a cache does not have")

    def networks(self, recipe: "SparRecipe") -> Mapping[str, Callable[[], nn.Module]]:
        source = recipe.alignment.external
        return {} if source is None else {EXTERNAL_TEACHER: lambda: load_external_teacher(source)}

    def build(self, recipe: "SparRecipe", networks: Networks) -> Mapping[str, Callable[[Any], nn.Module]]:
        """phi, also where nothing is aligned: an ablation keeps its trainable patterns."""
        width, hidden = recipe.model.denoiser.width, recipe.alignment.hidden
        return {"alignment_head": lambda modules: AlignmentHead(width, hidden, len(modules.teacher_mean))}

    def may_rest(self, recipe: "SparRecipe") -> tuple[str, ...]:
        return () if self.weight(recipe) else ("alignment_head.*",)

    def check_folder(self, stage: "StageConfig", init: "InitFolder") -> None:
        if init.random_streams:
            raise InputError(
                f"stage {stage.name}: the tokenizer of {init.path} is not trained yet: "
                f"{', '.join(init.random_streams)} have random weights, as its manifest says; train the tokenizer "
                "stages first"
            )

    def preparations(self, recipe: "SparRecipe", stage: "StageConfig", origin: "Origin") -> tuple[str, ...]:
        found = []
        trained = origin.made_by(UnifiedObjective) or origin.is_model  # a SPAR folder's connector is no blank one
        trained = trained or origin.kind == FEW_STEP
        if not trained or origin.restarts("model.connector.layers"):
            found.append(CONNECTOR_FROM_LLM)
        if self.weight(recipe) and recipe.alignment.center:
            found.append(TEACHER_MEAN)
        return tuple(found)

    def prepare(self, ctx: StepContext, data: TrainingData, planned: "PlannedStage") -> None:
        model = ctx.modules.model
        if self.gradient_share and (ctx.parallel.sharded or ctx.parallel.config.compile):
            raise InputError(
                f"stage {ctx.stage.name}: gradient_share goes back twice, which compiled and sharded blocks do not "
                "allow; expected no parallelism.compile, and parallelism.strategy ddp"
            )
        data.open_cache(model.tokenizer)
        if CONNECTOR_FROM_LLM in planned.prepares:
            model.connector.initialize_from(model.language, copy_weights)
        if TEACHER_MEAN in planned.prepares:
            ctx.modules.teacher_mean.copy_(ctx.compute(self._teacher_mean, ctx, data))

    @torch.no_grad()
    def _teacher_mean(self, ctx: StepContext, data: TrainingData) -> Tensor:
        """The mean of the alignment teacher's features `[D_s]`, for centring; before a stage, since it is frozen.

        So a run that starts from another run's tokenizer centres on its own teacher.
        """
        cached = data.cached_features(SAMPLE)
        if cached is not None:
            return cached.float().mean((0, 1))
        encoder = ctx.modules.model.tokenizer.encoder
        external = ctx.recipe.alignment.teacher == "external"
        with ctx.autocast():
            chunks = sample_images(ctx, data)
            rows = [external_features(ctx, x).flatten(1, 2) if external else encoder(x) for x in chunks]
        return torch.cat(rows).float().mean((0, 1))

    def __call__(self, ctx: StepContext, batch: Captioned) -> Terms:
        """Terms of a generation batch: of captions, of `Layouts` on a blank canvas, or of `Edits`."""
        texts = ctx.unconditional(batch.texts, ctx.recipe.flow.unconditional_share)
        target, condition = target_features(ctx, batch), condition_of(ctx, batch, texts)
        noised = self.noised(ctx, target["latent"].float())
        error, output = flow_matching(ctx, noised, condition)
        terms = {"loss": error, "flow": error.detach(), "routing_entropy": routing_entropy(condition)}
        if self.balance:
            imbalance = routing_imbalance(condition)
            terms |= {"loss": error + self.balance * imbalance, "imbalance": imbalance.detach()}
        weight = self.weight(ctx.recipe)
        if weight:
            aligned = self.aligned(ctx, batch, target, noised, condition, output.features)
            pull = weight * aligned.pop("loss")
            if self.gradient_share:
                terms["align_share"] = gradient_share(pull, error, output.features)
            terms |= {"loss": terms["loss"] + pull, **aligned}
        name = "edit" if isinstance(batch, Edits) else "layout" if isinstance(batch, Layouts) else "generate"
        return {**terms, f"flow_{name}": terms["flow"]}

    def noised(self, ctx: StepContext, latent: Tensor) -> Noised:
        """Noise and times for clean latents `[B, D_p, h, w]`."""
        return draw_noise(ctx, latent, self.noise_samples)

    def aligned(
        self, ctx: StepContext, batch: Captioned, target: Mapping[str, Tensor], noised: Noised, condition: Condition,
        features: Tensor,
    ) -> Terms:  # fmt: skip
        """L_align as `loss`, and cosines, of the denoiser's features `[B R, N, D]` with the teacher's."""
        grid = (noised.clean.shape[-2], noised.clean.shape[-1])
        external = ctx.recipe.alignment.teacher == "external"
        teacher = external_features(ctx, batch.require_pixels()) if external else target["f_v"].unflatten(1, grid)
        return alignment_terms(ctx, features, grid, teacher, self.noise_samples)

    def cost(self, modules: "TrainingModules", recipe: "SparRecipe", stage: "StageConfig") -> Cost:
        """The target's features, the LLM, router and connector, and the DiT for each draw of noise."""
        model, config = modules.model, recipe.model
        encode_cost = Cost() if recipe.data.has_cache else image_cost(model)
        cost = mixed_cost(
            stage, config.grid**2,
            lambda words, images: encode_cost * images + condition_cost(model, words, self.noise_samples),
        )  # fmt: skip
        return cost + self.alignment_cost(modules, recipe) * self.noise_samples if self.weight(recipe) else cost

    def alignment_cost(self, modules: "TrainingModules", recipe: "SparRecipe") -> Cost:
        """The cost of a draw's alignment."""
        features = meta_input(1, recipe.model.grid**2, recipe.model.denoiser.width)
        return part_cost(lambda: modules.alignment_head(features), modules.alignment_head)


def gradient_share(first: Tensor, second: Tensor, features: Tensor) -> Tensor:
    """|g_1| / (|g_1| + |g_2|) of two losses' gradients at `features` `[B, ...]`, the mean over its rows."""
    one, two = (
        torch.autograd.grad(loss, features, retain_graph=True)[0].float().flatten(1).norm(dim=1)
        for loss in (first, second)
    )
    return (one / (one + two).clamp_min(torch.finfo(one.dtype).tiny)).mean()


def routing_imbalance(condition: Condition) -> Tensor:
    """The mean over prompts of log K - H(mean of the routing weights over the prompt's real tokens).

    0 if each layer has its share in every prompt, log K for one layer.
    """
    real = condition.mask.bool()[..., None]
    weights = (condition.weights.float() * real).sum(1) / real.sum(1)                        # [B, K]
    return math.log(weights.shape[-1]) + torch.special.xlogy(weights, weights).sum(-1).mean()


@torch.no_grad()
def routing_entropy(condition: Condition) -> Tensor:
    """The mean entropy of a token's routing weights (nats) over a prompt's real tokens, then over prompts; 0 if each
    token reads one layer.
    """
    weights, real = condition.weights.float(), condition.mask.float()                        # [B, T, K], [B, T]
    return -((torch.special.xlogy(weights, weights).sum(-1) * real).sum(1) / real.sum(1)).mean()


def external_features(ctx: StepContext, pixels: Tensor) -> Tensor:
    """The external teacher's features, `[B, rows, columns, D]`; asked anew each time, for they are too many to keep."""
    features, grid = ctx.networks[EXTERNAL_TEACHER](pixels)
    return features.unflatten(1, grid)


def condition_of(ctx: StepContext, batch: Captioned, texts: Sequence[str | None]) -> Condition:
    """The condition of a batch's images by `texts`, None for the unconditional prompt."""
    model, reference = ctx.modules.model, None
    if isinstance(batch, Edits):
        tokens, reference = ctx.prompts.edit(texts).to(ctx.device), _reference_features(ctx, batch).float()
    elif isinstance(batch, Layouts):
        tokens, reference = ctx.prompts.layout(texts).to(ctx.device), model.canvas(len(batch))
    else:
        tokens = ctx.prompts.generation(texts).to(ctx.device)
    return model.condition(tokens.ids, tokens.mask, reference)


def target_features(ctx: StepContext, batch: Captioned) -> Mapping[str, Tensor]:
    """`f_v` and the normalised latent of the images to be drawn."""
    if "latent" in batch.features:
        return batch.features
    name, tokenizer = "edited" if isinstance(batch, Edits) else "scenes", ctx.modules.model.tokenizer
    return ctx.frozen_features(name, batch, lambda x: encode(tokenizer, x))


def _reference_features(ctx: StepContext, batch: Edits) -> Tensor:
    """`f_v` of the images before the edit."""
    if "reference" in batch.features:
        return batch.features["reference"]
    tokenizer = ctx.modules.model.tokenizer
    return ctx.frozen_features("scenes", batch, lambda x: encode(tokenizer, x), batch.require_references())["f_v"]


def mixed_cost(stage: "StageConfig", cells: int, one: Callable[[int, int], Cost]) -> Cost:
    """The cost of an image of a stage's data: the mean of its kinds' operations, the most of their memory.

    Args:
        cells: tokens of an image, or of the canvas of a layout.
        one: the cost by the tokens of the prompt and the images to encode.
    """
    share = stage.data.edit_share if isinstance(stage.data, MixedData) else 0.0
    laid_out = (1 - share) * getattr(stage.data, "layouts", 0.0)  # of layouts, with a canvas and no image before
    parts = (
        (1 - share - laid_out, PROMPT_TOKENS, 1), (laid_out, PROMPT_TOKENS + cells, 1),
        (share, PROMPT_TOKENS + cells, 2),
    )  # fmt: skip
    kinds = [(part, one(words, images)) for part, words, images in parts if part]
    kept, recomputed = (max(getattr(cost, name) for _, cost in kinds) for name in ("kept", "recomputed"))
    return Cost(sum(part * cost.flops for part, cost in kinds), kept, recomputed)


def image_cost(model: Any) -> Cost:
    """The features of one image."""
    tokenizer, config = model.tokenizer, model.config
    image, f_v = meta_input(1, 3, *2 * (config.image_size,)), meta_input(1, config.grid**2, config.text.hidden_size)
    cost = part_cost(lambda: tokenizer.encoder(image.detach()), tokenizer.encoder, through=False)
    return cost + part_cost(lambda: tokenizer.fuse(f_v.detach()), tokenizer.fusion, through=False)


def condition_cost(model: Any, words: int, draws: int, *, through: bool = True) -> Cost:
    """The LLM on the prompt and its queries, router, connector, and `draws` passes of the denoiser; `through`: whether
    a gradient passes the first three where they are frozen.
    """
    config, layers = model.config, model.language.network.layers
    queries = config.connector.queries
    tokens = words + queries
    cost = part_cost(lambda: meta_layers(model, layers, words), model.language, through=False)  # with LoRA it trains
    cost += part_cost(lambda: meta_layers(model, layers, queries), model.language, through=through)
    states = [meta_input(1, tokens, config.text.hidden_size) for _ in range(config.router.count)]
    cost += part_cost(lambda: model.router(torch.stack(states)), model.router, through=through)
    cost += part_cost(lambda: _meta_connector(model, tokens), model.connector, through=through)
    return cost + part_cost(lambda: meta_velocity(model, tokens), model.denoiser) * draws


def _meta_connector(model: Any, tokens: int) -> Tensor:
    return model.connector.projection(model.connector.norm(meta_layers(model, model.connector.layers, tokens)))
