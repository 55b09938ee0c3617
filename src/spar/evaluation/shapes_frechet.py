"""Shapes-Fréchet: how far what a model draws of captions lies, as a set, from the world's own images.

The Fréchet distance in `random_features`, which no teacher and no model has learned. It is no mean over images; the
jackknife makes it one: the pseudo-value of an image is N d - (N - 1) d', d' the distance without it (Tukey, 1958).
Their mean has lost the bias of few images in its first order (Quenouille, 1949), and two models can be paired image by
image. Lower is better; images of the world itself give about 0, above or below.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spar.common.errors import InputError
from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.features import FEATURES, random_features
from spar.evaluation.frechet import FeatureSums, distance_of_sums
from spar.evaluation.options import EvalOptions, ask_known, batches, image_seed, pixels
from spar.evaluation.results import Result, mean_score
from spar.evaluation.shapes_loss import loss_scenes
from spar.worlds.shapes.dataset import scene_at
from spar.worlds.shapes.render import render

SCENES = 256
REFERENCES = 2048  # images of the world, of scenes that begin here
FIRST_REFERENCE = 10**6
LEAST = 3
BLOCK = 10**4  # of the images' seeds, beside the benchmarks' own


def shapes_frechet(pipe: Any, options: EvalOptions | None = None, progress: Advance | None = None) -> Result:
    """Run Shapes-Fréchet on `pipe.generate`; `limit` counts captions, one image each.

    Raises:
        InputError: fewer than three captions that the model takes.
    """
    options, clock = options or EvalOptions(), Timer()
    texts = [text for _, text in loss_scenes(options.limit or SCENES)]

    def draw(jobs: list[tuple[int, str]]) -> list[np.ndarray]:
        seeds = [image_seed(options.seed, BLOCK, index) for index, _ in jobs]
        own = {} if options.layout is None else {"layout": options.layout}
        images = pipe.generate([text for _, text in jobs], seed=seeds, **options.sampling(), **own).images
        return [pixels(image) for image in images]

    drawn: list[np.ndarray | None] = []
    for chunk in batches([*enumerate(texts)], options.batch, progress):
        drawn += ask_known(pipe, chunk, lambda job: job[1], draw)
    known = [(text, image) for text, image in zip(texts, drawn, strict=True) if image is not None]
    if len(known) < LEAST:
        raise InputError(f"shapes-frechet: expected at least {LEAST} captions that the model takes, got {len(known)}")
    world = np.stack([render(scene_at("validation", FIRST_REFERENCE + index)) for index in range(REFERENCES)])
    features = random_features(np.stack([image for _, image in known]))
    values = pseudo_values(features, FeatureSums.of(random_features(world)))
    scores = (mean_score("overall", values, seed=options.seed),)
    records = [{"prompt": text, "frechet": round(float(one), 6)} for (text, _), one in zip(known, values, strict=True)]
    settings = run_settings(
        pipe, options, clock, sampled=True, scenes=len(texts), features=FEATURES, references=REFERENCES,
    )  # fmt: skip
    return Result("shapes-frechet", scores, settings, {"scenes": records})


def pseudo_values(features: np.ndarray, reference: FeatureSums) -> np.ndarray:
    """The jackknife's pseudo-values [N] of the Fréchet distance of features [N, D] from a reference."""
    count, sums = len(features), FeatureSums.of(features)
    without = [FeatureSums(count - 1, sums.first - one, sums.second - np.outer(one, one)) for one in features]
    return count * distance_of_sums(sums, reference) - (count - 1) * np.array(
        [distance_of_sums(one, reference) for one in without]
    )
