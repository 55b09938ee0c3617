"""Distillation of the flow to a few steps without guidance (the idea of PeRFlow, arXiv 2405.07510, at the windows'
starts alone).

The flow's time is cut into windows, at the times of Euler's method with as many steps. From the start of a window the
teacher, the denoiser as it was before the stage, goes on with guidance in `teacher_steps` steps of Euler's to the
window's end. There the student is to arrive in one step, by its conditional branch alone:

    v(x, t_i) = (x - x') / (t_i - t_(i+1)),        x = (1 - t_i) z + t_i noise,        x' where the teacher arrives

B images, D_p latent channels, h w the grid.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from spar.checkpoints.spar_format import read_sampling
from spar.common.errors import InputError
from spar.data.batches import Captioned, Edits, Images, Layouts
from spar.flow.guidance import apply_guidance
from spar.flow.path import interpolate, per_sample
from spar.flow.sampler import euler_times
from spar.models.spar import Condition
from spar.training.cost import Cost, part_cost
from spar.training.data import TrainingData
from spar.training.distributed import copy_weights
from spar.training.objectives.base import Networks, Objective, StepContext, Terms, check_at_least
from spar.training.objectives.flow import meta_velocity
from spar.training.objectives.unified import (
    FEW_STEP,
    UnifiedObjective,
    condition_cost,
    condition_of,
    image_cost,
    mixed_cost,
    target_features,
)
from spar.training.plan import RANDOM

if TYPE_CHECKING:
    from spar.training.config import StageConfig
    from spar.training.modules import TrainingModules
    from spar.training.plan import InitFolder, Origin, PlannedStage
    from spar.training.systems.spar import SparRecipe

TEACHER_FROM_DENOISER = "flow teacher from denoiser"


@dataclass(frozen=True)
class FewStepObjective(Objective["SparRecipe"]):
    """The mean square of what the student's step misses, at the start of a window drawn for each image.

    `windows` is the number of steps that the model then takes, by Euler's method and without guidance: its folder says
    so. The teacher's guidance is the recipe's, of edits theirs; 1 for both distils a model of few steps to fewer.
    """

    kind: ClassVar[str] = FEW_STEP
    takes: ClassVar[tuple[type[Images], ...]] = (Captioned, Layouts, Edits)
    reads_features: ClassVar[bool] = True
    continues: ClassVar[bool] = True
    windows: int = 4
    teacher_steps: int = 5

    def __post_init__(self) -> None:
        check_at_least(1, windows=self.windows, teacher_steps=self.teacher_steps)

    def check(self, recipe: "SparRecipe", stage: "StageConfig") -> None:
        if any(not pattern.startswith("model.denoiser") for pattern in stage.trainable):
            raise InputError(
                f"stage {stage.name}: the teacher shares all but the denoiser with the model; expected patterns of "
                f"model.denoiser.* in trainable, got {', '.join(stage.trainable)}"
            )

    def build(self, recipe: "SparRecipe", networks: Networks) -> Mapping[str, Callable[[Any], nn.Module]]:
        return {"flow_teacher": lambda modules: copy.deepcopy(modules.model.denoiser)}

    def check_folder(self, stage: "StageConfig", init: "InitFolder") -> None:
        drawing = ("tokenizer", "router", "connector", "denoiser")
        begun = [part for part, how in init.parts.items() if how.startswith(RANDOM) and part.startswith(drawing)]
        if begun or not (init.is_model or init.made_by(UnifiedObjective, FewStepObjective)):
            found = f"{', '.join(begun)} with random weights" if begun else f"the end of a stage of kind {init.kind}"
            raise InputError(f"stage {stage.name}: expected a model that draws in {init.path}, got {found}")

    def preparations(self, recipe: "SparRecipe", stage: "StageConfig", origin: "Origin") -> tuple[str, ...]:
        if origin.reinitialize:
            raise InputError(f"stage {stage.name} goes on from a trained model: expected no --reinitialize beside it")
        if origin.init is not None and origin.init.is_model:
            self._check_teacher(recipe, origin.init.path)
        return (TEACHER_FROM_DENOISER,)

    def prepare(self, ctx: StepContext, data: TrainingData, planned: "PlannedStage") -> None:
        data.open_cache(ctx.modules.model.tokenizer)
        if TEACHER_FROM_DENOISER in planned.prepares:
            copy_weights(ctx.modules.flow_teacher, ctx.modules.model.denoiser)

    def _check_teacher(self, recipe: "SparRecipe", folder: Path) -> None:
        """Refuse to ask a model of few steps for what it was not distilled to."""
        own = read_sampling(folder)
        if own.method != "euler" or own.guidance != 1:
            return
        images, edits = (recipe.flow.guidance_of(edits=kind) for kind in (False, True))
        if images != 1 or edits != 1 or self.windows * self.teacher_steps != own.steps:
            raise InputError(
                f"{folder} draws in {own.steps} steps of Euler's without guidance: expected flow.guidance 1, "
                f"flow.edit_guidance 1 and windows times teacher_steps of {own.steps}, got {images:g}, {edits:g} and "
                f"{self.windows} times {self.teacher_steps}"
            )

    def __call__(self, ctx: StepContext, batch: Captioned) -> Terms:
        """Terms of captions, of `Layouts` on a blank canvas, or of `Edits`."""
        flow, scale = ctx.recipe.flow, ctx.recipe.flow.guidance_of(edits=isinstance(batch, Edits))
        with torch.no_grad():
            latent = target_features(ctx, batch)["latent"].float()                            # [B, D_p, h, w]
            condition = condition_of(ctx, batch, batch.texts)
            other = condition_of(ctx, batch, [None] * len(batch)) if scale != 1 else None
        generator, count = ctx.generator(), ctx.stage.batch
        noise = torch.randn((count, *latent.shape[1:]), generator=generator, device=ctx.device)
        window = torch.randint(self.windows, (count,), generator=generator, device=ctx.device)
        noise, window = ctx.own_rows(noise), ctx.own_rows(window)
        times = euler_times(self.windows * self.teacher_steps, flow.sampling_shift).to(ctx.device)
        first = window * self.teacher_steps
        start, end = times[first], times[first + self.teacher_steps]                          # [B]
        x = interpolate(latent, noise, start)
        with torch.no_grad():
            wanted = (x - self._arrival(ctx, x, times, first, condition, other, scale)) / per_sample(start - end, x)
        missed = ctx.modules.model.velocity(x, start, condition).velocity.float() - wanted
        return {"loss": missed.square().mean(), "teacher_square": wanted.square().mean()}

    def _arrival(
        self, ctx: StepContext, x: Tensor, times: Tensor, first: Tensor, condition: Condition, other: Condition | None,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Where the teacher arrives from `x` `[B, D_p, h, w]` at the end of each image's window; `other` is None
        where the scale is 1.
        """
        teacher = ctx.modules.flow_teacher
        branches = [(one, self._reads(ctx, one)) for one in (condition, other) if one is not None]
        for step in range(self.teacher_steps):
            now, then = times[first + step], times[first + step + 1]
            found = [teacher(x, now, reads, one.mask, one.reference).velocity.float() for one, reads in branches]
            velocity = apply_guidance(found[0], found[1], scale) if other is not None else found[0]
            x = x + per_sample(then - now, x) * velocity
        return x

    def _reads(self, ctx: StepContext, condition: Condition) -> Any:
        """What the teacher reads at all steps; sharded blocks give their keys within their own pass alone."""
        return condition.states if ctx.parallel.sharded else ctx.modules.flow_teacher.key_values(condition.states)

    def cost(self, modules: "TrainingModules", recipe: "SparRecipe", stage: "StageConfig") -> Cost:
        """The target's features, both branches' conditions, and the DiT: the student's step and the teacher's, which
        have no way back.
        """
        model, teacher, flow = modules.model, modules.flow_teacher, recipe.flow
        encoded = Cost() if recipe.data.has_cache else image_cost(model)

        def one(words: int, images: int) -> Cost:
            tokens = words + recipe.model.connector.queries
            guided = flow.guidance_of(edits=images > 1) != 1
            taught = part_cost(lambda: meta_velocity(model, tokens, teacher), teacher, through=False)
            cost = encoded * images + condition_cost(model, words, 1, through=False)
            cost += condition_cost(model, words, 0, through=False) * guided
            return cost + taught * (self.teacher_steps * (1 + guided))

        return mixed_cost(stage, recipe.model.grid**2, one)
