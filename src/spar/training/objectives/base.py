"""The contract of an objective, and what it computes with.

B images, R noise draws an image, N visual tokens, D_s their width, D_p latent channels, h w the grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from spar.common.errors import InputError
from spar.data.batches import Images
from spar.training.cost import Cost
from spar.training.data import TrainingData, step_rng
from spar.training.distributed import SINGLE_PROCESS, DistributedContext, ForwardWrapper
from spar.training.feature_cache import InMemoryFeatureCache, kept_dtype

if TYPE_CHECKING:
    from spar.processing.prompts import PromptEncoder
    from spar.training.config import Recipe, StageConfig
    from spar.training.plan import InitFolder, Origin, PlannedStage

Terms = dict[str, Tensor]
Rows = TypeVar("Rows", list, np.ndarray, Tensor)
Result = TypeVar("Result")
R = TypeVar("R", bound="Recipe")
Networks = Mapping[str, Any]  # frozen networks from outside, by name
SAMPLE = 512  # images on which a stage measures what later ones must know


@dataclass(frozen=True)
class StepContext:
    """What a micro-step computes with, apart from its batch.

    Noise is drawn for the whole batch of a step, of which a micro-step takes its own rows: a run computes the same at
    every number of processes.

    Attributes:
        modules: everything that training holds.
        networks: frozen networks from outside, by the names that the objectives gave them.
        features: frozen features of this stage by name, for as long as they stay frozen.
        step: of the stage, from 0; `micro_step` is the part of its batch that is computed.
        sharded: the wrapper of sharded modules (`shard_modules`), through which all that computes must go.
    """

    modules: Any
    prompts: "PromptEncoder"
    recipe: Any
    stage: "StageConfig"
    device: torch.device
    networks: Networks = field(default_factory=dict)
    features: dict[str, InMemoryFeatureCache] = field(default_factory=dict)
    parallel: DistributedContext = SINGLE_PROCESS
    step: int = 0
    micro_step: int = 0
    sharded: ForwardWrapper | None = None

    def compute(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What a function of the modules gives outside a step, without gradients; it must not change their weights."""
        with torch.no_grad():
            if self.sharded is None:
                return function(*arguments)
            result: Result = self.sharded(function, *arguments)
        if isinstance(self.sharded, FSDPModule):
            self.sharded.reshard()
        return result

    def own_rows(self, values: Rows) -> Rows:
        """This process's rows of what was drawn for a whole batch: a list, an array or a tensor."""
        return values[self.parallel.rows(len(values), self.micro_step)]

    def autocast(self) -> torch.autocast:
        """The precision of this run's matrix products."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.parallel.dtype == torch.bfloat16)

    def rng(self, purpose: str) -> np.random.Generator:
        """The generator of this step's choices for one purpose."""
        return step_rng(self.recipe.seed, f"{purpose}-{self.stage.name}", self.step)

    def generator(self, purpose: str = "noise") -> torch.Generator:
        """The generator of this step's noise, or of another purpose's, on the device."""
        return torch.Generator(self.device).manual_seed(int(self.rng(purpose).integers(0, 2**62)))

    def frozen_features(
        self, name: str, batch: Images, compute: Callable[[Tensor], Terms], pixels: Tensor | None = None
    ) -> Terms:
        """Features of a batch's images, or of other `pixels` `[B, 3, H, W]` that belong to them, which this stage does
        not train, computed once an image.

        A sharded encoder computes them anew: all processes must take part, and not all lack the same images. So do
        images that come once.
        """
        pixels = batch.require_pixels() if pixels is None else pixels
        precision = self.parallel.dtype
        if self.parallel.sharded or (batch.keys < 0).any():
            with torch.no_grad():
                return {key: rows.to(kept_dtype(rows, precision)) for key, rows in compute(pixels).items()}
        return self.features.setdefault(name, InMemoryFeatureCache(precision))(batch.keys, pixels, compute)

    def unconditional(self, texts: Sequence[str | None], share: float) -> list[str | None]:
        """The texts of this micro-step with a `share` of the prompts replaced by the unconditional one."""
        marks = self.rng("unconditional").random(self.stage.batch)
        return [None if mark < share else text for mark, text in zip(self.own_rows(marks), texts, strict=True)]


@dataclass(frozen=True)
class Objective(ABC, Generic[R]):
    """The loss of a stage, in recipes of class R: a frozen dataclass that holds exactly the weights that it reads.

    Only `kind`, `takes` and `__call__` must be written; the rest is for objectives with modules of their own, or that
    measure something.

    Attributes:
        kind: its name in files.
        takes: the classes of batches that it computes on.
        splittable: whether the mean over micro-batches is the loss of the whole batch.
        clipped_apart: the prefix of the parameters whose gradient is clipped apart from the others'.
        measures: what `finish` stores, in words that the plan prints.
        takes_teacher: whether a caller may name the semantic teacher (`--teacher`).
        reads_features: whether features that were computed before the run may stand in for a batch's images.
        continues: whether it goes on from a whole trained model, and has no meaning from random weights.
    """

    kind: ClassVar[str]
    takes: ClassVar[tuple[type[Images], ...]]
    splittable: ClassVar[bool] = True
    clipped_apart: ClassVar[str | None] = None
    measures: ClassVar[str] = ""
    reads_features: ClassVar[bool] = False
    takes_teacher: ClassVar[bool] = False
    continues: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, ctx: StepContext, batch: Any) -> Terms:
        """Named terms of a micro-batch; `loss` is what trains, the others are logged."""

    @property
    def draws(self) -> int:
        """How often a step computes each image."""
        return 1

    def check(self, recipe: R, stage: "StageConfig") -> None:
        """Refuse a recipe's stage that this objective cannot train; InputError."""

    def networks(self, recipe: R) -> Mapping[str, Callable[[], nn.Module]]:
        """Frozen networks from outside that it reads, by name, each as a function that loads it."""
        return {}

    def build(self, recipe: R, networks: Networks) -> Mapping[str, Callable[[Any], nn.Module]]:
        """Heads and teachers that no finished model keeps, by name, each made from the training modules."""
        return {}

    def may_rest(self, recipe: R) -> tuple[str, ...]:
        """Trainable patterns that the loss need not reach."""
        return ()

    def check_folder(self, stage: "StageConfig", init: "InitFolder") -> None:
        """Refuse a folder of weights that this objective cannot start from; InputError."""

    def preparations(self, recipe: R, stage: "StageConfig", origin: "Origin") -> tuple[str, ...]:
        """What changes in the weights before the first step, in words that the plan prints; `prepare` does it."""
        return ()

    def prepare(self, ctx: StepContext, data: TrainingData, planned: "PlannedStage") -> None:
        """Do what `planned.prepares` lists; called before a stage is begun or resumed."""

    def may_split(self, stage: "StageConfig") -> bool:
        """Whether a stage's batches may be split among processes and micro-steps."""
        return self.splittable

    def after_step(self, ctx: StepContext) -> None:
        """Change what no gradient reaches, after the optimizer's step; every process calls it."""

    def finish(self, ctx: StepContext, data: TrainingData) -> None:
        """Measure and store what later stages must know of what this one has changed."""

    def cost(self, modules: Any, recipe: R, stage: "StageConfig") -> Cost | None:
        """What one image costs, or None: not known; `modules` are frozen as in the stage, on torch's meta device."""
        return None


def check_at_least(least: float, where: str = "", **values: float) -> None:
    """Refuse numbers below `least`, infinite ones and NaN; InputError names the field, with `where` before it."""
    for name, value in values.items():
        if not least <= value < float("inf"):
            raise InputError(f"{where}{name}: expected at least {least:g}, got {value}")
