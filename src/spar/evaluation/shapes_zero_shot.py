"""Shapes-Zero-Shot: each image of one object, classified among all pairs of colour and shape by the two towers alone.

The image's feature is that of its semantic codes; beside it stands the encoder's own, without quantisation. A label is
a text such as "a red circle"; the nearest by cosine is the answer. Chance is one in the number of pairs.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from spar.common.errors import InputError
from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.options import EvalOptions, batches, scene_seed, seed_block
from spar.evaluation.results import Result, mean_score
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import COLORS, SHAPES, make_scene
from spar.worlds.shapes.tokenizer import look_text, with_article

IMAGES = 960
LABELS = tuple(itertools.product(COLORS, SHAPES))


def label_text(color: str, shape: str) -> str:
    """The text of a pair."""
    return with_article(look_text(shape, color, None))


def shapes_zero_shot(pipe: Any, options: EvalOptions | None = None, progress: Advance | None = None) -> Result:
    """Run Shapes-Zero-Shot on `pipe.classify`.

    Scores: "overall" by quantised features, "part.unquantized" by the encoder's own, "part.color" and "part.shape".

    Raises:
        InputError: a model whose system does not classify.
    """
    from PIL import Image

    if not hasattr(pipe, "classify"):
        raise InputError("shapes-zero-shot needs a model with a text tower: expected one of DualToken")
    options, clock = options or EvalOptions(), Timer()
    number = seed_block("shapes-zero-shot", 0, options.combinations)
    scenes = [
        make_scene(scene_seed(number, index), kind="single", combinations=options.combinations)
        for index in range(options.limit or IMAGES)
    ]
    truths = [LABELS.index((scene.objects[0].color, scene.objects[0].shape)) for scene in scenes]
    labels = [label_text(*pair) for pair in LABELS]
    found: dict[bool, list[int]] = {True: [], False: []}
    for chunk in batches(scenes, options.batch, progress):
        images = [Image.fromarray(render(scene)) for scene in chunk]
        for quantized in (True, False):
            found[quantized] += pipe.classify(images, labels, quantized=quantized)
    own, truth = np.array(found[True]), np.array(truths)
    looks = np.array([[list(COLORS).index(color), SHAPES.index(shape)] for color, shape in LABELS])
    pairs = looks[own] == looks[truth]                                          # [images, 2]: color, shape
    scores = (
        mean_score("overall", (own == truth).astype(float), seed=options.seed),
        mean_score("part.unquantized", (np.array(found[False]) == truth).astype(float), seed=options.seed),
        mean_score("part.color", pairs[:, 0].astype(float), seed=options.seed),
        mean_score("part.shape", pairs[:, 1].astype(float), seed=options.seed),
    )
    records = [{"expected": labels[i], "answer": labels[j]} for i, j in zip(truth, own, strict=True)]
    settings = run_settings(pipe, options, clock, sampled=False, images=len(scenes), labels=len(labels))
    return Result("shapes-zero-shot", scores, settings, {"images": records})
