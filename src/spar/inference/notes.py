"""Notes on what a model of the shapes world was asked for that lies outside it: the user gets a guess there."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from spar.processing.images import to_square
from spar.worlds.shapes.scene import SIDE
from spar.worlds.shapes.scope import image_notes, is_of_this_world, prompt_notes

if TYPE_CHECKING:
    from spar.inference.base import Pipeline


def knows_shapes(pipe: "Pipeline") -> bool:
    """Whether a model's vocabulary is that of the shapes world."""
    tokenizer = pipe.bundle.text_tokenizer
    return tokenizer.unk_token is not None and is_of_this_world(tokenizer.get_vocab())


def draws_this_world(pipe: "Pipeline") -> bool:
    """Whether a model's words and images are those of the shapes world."""
    return knows_shapes(pipe) and pipe.image_size == SIDE


def world_notes(pipe: "Pipeline", texts: Sequence[str] = (), images: Sequence[Image.Image] = ()) -> list[str]:
    """What lies outside the world of a model of the shapes world, each thing once; of another model nothing."""
    if not draws_this_world(pipe):
        return []
    said = [note for text in texts for note in prompt_notes(text)]
    seen = [note for image in images for note in image_notes(np.asarray(to_square(image, SIDE)), image.size)]
    return list(dict.fromkeys([*said, *seen]))
