"""Outputs of the four tasks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar.inference.contact_sheet import contact_sheet, images_html
from spar.inference.image_files import check_writable, numbered_names, output_paths, save_images


@dataclass(frozen=True, eq=False)
class Routing:
    """Weights over the LLM layers of each condition token of one image.

    `tokens` as text, `kinds` ("text", "image", "query"), `layers` (K layer numbers), `weights` `[T, K]`.
    """

    tokens: list[str]
    kinds: list[str]
    layers: tuple[int, ...]
    weights: np.ndarray

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Routing):
            return NotImplemented
        same = (self.tokens, self.kinds, self.layers) == (other.tokens, other.kinds, other.layers)
        return same and np.array_equal(self.weights, other.weights)

    __hash__ = None  # type: ignore[assignment]  # as of what holds lists

    def __repr__(self) -> str:
        return f"Routing({len(self.tokens)} tokens over layers {', '.join(map(str, self.layers))})"


class ImagesOutput(ABC):
    """What outputs of images share: how notebooks show them, and a contact sheet."""

    images: list[Image.Image]

    @abstractmethod
    def _captions(self) -> list[str]:
        """What is written under each image."""

    def __repr__(self) -> str:
        sizes = dict.fromkeys(f"{image.width} x {image.height}" for image in self.images)
        return f"{type(self).__name__}({len(self.images)} images of {', '.join(sizes)} pixels)"

    def _repr_html_(self) -> str:
        return images_html(self.images, self._captions())

    def grid(self, columns: int | None = None) -> Image.Image:
        """The images as one, row by row on white; by default in about as many rows as columns."""
        return contact_sheet(self.images, columns)


@dataclass(frozen=True, repr=False)
class GenerateOutput(ImagesOutput):
    """Images in the order of the prompts (each prompt's images together), their seeds and their routing.

    `metadata` has how each image was made: prompt, seed, steps, guidance, type, device, model, recipe, versions.
    """

    images: list[Image.Image]
    seeds: list[int]
    routing: list[Routing]
    metadata: list[dict[str, Any]]

    def save(self, path: str | Path | None = None, *, overwrite: bool = False) -> list[Path]:
        """Write PNGs with their metadata: one image to a `.png` file, several into a folder, named by their numbers and
        seeds; returns the paths.

        Raises:
            InputError: a file exists (without `overwrite`) or cannot be written.
        """
        paths = output_paths(None if path is None else Path(path), numbered_names(self.seeds))
        check_writable(paths, overwrite=overwrite)
        save_images(self.images, paths, self.metadata)
        return paths

    def _captions(self) -> list[str]:
        texts = [values.get("prompt") or values.get("instruction") or "" for values in self.metadata]
        return [f"{text} (seed {seed})".strip() for text, seed in zip(texts, self.seeds, strict=True)]


@dataclass(frozen=True)
class UnderstandOutput:
    """Answers in the order of the questions, and the seed of each; none has one at temperature 0."""

    texts: list[str]
    seeds: list[int] = field(default_factory=list)


@dataclass
class ChatOutput:
    """An answer during decoding: an iterator over pieces of its text, which join to the whole.

    `prompt_tokens`, and `completion_tokens` so far; `finish_reason` is None until the answer ends, then "stop" if the
    model ended its turn, or "length". `seed` is that of an answer whose tokens are drawn.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: str | None = None
    seed: int | None = None
    stream: Iterator[str] = field(default_factory=lambda: iter(()), repr=False)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self.stream)


@dataclass(frozen=True, repr=False)
class ReconstructOutput(ImagesOutput):
    """Images in the order of the inputs, and their metadata as in `GenerateOutput`."""

    images: list[Image.Image]
    metadata: list[dict[str, Any]]

    def _captions(self) -> list[str]:
        return [f"reconstruction {number}" for number in range(len(self.images))]
