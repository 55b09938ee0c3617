"""Reconstruction of a folder of images as papers report it: PSNR, SSIM in two forms, the Fréchet distance.

As in TiTok's evaluator (bytedance/1d-tokenizer), an image is resized by its shorter side and cropped at the centre, and
its reconstruction is compared with that, both in 8 bits; "rfid" is the distance of Inception's features, computed in
float64 with unbiased covariances. The size is the model's own. UniLIP's and SPAR's papers report "ssim_range_2".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar.common.errors import InputError
from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.features import Described, ImageFeatures, RandomFeatures
from spar.evaluation.frechet import ClassSums, FeatureSums, distance_of_sums, inception_score, jackknife_score
from spar.evaluation.options import EvalOptions, batches
from spar.evaluation.pixel_metrics import WINDOW, psnr, ssim_inside
from spar.evaluation.results import Result, Score, mean_score
from spar.inference.image_files import IMAGE_SUFFIXES, list_images, save_images
from spar.processing.images import open_image, to_square

GROUPS = 10  # of images, of which the interval of the distance leaves out one at a time
BEFORE, AFTER = "gt", "recon"  # folders of the pairs, as the evaluators of papers name them


def recon(
    pipe: Any, folder: Path, options: EvalOptions | None = None, progress: Advance | None = None, *,
    features: ImageFeatures | None = None, pairs: Path | None = None,
) -> Result:  # fmt: skip
    """Reconstruct the images of a folder, or of its subfolders, and compare.

    Args:
        features: of the Fréchet distance; by default `RandomFeatures`, whose distances compare with each other alone.
        pairs: a folder for the images as they were compared, `gt/00000.png` and `recon/00000.png`, in their names'
            order.

    Scores: "psnr" (mean of the images' decibels), "ssim" (scikit-image's, data_range 1), "ssim_range_2" (the same with
    data_range 2), and "rfid" with "inception_score" of Inception's features, or "frechet" of others.

    Raises:
        InputError: fewer than two images, or one that cannot be read.
    """
    options, clock, features = options or EvalOptions(), Timer(), features or RandomFeatures()
    paths = images_below(folder)[: options.limit]
    if len(paths) < 2:
        raise InputError(f"recon: expected at least 2 images in {str(folder)!r}, got {len(paths)}")
    # Every tenth image is of the same group: in the order of names classes follow each other.
    groups: list[tuple[Any, ...]] = [()] * min(GROUPS, len(paths))
    decibels, similar, doubled = list[float](), list[float](), list[float]()
    for chunk in batches(paths, options.batch, progress):
        before = [to_square(open_image(path), pipe.image_size) for path in chunk]
        after = [image.convert("RGB") for image in pipe.reconstruct(before).images]
        first = len(decibels)
        if pairs is not None:
            _save(pairs, first, before, after)
        originals, rebuilt = (np.stack([np.asarray(image) for image in images]) for images in (before, after))
        decibels += [psnr(b, a) for b, a in zip(rebuilt, originals, strict=True)]
        similar += ssim_inside(rebuilt, originals).tolist()
        doubled += ssim_inside(rebuilt, originals, data_range=2.0).tolist()
        described = features(originals), features(rebuilt)
        for group in range(len(groups)):
            own = np.arange(first, len(decibels)) % len(groups) == group
            if own.any():
                groups[group] = _added(groups[group], _sums(*described, own))
    scores = (
        mean_score("psnr", decibels, seed=options.seed),
        mean_score("ssim", similar, seed=options.seed),
        mean_score("ssim_range_2", doubled, seed=options.seed),
        *_distances(groups, len(paths)),
    )
    records = [
        {"image": path.relative_to(folder).as_posix(), "psnr": round(value, 3), "ssim": round(share, 4)}
        for path, value, share in zip(paths, decibels, similar, strict=True)
    ]
    settings = run_settings(
        pipe, options, clock, sampled=False, images=len(paths), features=features.name,
        ssim=f"scikit-image's: uniform {WINDOW} x {WINDOW} window inside the image, sample covariance",
        distance_interval=f"95 % jackknife, {len(groups)} groups of images",
    )
    return Result("recon", scores, settings, {"images": records})


def images_below(folder: Path) -> list[Path]:
    """The images of a folder, or of its subfolders where it has none itself, by name.

    Raises:
        InputError: a folder that cannot be read, or without images.
    """
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"expected a folder of images, but {str(folder)!r}: {error.strerror or error}") from error
    if any(path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() for path in inside):
        return list_images(folder)
    subfolders = [path for path in inside if path.is_dir() and not path.name.startswith(".")]
    return [path for subfolder in subfolders for path in list_images(subfolder)] or list_images(folder)


def _sums(original: Described, rebuilt: Described, own: np.ndarray) -> tuple[Any, ...]:
    """The sums of some images of a batch."""
    sums = FeatureSums.of(original.values[own]), FeatureSums.of(rebuilt.values[own])
    return sums if rebuilt.logits is None else (*sums, ClassSums.of(rebuilt.logits[own]))


def _added(sums: tuple[Any, ...], more: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a + b for a, b in zip(sums, more, strict=True)) if sums else more


def _distances(groups: Sequence[tuple[Any, ...]], count: int) -> Iterator[Score]:
    if len(groups[0]) == 2:
        yield jackknife_score("frechet", distance_of_sums, groups, count)
        return
    yield jackknife_score("rfid", distance_of_sums, [sums[:2] for sums in groups], count)
    yield jackknife_score("inception_score", inception_score, [sums[2:] for sums in groups], count)


def _save(folder: Path, start: int, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> None:
    for name, images in ((BEFORE, before), (AFTER, after)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_images(images, [folder / name / f"{start + index:05}.png" for index in range(len(images))])
