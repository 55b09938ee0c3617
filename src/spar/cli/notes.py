"""Notes on what a model was asked for that is outside its world, on standard error."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spar.cli.console import printable

if TYPE_CHECKING:
    from spar.inference.pipeline import SparPipeline

SHOWN = 5


def print_notes(pipe: "SparPipeline", texts: Sequence[str] = (), images: Sequence[Path] = ()) -> None:
    """Say what lies outside the world of a model of the shapes world, each thing once; of another model nothing."""
    import numpy as np

    from spar.processing.images import open_image, to_square
    from spar.worlds.shapes.scene import SIDE
    from spar.worlds.shapes.scope import image_notes, is_of_this_world, prompt_notes

    tokenizer = pipe.bundle.text_tokenizer
    if tokenizer.unk_token is None or not is_of_this_world(tokenizer.get_vocab()) or pipe.image_size != SIDE:
        return
    notes = [note for text in texts for note in prompt_notes(text)]
    for path in images:
        image = open_image(path)
        found = image_notes(np.asarray(to_square(image, SIDE)), image.size)
        notes += [f"{path.name}: {note}" if len(images) > 1 else note for note in found]
    unique = list(dict.fromkeys(notes))
    for note in unique[:SHOWN]:
        print(f"spar: note: {printable(note)}", file=sys.stderr)
    if len(unique) > SHOWN:
        print(f"spar: note: and {len(unique) - SHOWN} more like these", file=sys.stderr)
