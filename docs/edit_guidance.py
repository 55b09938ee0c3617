"""Which guidance suits a model's edits: `python docs/edit_guidance.py [MODEL]` prints, for each of SCALES, the share of
edits that the detector finds right, on validation scenes: of version 1's kinds, and of edits that need binding.

A model's folder keeps what suits it as `edit_guidance` in `config.json`, under `sampling` (a recipe's
`flow.edit_guidance`). Benchmarks have other scenes.
"""

import itertools
import sys
from collections.abc import Sequence

import numpy as np
import torch

from spar.evaluation.options import EvalOptions, PipelineLike
from spar.evaluation.shapes_edit import EditItem, needs_binding, run_edits
from spar.inference.pipeline import SparPipeline
from spar.worlds.shapes.dataset import scene_at
from spar.worlds.shapes.edits import ALL_EDIT_KINDS, BY_NEED, BY_PAIR, EDIT_KINDS, edit_kinds, make_edit
from spar.worlds.shapes.render import render

SCALES = (1.0, 1.5, 2.0, 3.0, 4.5)
ITEMS = 30  # of a kind
FIRST = 5000  # validation scene; docs/layouts.py has those before
SCENES = {
    False: {"two": 1.0, "multi": 1.0, "count": 0.5, "single": 0.5},
    True: {"shared": 1.0, "twins": 1.0},
}


def items(count: int, *, binding: bool) -> list[EditItem]:
    """`count` edits of each kind, of validation scenes; with `binding` of those that Shapes-Edit-Bind asks for."""
    kinds = [kind for kind in ALL_EDIT_KINDS if kind != "background"] if binding else EDIT_KINDS
    naming, found = BY_NEED if binding else BY_PAIR, list[EditItem]()
    for kind in kinds:
        wanted = len(found) + count
        for index in itertools.count(FIRST):
            if len(found) == wanted:
                break
            scene = scene_at("validation", index, SCENES[binding])
            if kind not in edit_kinds(scene, "seen", naming):
                continue
            try:
                edit = make_edit(scene, np.random.default_rng((index, 1)), kind, "seen", naming)
            except ValueError:  # no room for one more object
                continue
            if not binding or needs_binding(scene, edit):
                found.append(EditItem(len(found), 0, scene, render(scene), edit))
    return found


def share_right(pipe: PipelineLike, of: Sequence[EditItem], scale: float) -> float:
    verdicts = run_edits(pipe, of, [item.edit.instruction for item in of], EvalOptions(guidance_scale=scale))
    return float(np.mean([verdict.right for verdict in verdicts]))


def main() -> None:
    pipe = SparPipeline.from_pretrained(*sys.argv[1:2], dtype=torch.bfloat16, device="cpu", progress=False)
    plain, binding = (items(ITEMS, binding=kind) for kind in (False, True))
    for scale in SCALES:
        one, two = (share_right(pipe, of, scale) for of in (plain, binding))
        print(f"guidance {scale:g}: {one:.3f} of {len(plain)} edits, {two:.3f} of {len(binding)} that bind", flush=True)


if __name__ == "__main__":
    main()
