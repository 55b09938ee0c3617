"""Notes on what a model was asked for that is outside its world, on standard error."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spar.cli.console import printable

if TYPE_CHECKING:
    from spar.inference.base import Pipeline

SHOWN = 5


def print_notes(pipe: "Pipeline", texts: Sequence[str] = (), images: Sequence[Path] = ()) -> None:
    """Say what lies outside the world of a model of the shapes world, each thing once; of another model nothing."""
    from spar.inference.notes import draws_this_world, world_notes
    from spar.processing.images import open_image

    if not draws_this_world(pipe):
        return
    notes = world_notes(pipe, texts)
    for path in images:
        found = world_notes(pipe, images=[open_image(path)])
        notes += [f"{path.name}: {note}" if len(images) > 1 else note for note in found]
    unique = list(dict.fromkeys(notes))
    for note in unique[:SHOWN]:
        print(f"spar: note: {printable(note)}", file=sys.stderr)
    if len(unique) > SHOWN:
        print(f"spar: note: and {len(unique) - SHOWN} more like these", file=sys.stderr)
