"""Shapes-Codes: how much of each vocabulary a tokenizer uses on images that it has not seen, those of Shapes-Recon.

Usage is the share of the entries that some position uses, perplexity the exponential of the entropy of the entries'
shares, over their number: 1 where all are used alike. Both at every depth, and pooled over the depths, which is what
counts where these share one codebook.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spar.common.errors import InputError
from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.options import EvalOptions, batches
from spar.evaluation.results import Result, Score, bootstrap
from spar.evaluation.shapes_recon import recon_scenes
from spar.worlds.shapes.render import render

_DRAWS = 100


def shapes_codes(pipe: Any, options: EvalOptions | None = None, progress: Advance | None = None) -> Result:
    """Run Shapes-Codes on `pipe.encode`.

    Scores: "overall", the least usage of any vocabulary at any depth, and for each vocabulary "pixel.usage.1",
    "pixel.perplexity.1" and so on by depth, and with "pooled" in a depth's place.

    Raises:
        InputError: a model whose system has no codes.
    """
    from PIL import Image

    if not hasattr(pipe, "encode"):
        raise InputError("shapes-codes needs a model with visual vocabularies: expected one of DualToken")
    options, clock = options or EvalOptions(), Timer()
    scenes = recon_scenes(options)
    entries = pipe.entries
    codes: dict[str, list[np.ndarray]] = {name: [] for name in entries}
    for chunk in batches(scenes, options.batch, progress):
        found = pipe.encode([Image.fromarray(render(scene)) for scene in chunk])
        for name, rows in codes.items():
            rows.append(getattr(found, name).flatten(1, 2).cpu().numpy())       # [B, N, D]
    scores: list[Score] = []
    for name, rows in codes.items():
        scores += _scores(name, np.concatenate(rows), entries[name], options.seed)
    least = min((score for score in scores if ".usage." in score.name and "pooled" not in score.name), key=_value)
    overall = Score("overall", least.value, least.low, least.high, least.n)
    settings = run_settings(pipe, options, clock, sampled=False, scenes=len(scenes), entries=entries)
    return Result("shapes-codes", (overall, *scores), settings)


def _value(score: Score) -> float:
    return score.value


def usage(codes: np.ndarray, entries: int) -> float:
    """The share of the entries that occur among codes of any shape."""
    return len(np.unique(codes)) / entries


def perplexity(codes: np.ndarray, entries: int) -> float:
    """The exponential of the entropy of the codes' shares, over the number of entries."""
    shares = np.bincount(codes.ravel(), minlength=entries) / codes.size
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()) / entries)


def _scores(name: str, codes: np.ndarray, entries: int, seed: int) -> list[Score]:
    """The scores of one vocabulary, from codes `[images, N, D]`; resampled by image."""
    depths = {**{str(d + 1): codes[..., d] for d in range(codes.shape[2])}, "pooled": codes}
    found = []
    for depth, values in depths.items():
        for kind, measure in (("usage", usage), ("perplexity", perplexity)):

            def statistic(index: np.ndarray, values: np.ndarray = values, measure: Any = measure) -> float:
                return float(measure(values[index], entries))

            low, high = bootstrap(statistic, len(values), seed=seed, draws=_DRAWS)
            found.append(Score(f"{name}.{kind}.{depth}", float(measure(values, entries)), low, high, len(values)))
    return found
