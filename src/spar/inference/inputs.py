"""What callers give to a task, one or a list of it, as checked lists."""

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from spar.common.errors import InputError
from spar.common.limits import MAX_SEED, one_reference
from spar.processing.images import ImageSource, open_image


def open_sources(image: ImageSource | Sequence[ImageSource], *, edited: bool = False) -> list[Image.Image]:
    """Open one image or each of a list.

    Args:
        edited: whether they are to be edited, each without further references.
    """
    sources: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]  # `open_image` checks each
    if not sources:
        raise InputError("expected at least one image, got an empty list")
    for source in sources:
        if isinstance(source, list | tuple):
            nested = "expected one image for each text, got a nested list (a chat takes several)"
            raise InputError(one_reference(f"a list of {len(source)}") if edited else nested)
    return [open_image(source) for source in sources]


def list_texts(text: str | Sequence[str], what: str) -> list[str]:
    """One text or a list of them as a list that is not empty."""
    if not isinstance(text, Iterable):
        raise InputError(f"{what}: expected text or a list of texts, got {type(text).__name__}")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise InputError(f"expected at least one {what}, got an empty list")
    return texts


def broadcast(values: list[str], count: int, what: str) -> list[str]:
    """One value for each of `count`."""
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise InputError(f"expected one {what}, or {count}, got {len(values)}")
    return values


def list_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Expand to one checked seed per image."""
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, int) and not isinstance(seed, bool):
        seeds = [seed + i for i in range(count)]
    else:
        seeds = list(seed) if isinstance(seed, Iterable) else [seed] * count
    if len(seeds) != count:
        raise InputError(f"seed: expected one, or one for each of {count} images, got {len(seeds)}")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
            raise InputError(f"seed: expected a whole number from 0 to {MAX_SEED}, got {value!r}")
    return seeds
