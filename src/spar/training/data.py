"""Training data: a source yields batches, each a function of (seed, stage, step, rows).

Nothing is drawn from a running generator, so that a resumed run sees exactly what it would have seen. A stage says what
it reads (`StageData`), a recipe where that comes from (`DataConfig`), and the source (`TrainingData`) deals it.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from spar.common.errors import InputError
from spar.data.batches import Captioned, Dialogues, Edits, Images
from spar.data.buckets import Size
from spar.data.samples import Kind
from spar.training.distributed import DistributedContext

if TYPE_CHECKING:
    from spar.processing.prompts import PromptEncoder
    from spar.training.config import Recipe, StageConfig


def step_rng(seed: int, stage: str, step: int) -> np.random.Generator:
    """The generator of one step's choices."""
    return np.random.default_rng((seed, zlib.crc32(stage.encode()), step))


# ---- what a stage reads ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageData:
    """What a stage reads: `gives` are the classes of its batches, which the stage's objective must take."""

    kind: ClassVar[str]
    gives: ClassVar[tuple[type[Images], ...]]

    @property
    def shares(self) -> Mapping[Kind, float]:
        """The share of each kind of samples whose texts it reads, of data sets; none: the images of any kind alone."""
        return {}

    @property
    def plain(self) -> "StageData":
        """What other sources may have of it, where that is no class that it derives from."""
        return self

    def __str__(self) -> str:
        return self.kind.replace("_", " ")


@dataclass(frozen=True)
class ImageData(StageData):
    """Images alone; `image_size` is their side in pixels where it is not the model's."""

    kind: ClassVar[str] = "images"
    gives: ClassVar[tuple[type[Images], ...]] = (Images,)
    image_size: int | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise InputError(f"image_size: expected at least 1, got {self.image_size}")


@dataclass(frozen=True)
class CaptionData(StageData):
    """Images with captions."""

    kind: ClassVar[str] = "captions"
    gives: ClassVar[tuple[type[Images], ...]] = (Captioned,)

    @property
    def shares(self) -> Mapping[Kind, float]:
        return {"text_to_image": 1.0}


@dataclass(frozen=True)
class MixedData(CaptionData):
    """Images with captions, and for the share `edit_share` of the steps (of the samples, where these are data sets)
    edits.
    """

    kind: ClassVar[str] = "captions_and_edits"
    gives: ClassVar[tuple[type[Images], ...]] = (Captioned, Edits)
    edit_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.edit_share <= 1:
            raise InputError(f"edit_share: expected 0 to 1, got {self.edit_share}")

    @property
    def shares(self) -> Mapping[Kind, float]:
        return {"text_to_image": 1 - self.edit_share, "edit": self.edit_share}

    def __str__(self) -> str:
        return f"captions, {self.edit_share:.0%} edits" if self.edit_share else "captions"


@dataclass(frozen=True)
class DialogueData(StageData):
    """Images with conversations about them."""

    kind: ClassVar[str] = "dialogues"
    gives: ClassVar[tuple[type[Images], ...]] = (Dialogues,)

    @property
    def shares(self) -> Mapping[Kind, float]:
        return {"dialogue": 1.0}


@dataclass(frozen=True)
class CaptionDialogueData(StageData):
    """Images with captions, and for the share `dialogue_share` of the samples images with conversations."""

    kind: ClassVar[str] = "captions_and_dialogues"
    gives: ClassVar[tuple[type[Images], ...]] = (Captioned, Dialogues)
    dialogue_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.dialogue_share <= 1:
            raise InputError(f"dialogue_share: expected 0 to 1, got {self.dialogue_share}")

    @property
    def shares(self) -> Mapping[Kind, float]:
        return {"text_to_image": 1 - self.dialogue_share, "dialogue": self.dialogue_share}

    def __str__(self) -> str:
        return f"captions, {self.dialogue_share:.0%} dialogues"


# ---- where it comes from ---------------------------------------------------------------------------------------------


class TrainingData(ABC):
    """An open source of batches, of which each is a function of `seed`, stage, step and rows."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def rng(self, stage: str, step: int) -> np.random.Generator:
        """The generator of one step's choices."""
        return step_rng(self.seed, stage, step)

    def batches(self, stage: "StageConfig", start: int, parallel: DistributedContext) -> Iterator[Sequence[Images]]:
        """From step `start` of a stage on, this process's micro-batches of each step."""
        for step in range(start, stage.steps):
            parts = [parallel.rows(stage.batch, number) for number in range(parallel.config.grad_accum_steps)]
            yield [self.get_batch(stage, step, rows) for rows in parts]

    @abstractmethod
    def get_batch(self, stage: "StageConfig", step: int, rows: slice) -> Images:
        """Rows of a step's whole batch."""

    @abstractmethod
    def sample(self, count: int) -> tuple[Tensor, ...]:
        """About `count` images to measure features on, in chunks, the same on every process."""

    def check_captions(self, stages: "Sequence[StageConfig]") -> None:
        """Refuse captions that the model cannot read, before any of the stages trains.

        Raises:
            InputError: they have too many words that the text tokenizer lacks.
        """

    def open_cache(self, tokenizer: Any) -> None:
        """Take features that were computed before the run from now on, where the source has them.

        Raises:
            InputError: they were made by another tokenizer.
        """

    def cached_features(self, count: int) -> Tensor | None:
        """`f_v` `[n, N, D]` of up to `count` images that were computed before the run, or None."""
        return None


@dataclass(frozen=True)
class DataConfig(ABC):
    """Where a recipe's data come from; `serves` are the classes of StageData that the source has."""

    kind: ClassVar[str]
    serves: ClassVar[tuple[type[StageData], ...]]

    @abstractmethod
    def open(self, recipe: "Recipe", prompts: "PromptEncoder", run: Path, parallel: DistributedContext) -> TrainingData:
        """The source, opened for this process; what it keeps goes under the run's folder."""

    @property
    def has_cache(self) -> bool:
        """Whether features that were computed before the run stand in for images."""
        return False

    def text_tokenizer(self) -> Any | None:
        """The text tokenizer that belongs to the source; None where it comes with the model."""
        return None

    def check(self, stages: "Sequence[StageConfig]") -> None:
        """Refuse stages that the source has nothing for.

        Raises:
            InputError: names the stages and what the source has.
        """
        strange = [f"{stage.name} ({stage.data.kind})" for stage in stages if type(stage.data) not in self.serves]
        if strange:
            raise InputError(
                f"data.source {self.kind} has {', '.join(one.kind for one in self.serves)}, which is nothing for "
                f"{', '.join(strange)} (--stage chooses stages)"
            )

    def sizes(self, recipe: "Recipe", stage: "StageConfig") -> tuple[Size, ...]:
        """(width, height) in pixels of the images of a stage."""
        side = stage.image_size or recipe.image_size
        return ((side, side),)

    @classmethod
    def nearest(cls, data: StageData) -> StageData:
        """What this source has of a stage's data that another source was meant for: its plain form, or itself."""
        plain = data if type(data) in cls.serves else data.plain
        for one in type(plain).__mro__:
            if one in cls.serves:
                return one(**{item.name: getattr(plain, item.name) for item in fields(one)})
        return data

    def describe(self, stage: "StageConfig") -> str:
        """What a stage reads of the source, in a few words."""
        return f"{self.kind}: {stage.data}"


@dataclass(frozen=True)
class NoData(DataConfig):
    """No source: the recipe can be planned, not trained."""

    kind: ClassVar[str] = "none"
    serves: ClassVar[tuple[type[StageData], ...]] = ()

    def open(self, recipe: "Recipe", prompts: "PromptEncoder", run: Path, parallel: DistributedContext) -> TrainingData:
        raise InputError(_NONE)

    def check(self, stages: "Sequence[StageConfig]") -> None:
        raise InputError(_NONE)

    def describe(self, stage: "StageConfig") -> str:
        return f"no data yet: {stage.data}"


_NONE = "no data source given (--data.source); the recipe can be planned with --dry-run"


def resized(pixels: Tensor, side: int | None) -> Tensor:
    """Images `[B, 3, H, W]` at `side` x `side`, or as they are where that is None."""
    if side is None or pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
