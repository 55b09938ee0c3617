"""What one micro-step of training computes on: frozen dataclasses, pure functions of (seed, stage, step, rows).

B images, N visual tokens, D_s their width, D_p the latent's channels, h w the grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Self

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from spar.processing.prompts import QuestionAnswer


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images.

    Attributes:
        keys: int64 `[B]`, what a cache of features calls each image; -1 for one that comes once.
        pixels: `[B, 3, H, W]` in [0, 1]; None where features stand in for them.
        names: of each image, for messages, where the data have them.
        features: computed before the run: `f_v` `[B, N, D_s]` and `latent` `[B, D_p, h, w]`.
    """

    keys: np.ndarray
    pixels: Tensor | None = None
    names: tuple[str, ...] = ()
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def require_pixels(self) -> Tensor:
        """`pixels`; ValueError where features stand in for them."""
        if self.pixels is None:
            raise ValueError("the batch has features in place of pixels, which are read here")
        return self.pixels

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on a device."""
        return replace(self, **send_to_device({item.name: getattr(self, item.name) for item in fields(self)}, device))


@dataclass(frozen=True, kw_only=True)
class Captioned(Images):
    """Images with a text each; None is the unconditional prompt."""

    texts: tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True)
class Layouts(Captioned):
    """Images whose texts are layouts, which say where everything lies: an image is drawn of one on a blank canvas."""


@dataclass(frozen=True, kw_only=True)
class Edits(Captioned):
    """Edited images, the instructions, and the images before the edit: `references` `[B, 3, H, W]`, or their `f_v`
    among the features, as `reference`.
    """

    references: Tensor | None = None

    def require_references(self) -> Tensor:
        """`references`; ValueError where features stand in for them."""
        if self.references is None:
            raise ValueError("the batch has features in place of the references' pixels, which are read here")
        return self.references


@dataclass(frozen=True, kw_only=True)
class Descriptions(Images):
    """Prompts for images, and each image in words: of edits, whose images are those before the edit, or of captions,
    which have none.
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    edits: bool


@dataclass(frozen=True, kw_only=True)
class Dialogues(Images):
    """Images with questions and answers about each."""

    turns: tuple[tuple[QuestionAnswer, ...], ...]
