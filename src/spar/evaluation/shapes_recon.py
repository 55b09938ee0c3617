"""Shapes-Recon, reconstruction by the tokenizer: PSNR, SSIM, Fréchet distance, and the objects that survive.

All are measured on the 8-bit images that a user gets. PSNR: mean of the images' decibels, the peak at 255. SSIM:
torchmetrics, data_range 1, uniform 7 x 7 window, borders reflected, mean over pixels and channels. Fréchet distance:
between Gaussians fitted to `features.random_features` of originals and reconstructions. Survival: the share of the
scenes' objects that the detector finds with the same shape, colour and size, the centre within 2 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.features import FEATURES, random_features
from spar.evaluation.frechet import frechet_distance
from spar.evaluation.matching import PLACE_TOLERANCE, fidelity_score, same_object, take_match
from spar.evaluation.options import EvalOptions, PipelineLike, batches, pixels, scene_seed, seed_block
from spar.evaluation.pixel_metrics import BANDS, WINDOW, band_psnr, psnr, ssim
from spar.evaluation.results import Result, Score, bootstrap, mean_score, ratio_score
from spar.worlds.shapes.detector import Detection, detect
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import Scene, make_scene

SCENES = 500
_FRECHET_DRAWS = 200


def recon_scenes(options: EvalOptions) -> list[Scene]:
    """The benchmark's scenes, of all kinds: always the same for the same combinations."""
    number = seed_block("shapes-recon", 0, options.combinations)
    return [
        make_scene(scene_seed(number, index), combinations=options.combinations)
        for index in range(options.limit or SCENES)
    ]


def shapes_recon(pipe: PipelineLike, options: EvalOptions | None = None, progress: Advance | None = None) -> Result:
    """Run Shapes-Recon on `pipe.reconstruct`.

    Scores: "psnr" (dB), "ssim", "survival", "frechet", and "part.background", "part.scene" (the share of images
    whose background is right, and of those in which everything survives and nothing else appears), "part.psnr_low",
    "part.psnr_middle" and "part.psnr_high" (of the error in a band of spatial frequencies, `pixel_metrics.BANDS`).
    """
    from PIL import Image

    options, clock = options or EvalOptions(), Timer()
    scenes = recon_scenes(options)
    before = np.stack([render(scene) for scene in scenes])
    after: list[np.ndarray] = []
    for chunk in batches(list(before), options.batch, progress):
        after += [pixels(image) for image in pipe.reconstruct([Image.fromarray(image) for image in chunk]).images]
    rebuilt = np.stack(after)
    decibels = [psnr(a, b) for a, b in zip(rebuilt, before, strict=True)]
    detections = [detect(image) for image in rebuilt]
    similar = ssim(rebuilt, before)
    bands = np.array([band_psnr(a, b) for a, b in zip(rebuilt, before, strict=True)])
    scores = (
        mean_score("psnr", decibels, seed=options.seed),
        mean_score("ssim", similar, seed=options.seed),
        *_survival_scores(scenes, detections, options.seed),
        _frechet_score(random_features(before), random_features(rebuilt), options.seed),
        fidelity_score(detections, options.seed),
        *(mean_score(f"part.psnr_{name}", bands[:, band], seed=options.seed) for band, name in enumerate(BANDS)),
    )
    pairs = zip(detections, scenes, strict=True)
    kept = [survivors(detection, scene)[0] / len(scene.objects) for detection, scene in pairs]
    records = [
        {
            "psnr": round(value, 2), "ssim": round(float(share), 4), "survived": survived,
            **{f"psnr_{name}": round(float(one), 2) for name, one in zip(BANDS, row, strict=True)},
        }
        for value, share, survived, row in zip(decibels, similar, kept, bands, strict=True)
    ]  # fmt: skip
    settings = run_settings(
        pipe, options, clock, sampled=False, scenes=len(scenes), features=FEATURES,
        ssim=f"torchmetrics, data_range 1, uniform {WINDOW} x {WINDOW} window", place_tolerance=PLACE_TOLERANCE,
    )
    return Result("shapes-recon", scores, settings, {"scenes": records})


def survivors(detection: Detection, scene: Scene) -> tuple[int, bool]:
    """Number of a scene's objects that survive, and whether all do, on the same background, without other objects."""
    left = list(detection.objects)
    found = [take_match(left, partial(same_object, item=item)) for item in scene.objects]
    number = sum(seen is not None for seen in found)
    return number, number == len(scene.objects) and not left and detection.background == scene.background


def _survival_scores(scenes: Sequence[Scene], detections: Sequence[Detection], seed: int) -> tuple[Score, ...]:
    pairs = list(zip(detections, scenes, strict=True))
    counts = [survivors(detection, scene) for detection, scene in pairs]
    backgrounds = [float(detection.background == scene.background) for detection, scene in pairs]
    return (
        ratio_score("survival", [number for number, _ in counts], [len(s.objects) for s in scenes], seed=seed),
        mean_score("part.background", backgrounds, seed=seed),
        mean_score("part.scene", [float(whole) for _, whole in counts], seed=seed),
    )


def _frechet_score(before: np.ndarray, after: np.ndarray, seed: int) -> Score:
    """The distance, with an interval from resampled pairs of image and reconstruction."""

    def statistic(index: np.ndarray) -> float:
        return frechet_distance(before[index], after[index])

    low, high = bootstrap(statistic, len(before), seed=seed, draws=_FRECHET_DRAWS)
    return Score("frechet", frechet_distance(before, after), low, high, len(before))
