"""Self-Flow (arXiv 2603.06507): the denoiser teaches itself, the rival of an image encoder as its teacher.

Each image has two times, and each token one of them. What the denoiser makes of that mixture in an early block is to
tell, through a head, what its own moving average makes of the whole image at the less noisy time in a later block:

    L = L_fm + align L_self,        L_self = -mean_i cos(phi(f_i(x_tau, tau)), f'_i(x_min(t,s), min(t, s)))

B images, R noise draws an image, N tokens, D the denoiser's width.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spar.common.errors import InputError
from spar.data.batches import Captioned
from spar.losses.alignment import alignment_loss
from spar.models.denoiser import Denoiser
from spar.models.spar import Condition
from spar.training.cost import Cost, meta_input, part_cost
from spar.training.data import TrainingData
from spar.training.distributed import copy_weights, whole_tensor
from spar.training.modules import AlignmentHead
from spar.training.objectives.base import Networks, StepContext, Terms, check_at_least
from spar.training.objectives.flow import PROMPT_TOKENS, Noised, draw_noise, draw_times, meta_velocity
from spar.training.objectives.unified import TEACHER_MEAN, UnifiedObjective

if TYPE_CHECKING:
    from spar.training.config import StageConfig
    from spar.training.modules import TrainingModules
    from spar.training.plan import Origin, PlannedStage
    from spar.training.systems.spar import SparRecipe

AVERAGE_FROM_DENOISER = "denoiser average from denoiser"


@dataclass(frozen=True)
class SelfFlowObjective(UnifiedObjective):
    """`unified` with the denoiser's own average as the teacher of `align`; of the recipe's `alignment` only `hidden` is
    read, the width of the head.

    Attributes:
        mask_ratio: the expected part of an image's tokens that has the second time.
        teacher_depth: the 1-based block whose features teach, the same in all of a recipe's stages; those of
            `denoiser.align_depth` learn.
        decay: of the average, with a short memory at the start.
    """

    kind: ClassVar[str] = "self_flow"
    align: float = 0.5
    mask_ratio: float = 0.25
    teacher_depth: int = 1
    decay: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, teacher_depth=self.teacher_depth)
        for name in ("mask_ratio", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: expected 0 to 1, got {getattr(self, name)}")

    def weight(self, recipe: "SparRecipe") -> float:
        return self.align

    def check(self, recipe: "SparRecipe", stage: "StageConfig") -> None:
        super().check(recipe, stage)
        if self.teacher_depth > recipe.model.denoiser.layers:
            raise InputError(
                f"stage {stage.name}, teacher_depth: expected 1 to {recipe.model.denoiser.layers}, got "
                f"{self.teacher_depth}"
            )
        others = [one.objective.teacher_depth for one in recipe.stages if isinstance(one.objective, SelfFlowObjective)]
        if any(depth != self.teacher_depth for depth in others):  # they share one average
            raise InputError(
                f"stage {stage.name}, teacher_depth: expected one of all self_flow stages, got "
                f"{', '.join(map(str, others))}"
            )
        if recipe.lora.rank:
            raise InputError(f"stage {stage.name}: self_flow averages whole weights; expected no lora beside it")

    def networks(self, recipe: "SparRecipe") -> Mapping[str, Callable[[], nn.Module]]:
        return {}

    def build(self, recipe: "SparRecipe", networks: Networks) -> Mapping[str, Callable[[Any], nn.Module]]:
        config = recipe.model.denoiser
        return {
            "self_flow_head": lambda _: AlignmentHead(config.width, recipe.alignment.hidden, config.width),
            "denoiser_average": lambda modules: _first_blocks(modules.model.denoiser, self.teacher_depth),
        }

    def may_rest(self, recipe: "SparRecipe") -> tuple[str, ...]:
        return () if self.align else ("self_flow_head.*",)

    def preparations(self, recipe: "SparRecipe", stage: "StageConfig", origin: "Origin") -> tuple[str, ...]:
        found = [name for name in super().preparations(recipe, stage, origin) if name != TEACHER_MEAN]
        return (*found, AVERAGE_FROM_DENOISER)

    def prepare(self, ctx: StepContext, data: TrainingData, planned: "PlannedStage") -> None:
        super().prepare(ctx, data, planned)
        if AVERAGE_FROM_DENOISER in planned.prepares:
            copy_weights(ctx.modules.denoiser_average, ctx.modules.model.denoiser)

    def __call__(self, ctx: StepContext, batch: Captioned) -> Terms:
        """Terms as of `unified`; the flow's errors at mixed times have names of their own, for they do not compare with
        those of one time.
        """
        terms = super().__call__(ctx, batch)
        return {f"mixed_{name}" if name.startswith("flow") else name: value for name, value in terms.items()}

    @torch.no_grad()
    def after_step(self, ctx: StepContext) -> None:
        """Move the average towards the denoiser."""
        decay = min(self.decay, (1 + ctx.step) / (10 + ctx.step))
        given = dict(ctx.modules.model.denoiser.named_parameters())
        for name, average in ctx.modules.denoiser_average.named_parameters():
            own = given[name]  # which may be sharded where the average, which is frozen, is held whole
            average.lerp_(own if isinstance(average, DTensor) else whole_tensor(own), 1 - decay)

    def noised(self, ctx: StepContext, latent: Tensor) -> Noised:
        """Two times an image, of which each token has one: `time` `[B R, N]`."""
        drawn, generator = draw_noise(ctx, latent, self.noise_samples), ctx.generator("tokens")
        other = draw_times(ctx, self.noise_samples, generator)
        shape = (ctx.stage.batch, self.noise_samples, latent.shape[-2] * latent.shape[-1])
        mask = torch.rand(shape, generator=generator, device=ctx.device) < self.mask_ratio
        mask = ctx.own_rows(mask).flatten(0, 1)                                               # [B R, N]
        return Noised(drawn.clean, drawn.noise, torch.where(mask, other[:, None], drawn.time[:, None]))

    def aligned(
        self, ctx: StepContext, batch: Captioned, target: Mapping[str, Tensor], noised: Noised, condition: Condition,
        features: Tensor,
    ) -> Terms:  # fmt: skip
        time = noised.time.amin(1)                                                            # [B R]
        with torch.no_grad():
            teacher = ctx.modules.denoiser_average(
                noised.latent(time), time, condition.states, condition.mask, condition.reference
            ).features
        return alignment_loss(ctx.modules.self_flow_head(features), teacher)

    def alignment_cost(self, modules: "TrainingModules", recipe: "SparRecipe") -> Cost:
        """The head, and the average's blocks, which have no way back."""
        features = meta_input(1, recipe.model.grid**2, recipe.model.denoiser.width)
        cost = part_cost(lambda: modules.self_flow_head(features), modules.self_flow_head)
        tokens, average = PROMPT_TOKENS + recipe.model.connector.queries, modules.denoiser_average
        return cost + part_cost(lambda: meta_velocity(modules.model, tokens, average), average, through=False)


def _first_blocks(denoiser: Denoiser, depth: int) -> Denoiser:
    """A copy of a denoiser that ends after `depth` blocks, whose features are those of the last."""
    part = copy.deepcopy(denoiser)
    part.network.transformer_blocks = part.network.transformer_blocks[:depth]
    part.config = replace(denoiser.config, layers=depth, align_depth=depth)
    return part
