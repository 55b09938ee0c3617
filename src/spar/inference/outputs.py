"""Outputs of the four tasks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar.inference.image_files import check_writable, output_paths, save_images


@dataclass(frozen=True)
class Routing:
    """Weights over the LLM layers of each condition token of one image.

    `tokens` as text, `kinds` ("text", "image", "query"), `layers` (K layer numbers), `weights` `[T, K]`.
    """

    tokens: list[str]
    kinds: list[str]
    layers: tuple[int, ...]
    weights: np.ndarray


@dataclass(frozen=True)
class GenerateOutput:
    """Images in the order of the prompts (each prompt's images together), their seeds and their routing.

    `metadata` has how each image was made: prompt, seed, steps, guidance, type, device, model, recipe, versions.
    """

    images: list[Image.Image]
    seeds: list[int]
    routing: list[Routing]
    metadata: list[dict[str, Any]]

    def save(self, path: str | Path | None = None, *, overwrite: bool = False) -> list[Path]:
        """Write PNGs with their metadata: one image to a `.png` file, several into a folder; returns the paths.

        Raises:
            InputError: a file exists (without `overwrite`) or cannot be written.
        """
        count = len(self.images)
        names = [f"{index:0{len(str(count - 1))}}" for index in range(count)]
        paths = output_paths(None if path is None else Path(path), names)
        check_writable(paths, overwrite=overwrite)
        save_images(self.images, paths, self.metadata)
        return paths


@dataclass(frozen=True)
class UnderstandOutput:
    """Answers in the order of the questions."""

    texts: list[str]


@dataclass
class ChatOutput:
    """An answer during decoding: an iterator over pieces of its text, which join to the whole.

    `prompt_tokens`, and `completion_tokens` so far; `finish_reason` is None until the answer ends, then "stop" if the
    model ended its turn, or "length".
    """

    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: str | None = None
    stream: Iterator[str] = field(default_factory=lambda: iter(()), repr=False)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self.stream)


@dataclass(frozen=True)
class ReconstructOutput:
    """Images in the order of the inputs, and their metadata as in `GenerateOutput`."""

    images: list[Image.Image]
    metadata: list[dict[str, Any]]
