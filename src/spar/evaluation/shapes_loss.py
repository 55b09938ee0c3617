"""Shapes-Loss: how well a model predicts images of unseen scenes from their captions, without drawing any.

`pipe.image_loss` has what is predicted: SPAR's flow loss on noise that is the same for every model, DualToken's
cross-entropy of the codes. It tells models apart long before their drawings do, but only those that share a tokenizer,
since it is measured in that tokenizer's latents or codes. Lower is better. "part.other" is the loss with another
scene's caption, and "part.margin" how much higher that is: what the words are worth.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.options import EvalOptions, batches
from spar.evaluation.results import Result, mean_score
from spar.worlds.shapes.captions import caption
from spar.worlds.shapes.dataset import scene_at, seed_at
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import Scene

SCENES = 256


def loss_scenes(count: int) -> list[tuple[Scene, str]]:
    """The first scenes that training has not seen, each with a caption."""
    scenes = [scene_at("validation", index) for index in range(count)]
    seeds = ((seed_at("validation", index), 1) for index in range(count))
    return [(scene, caption(scene, np.random.default_rng(seed))) for scene, seed in zip(scenes, seeds, strict=True)]


def shapes_loss(pipe: Any, options: EvalOptions | None = None, progress: Advance | None = None) -> Result:
    """Run Shapes-Loss on `pipe.image_loss`; `limit` counts scenes of all kinds together."""
    options, clock = options or EvalOptions(), Timer()
    pairs = loss_scenes(options.limit or SCENES)
    texts = [text for _, text in pairs]
    others = [*texts[1:], *texts[:1]]
    own: list[float] = []
    wrong: list[float] = []
    for chunk in batches(list(range(len(pairs))), options.batch, progress):
        images = [Image.fromarray(render(pairs[index][0])) for index in chunk]
        seed = options.seed + 10**6 * chunk[0]
        own += pipe.image_loss(images, [texts[index] for index in chunk], seed)
        wrong += pipe.image_loss(images, [others[index] for index in chunk], seed)
    scores = (
        mean_score("overall", own, seed=options.seed),
        mean_score("part.other", wrong, seed=options.seed),
        mean_score("part.margin", np.subtract(wrong, own), seed=options.seed),
    )
    rows = zip(texts, own, wrong, strict=True)
    records = [
        {"prompt": text, "loss": round(loss, 6), "other": round(other, 6), "margin": round(other - loss, 6)}
        for text, loss, other in rows
    ]
    settings = run_settings(pipe, options, clock, sampled=False, scenes=len(pairs))
    return Result("shapes-loss", scores, settings, {"scenes": records})
