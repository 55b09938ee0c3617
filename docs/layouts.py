"""What a model of the shapes world writes before it draws: `python docs/layouts.py [MODEL [END]]` prints, for each kind
of scene, the share of layouts without fault and the share of each fault, on captions of validation scenes. With END,
the end of a stage of a run such as RUN/mllm-2/done, MODEL's LLM has the weights that it had there.

Faults: "form", a text that is no layout; "words", objects that are not those of the caption, or a relation that does
not hold between their cells; "near", two objects on top of each other: their cells' centers are nearer than the sum of
their radii less SLACK, half a cell, by which two centers may be off.
"""

import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from spar.inference.pipeline import SparPipeline
from spar.training.checkpoint import load_group
from spar.worlds.shapes.captions import caption, parse
from spar.worlds.shapes.dataset import scene_at
from spar.worlds.shapes.detector import DetectedObject, Detection, satisfies
from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIDE, SIZES
from spar.worlds.shapes.tokenizer import ORDINALS

KINDS = ("single", "two", "count", "position", "multi", "shared", "twins")
CAPTIONS = 96  # of a kind
SLACK = 4.0  # pixels
CELL = SIDE / len(ORDINALS)
_ITEM = re.compile(
    rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    rf"on column ({'|'.join(ORDINALS)}) row ({'|'.join(ORDINALS)})"
)
_GROUND = re.compile(rf"(.*) on a ({'|'.join(BACKGROUNDS)}) background")


def read(text: str) -> Detection | None:
    """What a layout shows, each object in the middle of its cell; None if the text is no layout."""
    found = _GROUND.fullmatch(text)
    items = [_ITEM.fullmatch(phrase) for phrase in found.group(1).split(", ")] if found else [None]
    objects = []
    for item in items:
        if item is None:
            return None
        size, color, shape, column, row = item.groups()
        x, y = ((ORDINALS.index(word) + 0.5) * CELL for word in (column, row))
        objects.append(DetectedObject(shape, color, size, x, y, confidence=1.0))
    return Detection(found.group(2) if found else "", tuple(objects))


def fault(text: str, prompt: str) -> str:
    """The first fault of the layout of a caption; "" if it has none."""
    seen = read(text)
    if seen is None:
        return "form"
    if not satisfies(seen, parse(prompt))[0]:
        return "words"
    for one, other in combinations(seen.objects, 2):
        if np.hypot(one.x - other.x, one.y - other.y) < SIZES[one.size] + SIZES[other.size] - SLACK:
            return "near"
    return ""


def shares(pipe: SparPipeline, kind: str, count: int) -> dict[str, float]:
    """The share of each fault among the layouts of `count` captions of a kind; "" is none."""
    scenes = [scene_at("validation", index, {kind: 1.0}) for index in range(count)]
    prompts = [caption(scene, np.random.default_rng(index)) for index, scene in enumerate(scenes)]
    faults = Counter(map(fault, pipe.write_layouts(prompts, seed=0), prompts))
    return {name: number / count for name, number in faults.items()}


def main() -> None:
    pipe = SparPipeline.from_pretrained(*sys.argv[1:2], dtype=torch.float32, device="cpu")
    if sys.argv[2:]:
        prefix, weights = "model.language.", load_group(Path(sys.argv[2]), "modules")
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        pipe.model.language.load_state_dict(own)
    for kind in KINDS:
        found = shares(pipe, kind, CAPTIONS)
        rest = ", ".join(f"{name} {share:.2f}" for name, share in sorted(found.items()) if name)
        print(f"{kind}: sound {found.get('', 0.0):.2f}{'; ' + rest if rest else ''}", flush=True)


if __name__ == "__main__":
    main()
