"""A stage is name, objective, data, trainable patterns and optimizer; a recipe is its stages and a system."""

import fnmatch
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from spar.checkpoints.lora import is_lora_key
from spar.checkpoints.safetensors_io import TensorSource
from spar.common.config import changes_no_result, check_finite, to_dict
from spar.common.errors import InputError
from spar.training.data import DataConfig, ImageData, NoData, StageData
from spar.training.objectives.base import Networks, Objective, check_at_least

if TYPE_CHECKING:
    from spar.processing.prompts import PromptEncoder
    from spar.training.plan import InitFolder

RESERVED = (  # what a run's folder holds beside its stages
    "model", "adapter", "cache", "tensorboard", "trackers", "text_tokenizer", "lock", "recipe.json", "origin.json",
    "data.json", "metrics.jsonl", "bad_samples.jsonl",
)  # fmt: skip


@dataclass(frozen=True)
class StageConfig:
    """One training stage. `trainable` are fnmatch patterns over the training modules' parameter names.

    The learning rate rises over exactly `warmup` steps, then falls from `lr` to `lr_end`. `batch` is the number of
    images that one step of the optimizer sees, over all devices together.
    """

    name: str
    objective: Objective
    trainable: tuple[str, ...]
    steps: int
    data: StageData = field(default_factory=ImageData)
    batch: int = 32
    lr: float = 1e-3
    lr_end: float = 1e-5
    warmup: int = 100
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    ema: float = 0.0
    lr_multipliers: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w][\w.-]{0,63}", self.name) or self.name in RESERVED:
            raise InputError(
                f"stage: expected a name of letters, digits, '.', '_' and '-', none of {', '.join(RESERVED)}, got "
                f"{self.name!r}"
            )
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"stage {self.name}: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.max_grad_norm < math.inf:
            raise InputError(f"stage {self.name}: max_grad_norm must be above 0 and finite, got {self.max_grad_norm}")
        if not (0 < self.lr < math.inf and 0 <= self.lr_end <= self.lr):
            raise InputError(f"stage {self.name}: expected lr > 0 and 0 <= lr_end <= lr, got {self.lr}, {self.lr_end}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"stage {self.name}: betas must be in [0, 1), got {', '.join(map(str, self.betas))}")
        check_at_least(0, f"stage {self.name}: ", weight_decay=self.weight_decay)
        for pattern, factor in self.lr_multipliers:
            check_at_least(0, f"stage {self.name}: lr_multipliers of ", **{pattern: factor})
        if not 0 <= self.ema < 1:
            raise InputError(f"stage {self.name}: ema must be in [0, 1), got {self.ema}")
        if not 0 <= self.warmup <= self.steps:
            raise InputError(f"stage {self.name}: expected warmup from 0 to steps {self.steps}, got {self.warmup}")
        if not set(self.data.gives) <= set(self.objective.takes):
            taken, given = (", ".join(cls.__name__ for cls in some) for some in (self.objective.takes, self.data.gives))
            raise InputError(
                f"stage {self.name}: the objective {self.objective.kind} takes batches of {taken}, its data "
                f"({self.data.kind}) gives {given}"
            )

    @property
    def image_size(self) -> int | None:
        """The side in pixels that its images are resized to, where it is not the model's."""
        return self.data.image_size if isinstance(self.data, ImageData) else None


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A complete configuration of a training run; a subclass is a system and says how its modules are made.

    `published` names the parts whose weights come from published checkpoints: a run that would start them from random
    ones is refused unless that is asked for. `max_prompt_tokens` is the longest prompt that the finished model takes.
    A state is saved every `save_minutes`, and the last `keep_states` of a stage stay until it ends.
    """

    kind: ClassVar[str]

    name: str
    stages: tuple[StageConfig, ...]
    data: DataConfig = field(default_factory=NoData)
    published: tuple[str, ...] = ()
    max_prompt_tokens: int = 64
    seed: int = 0
    log_every: int = changes_no_result(20)
    save_minutes: float = changes_no_result(5.0)
    keep_states: int = changes_no_result(2)

    def __post_init__(self) -> None:
        check_at_least(0, seed=self.seed)
        check_at_least(1, log_every=self.log_every, max_prompt_tokens=self.max_prompt_tokens)
        check_at_least(1, keep_states=self.keep_states)
        names = [stage.name for stage in self.stages]
        if not names:
            raise InputError(f"recipe {self.name}: expected at least one stage, got none")
        if len(set(names)) < len(names):
            raise InputError(f"recipe {self.name}: expected stages of different names, got {', '.join(names)}")
        for stage in self.stages:
            stage.objective.check(self, stage)
        check_finite(to_dict(self), self.name)

    def stage(self, name: str) -> StageConfig:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise InputError(f"recipe {self.name} has no stage {name!r}; it has {', '.join(s.name for s in self.stages)}")

    @property
    def image_size(self) -> int:
        """The side of its images in pixels."""
        raise InputError(f"a recipe of {self.kind} does not say what size its images have")

    @property
    def token_stride(self) -> int:
        """The side of a visual token in pixels."""
        raise InputError(f"a recipe of {self.kind} does not say what size its visual tokens have")

    @property
    def size_multiple(self) -> int:
        """What the sides of its images are multiples of."""
        return self.token_stride

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens of the longest sequence that its LLM takes, with images."""
        raise InputError(f"a recipe of {self.kind} does not say how much its LLM reads")

    @property
    def feature_width(self) -> int:
        """The channels of a visual token's features, as the encoder gives them."""
        raise InputError(f"a recipe of {self.kind} does not say how wide its features are")

    # ---- what a system says ------------------------------------------------------------------------------------------

    @abstractmethod
    def prompts(self, tokenizer: Any) -> "PromptEncoder":
        """The prompt forms of the system for a text tokenizer; InputError where they do not fit together."""

    def load_tokenizer(self, folder: Path) -> Any:
        """The text tokenizer of a folder that came with a finished model; InputError where it is another's."""
        raise InputError(f"a recipe of {self.kind} reads no text tokenizer from a folder, got {folder}")

    @abstractmethod
    def build(self, networks: Networks) -> nn.Module:
        """Everything that training holds, with random weights drawn from torch's global generator.

        The product is its child `model`; heads and teachers, which no product keeps, stand beside it.
        """

    def stand_ins(self, saved: Mapping[str, Any]) -> Networks:
        """What `build` needs in place of networks from outside, to load a stage's saved modules without them."""
        return {}

    def bundle(self, modules: Any, run: Path, prompts: "PromptEncoder", last: str) -> Any:
        """The product as it is at the end of stage `last`: the contents of its folder."""
        raise InputError(f"a recipe of {self.kind} has no model before its last stage, got {last}")

    @abstractmethod
    def save(self, modules: nn.Module, run: Path, prompts: "PromptEncoder") -> None:
        """Write the product of a run that has ended into its folder."""

    def save_stored(self, modules: nn.Module, weights: TensorSource, run: Path, prompts: "PromptEncoder") -> None:
        """The same of modules whose parameters are on the meta device, and in `weights` by their names.

        A system may read them as it writes; by default all are read first.
        """
        own = modules.state_dict()
        read = {name: weights.read(name) if value.is_meta else value for name, value in own.items()}
        modules.load_state_dict(read, assign=True)
        self.save(modules, run, prompts)

    def try_sizes(self, modules: nn.Module, stages: tuple[StageConfig, ...]) -> None:
        """Run modules on the meta device as some stages would; whatever is raised says what does not fit."""

    def check_stages(self, stages: tuple[StageConfig, ...]) -> None:
        """Refuse a choice of stages; InputError."""

    def must_reach(self, stage: StageConfig) -> tuple[str, ...]:
        """Patterns of parameters that a stage's loss must reach."""
        return stage.trainable

    def read_model(self, folder: Path) -> "InitFolder":
        """What a folder of a finished model holds that a stage may start from."""
        raise InputError(f"--init-from: a recipe of {self.kind} starts from stages (RUN/STAGE/done), got {folder}")

    def open_model(self, folder: Path) -> TensorSource:
        """The weights in a folder of a finished model, to be read one at a time by the training modules' names."""
        raise InputError(f"--init-from: a recipe of {self.kind} starts from stages (RUN/STAGE/done), got {folder}")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's name is one that some pattern means."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def freeze(module: nn.Module, stage: StageConfig) -> list[str]:
    """Declare what trains: set `requires_grad` by the stage's patterns and return the trainable names.

    A pattern that matches nothing raises, so that a renamed part cannot silently stay frozen. Of a model with LoRA its
    additions train and all else in it is frozen.
    """
    names = [name for name, _ in module.named_parameters()]
    for pattern in (*stage.trainable, *(pattern for pattern, _ in stage.lr_multipliers)):
        if not fnmatch.filter(names, pattern):
            raise InputError(f"stage {stage.name}: pattern {pattern!r} matches no parameter")
    adapted = any(map(is_lora_key, names))
    for name, parameter in module.named_parameters():
        lora_decides = adapted and name.startswith("model.")
        parameter.requires_grad_(is_lora_key(name) if lora_decides else matches(name, stage.trainable))
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def freezing_table(module: nn.Module, depth: int = 2) -> list[tuple[str, int, int]]:
    """(part, trainable parameters, frozen parameters) for each part, named to `depth` levels."""
    table: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        row = table.setdefault(".".join(name.split(".")[:depth]), [0, 0])
        row[0 if parameter.requires_grad else 1] += parameter.numel()
    return [(part, row[0], row[1]) for part, row in table.items()]
