"""Reconstruction of a folder of images as papers report it: PSNR, SSIM in two forms, the Fréchet distance.

What is compared is the largest square in the middle of an image, upright and in sRGB, resized bicubically to the
model's own size, and its reconstruction, both in 8 bits. "rfid" is as in TiTok's evaluator (bytedance/1d-tokenizer):
Inception's features in float64, unbiased covariances. UniLIP's paper has "ssim_range_2", and SPAR's in all likelihood.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar.common.config import write_json
from spar.common.errors import InputError
from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.features import Described, ImageFeatures, RandomFeatures
from spar.evaluation.frechet import ClassSums, FeatureSums, distance_of_sums, inception_score, jackknife_score
from spar.evaluation.options import EvalOptions, batches
from spar.evaluation.pixel_metrics import WINDOW, psnr, ssim_inside
from spar.evaluation.results import Result, Score, mean_score, shown_path
from spar.inference.image_files import IMAGE_SUFFIXES, check_replaceable, list_images, save_images
from spar.processing.images import open_image, to_square

GROUPS = 10  # of images, of which the interval of the distance leaves out one at a time
BEFORE, AFTER = "gt", "recon"  # folders of the pairs, as the evaluators of papers name them
NAMES = "images.json"  # beside them: the images' names in order
RANGES = (1.0, 2.0)  # of SSIM
_FOLDED = 1024  # images whose features are added up at once: a sum has the square of their number, 32 MB


def recon(
    pipe: Any, folder: Path, options: EvalOptions | None = None, progress: Advance | None = None, *,
    features: ImageFeatures | None = None, pairs: Path | None = None, main: bool = True,
) -> Result | None:  # fmt: skip
    """Reconstruct the images of a folder, or of its subfolders, and compare.

    Args:
        options: `limit` counts images, taken evenly from the subfolders.
        features: of the Fréchet distance; by default `RandomFeatures`, whose distances compare with each other alone.
        pairs: an empty folder for the images as they were compared, `gt/00000.png` and `recon/00000.png`, in the order
            of `images.json`.
        main: whether this process measures; of several that share a model, the others only reconstruct.

    Scores: "psnr" (mean of the images' decibels), "ssim" (scikit-image's, data_range 1), "ssim_range_2" (the same with
    data_range 2), and "rfid" with "inception_score" of Inception's features, or "frechet" of others.

    Returns:
        The result; None where this process does not measure.

    Raises:
        InputError: fewer than two images, or one that cannot be read.
    """
    options, clock, features = options or EvalOptions(), Timer(), features or RandomFeatures()
    paths = images_below(folder, options.limit)
    if len(paths) < 2:
        raise InputError(f"recon: expected at least 2 images in {str(folder)!r}, got {len(paths)}")
    found = _Measures(features, min(GROUPS, len(paths)))
    for chunk in batches(paths, options.batch, progress):
        before = [to_square(open_image(path), pipe.image_size) for path in chunk]
        after = [image.convert("RGB") for image in pipe.reconstruct(before).images]
        if main:
            if pairs is not None:
                _save(pairs, len(found.decibels), before, after)
            found.add(*(np.stack([np.asarray(image) for image in images]) for images in (before, after)))
    if not main:
        return None
    names = [shown_path(path.relative_to(folder)) for path in paths]
    if pairs is not None:
        write_json(pairs / NAMES, names)
    rows = zip(names, found.decibels, found.similar[0], strict=True)
    records = [{"image": name, "psnr": round(one, 3), "ssim": round(share, 4)} for name, one, share in rows]
    scores = tuple(found.scores(options.seed))
    settings = run_settings(
        pipe, options, clock, sampled=False, images=len(paths), originals=found.originals.hexdigest(),
        features=features.name,
        ssim=f"scikit-image's: uniform {WINDOW} x {WINDOW} window inside the image, sample covariance",
        distance_interval=f"95 % jackknife, {len(found.groups)} groups of images",
    )
    return Result("recon", scores, settings, {"images": records})


def images_below(folder: Path, limit: int | None = None) -> list[Path]:
    """The images of a folder, or of those of its subfolders that have some, by name; of `limit` evenly of each.

    Raises:
        InputError: a folder that cannot be read, is without images, or has some beside subfolders of images.
    """
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"expected a folder of images, but {str(folder)!r}: {error.strerror or error}") from error
    classes = [
        list_images(path) for path in inside
        if path.is_dir() and not path.name.startswith(".") and any(map(_is_image, path.iterdir()))
    ]  # fmt: skip
    if not classes:
        return list_images(folder)[:limit]
    if mixed := next(filter(_is_image, inside), None):
        raise InputError(f"expected images in {str(folder)!r} or in its subfolders, got both: {mixed.name} and others")
    numbered = sorted((index, path) for paths in classes for index, path in enumerate(paths))
    return sorted(path for _, path in numbered[:limit])


def check_pairs(pairs: Path, folder: Path, result: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder for pairs that has other contents, or where the images or the result are.

    Raises:
        InputError: as `check_replaceable`, or a folder that holds the images or the result, or lies among the images.
    """
    own, other = pairs.resolve(), folder.resolve()
    if own.is_relative_to(other) or other.is_relative_to(own) or result.resolve().is_relative_to(own):
        raise InputError(
            f"pairs: expected a folder apart from the images of {str(folder)!r} and from {str(result)!r}, got "
            f"{str(pairs)!r}"
        )
    check_replaceable(pairs, NAMES, overwrite=overwrite)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


@dataclass
class _Measures:
    """What the images so far have given: a value of each, and sums of their features by groups."""

    features: ImageFeatures
    count: int
    decibels: list[float] = field(default_factory=list)
    similar: list[list[float]] = field(default_factory=lambda: [[] for _ in RANGES])
    waiting: list[tuple[Described, Described]] = field(default_factory=list)
    groups: list[tuple[Any, ...]] = field(default_factory=list)
    folded: int = 0
    originals: Any = field(default_factory=hashlib.sha256)

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Measure images [N, H, W, 3] and their reconstructions."""
        self.originals.update(before.tobytes())
        self.decibels += [psnr(b, a) for b, a in zip(after, before, strict=True)]
        for values, new in zip(self.similar, ssim_inside(after, before, RANGES), strict=True):
            values.extend(new.tolist())
        self.waiting.append((self.features(before), self.features(after)))
        if len(self.decibels) - self.folded >= _FOLDED:
            self._fold()

    def _fold(self) -> None:
        """Add up the features that wait; every tenth image is of the same group, as names may go by classes."""
        if not self.waiting:
            return
        before, after = (_joined([pair[side] for pair in self.waiting]) for side in (0, 1))
        numbers = np.arange(self.folded, self.folded + len(before.values)) % self.count
        for group in range(self.count):
            own = numbers == group
            sums: tuple[Any, ...] = (FeatureSums.of(before.values[own]), FeatureSums.of(after.values[own]))
            if after.logits is not None:
                sums = (*sums, ClassSums.of(after.logits[own]))
            if len(self.groups) < self.count:
                self.groups.append(sums)
            else:
                self.groups[group] = tuple(a + b for a, b in zip(self.groups[group], sums, strict=True))
        self.folded += len(before.values)
        self.waiting.clear()

    def scores(self, seed: int) -> Iterator[Score]:
        self._fold()
        total = len(self.decibels)
        yield mean_score("psnr", self.decibels, seed=seed)
        yield mean_score("ssim", self.similar[0], seed=seed)
        yield mean_score("ssim_range_2", self.similar[1], seed=seed)
        name = "frechet" if len(self.groups[0]) == 2 else "rfid"
        yield jackknife_score(name, distance_of_sums, [sums[:2] for sums in self.groups], total)
        if name == "rfid":
            yield jackknife_score("inception_score", inception_score, [sums[2:] for sums in self.groups], total)


def _joined(parts: Sequence[Described]) -> Described:
    logits = [part.logits for part in parts if part.logits is not None]
    return Described(np.concatenate([part.values for part in parts]), np.concatenate(logits) if logits else None)


def _save(folder: Path, start: int, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> None:
    for name, images in ((BEFORE, before), (AFTER, after)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_images(images, [folder / name / f"{start + index:05}.png" for index in range(len(images))])
