"""Shapes-Probe: what a linear map reads of an image's tokens, the tokenizer's `f_v`: shape and colour of the object
that each token shows.

A ridge regression onto the classes (one column each, "nothing" among them), fitted on half of the scenes and tested on
the others, on tokens that show an object: how much of the meaning the tokenizer's training has left where it was, with
no LLM in between. It is for models of SPAR, and for studies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.options import EvalOptions, batches
from spar.evaluation.results import Result, mean_score
from spar.worlds.shapes.dataset import dense_targets, scene_at
from spar.worlds.shapes.render import render

SCENES = 200  # for the fit, and as many for the test
RIDGE = 1e-3  # of the features' mean square
READ = ("shape", "color")


def shapes_probe(pipe: Any, options: EvalOptions | None = None, progress: Advance | None = None) -> Result:
    """Run Shapes-Probe on `pipe.token_features`; `limit` counts the scenes of the test.

    Scores: "overall" and one of each property, the share of right object tokens, scene by scene.
    """
    options, clock = options or EvalOptions(), Timer()
    count = options.limit or SCENES
    scenes = [scene_at("validation", index) for index in range(2 * count)]
    parts = []
    for chunk in batches(scenes, options.batch, progress):
        parts.append(pipe.token_features([Image.fromarray(render(scene)) for scene in chunk]).numpy())
    features = np.concatenate(parts).astype(np.float64)                                     # [2 count, N, D]
    targets = [dense_targets(scene, round(features.shape[1] ** 0.5)) for scene in scenes]
    fitted, tested = features[:count], features[count:]
    right = {}
    for name in READ:
        labels = np.stack([target[name].reshape(-1) for target in targets])                 # [2 count, N]
        guesses = _read(fitted, labels[:count], tested)
        right[name] = [
            float((guess == label)[label > 0].mean()) if (label > 0).any() else 1.0
            for guess, label in zip(guesses, labels[count:], strict=True)
        ]
    overall = np.mean([right[name] for name in READ], axis=0)
    scores = (
        mean_score("overall", overall, seed=options.seed),
        *(mean_score(name, values, seed=options.seed) for name, values in right.items()),
    )
    rows = [*zip(*(right[name] for name in READ), strict=True)]
    records = [{"right": [float(np.mean(row))], **dict(zip(READ, row, strict=True))} for row in rows]
    settings = run_settings(pipe, options, clock, sampled=False, scenes=count, ridge=RIDGE)
    return Result("shapes-probe", scores, settings, {"scenes": records})


def _read(fitted: np.ndarray, labels: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Classes [S, N] of tokens [S, N, D], by ridge regression on others and their classes."""
    x = fitted.reshape(-1, fitted.shape[-1])
    mean = x.mean(0)
    x = x - mean
    wanted = np.eye(labels.max() + 1)[labels.reshape(-1)]
    offset = wanted.mean(0)
    gram = x.T @ x
    weights = np.linalg.solve(
        gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ (wanted - offset)
    )
    return ((tested - mean) @ weights + offset).argmax(-1)
