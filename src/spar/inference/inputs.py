"""What callers give to a task, one or a list of it, as checked lists."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from spar.common.errors import InputError
from spar.common.limits import one_reference
from spar.processing.images import ImageSource, open_image

T = TypeVar("T")


def open_sources(
    image: ImageSource | Sequence[ImageSource], read: Callable[[Image.Image], T], *, edited: bool = False
) -> list[T]:
    """What `read` makes of one image, or of each of a list or of an array with a further axis in front.

    Images are opened one after another, and one that is several times in a list only once: the model reads a small part
    of the memory that opened ones take.

    Args:
        image: one or several.
        read: what the model reads of an opened image.
        edited: whether they are to be edited, each without further references.
    """
    sources: list[Any] = [image]  # `open_image` checks each
    if isinstance(image, list | tuple) or (isinstance(image, np.ndarray | Tensor) and image.ndim == 4):
        sources = list(image)
    if not sources:
        raise InputError("expected at least one image, got an empty list")
    for source in sources:
        if isinstance(source, list | tuple):
            nested = "expected one image for each text, got a nested list (a chat takes several)"
            raise InputError(one_reference(f"a list of {len(source)}") if edited else nested)
    once = {id(source): source for source in sources}
    made = {number: read(open_image(source)) for number, source in once.items()}
    return [made[id(source)] for source in sources]


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
