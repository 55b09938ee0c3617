"""Features for the Fréchet distance, independent of the model under test. Distances of other features never compare.

By default fixed random convolutions: three layers of random filters with rectifiers, and the mean and the standard
deviation of every channel over places, which describe textures, edges and colours. Inception's and those of an encoder
of transformers need files of the user's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from spar.common.errors import InputError

if TYPE_CHECKING:
    import torch

FEATURES = "random-convolutions-1 (3 layers, 16 channels each, mean and deviation: 96 features)"
_CHANNELS = (3, 16, 16, 16)
_SEED = 20240
_CHUNK, _INCEPTION_CHUNK = 128, 16  # images at once; of the random features those of 64 x 64 pixels


@dataclass(frozen=True)
class Described:
    """Features of images [N, D] and, of a classifier, its logits [N, C]."""

    values: np.ndarray
    logits: np.ndarray | None = None


class ImageFeatures(Protocol):
    """What describes images, uint8 [N, H, W, 3]; `name` says of which network, for the results."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: np.ndarray) -> Described: ...


class RandomFeatures:
    """`random_features`."""

    name = FEATURES

    def __call__(self, images: np.ndarray) -> Described:
        return Described(random_features(images))


class InceptionFeatures:
    """The 2,048 features and 1,008 logits of FID's network; float64."""

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        from spar.evaluation.inception import Inception

        self.device = "cpu" if str(device).startswith("mps") else device  # which has no float64
        self.network = Inception.load(path, self.device)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.name = f"Inception v3 of FID, {path.name}, sha256 {digest}, float64"

    def __call__(self, images: np.ndarray) -> Described:
        import torch

        found = []
        for start in range(0, len(images), _INCEPTION_CHUNK):
            with torch.inference_mode():
                chunk = _tensor(images[start : start + _INCEPTION_CHUNK]).to(self.device)
                found.append([one.cpu().numpy() for one in self.network(chunk)])
        values, logits = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Described(values, logits)


class EncoderFeatures:
    """The mean patch token of an image encoder in a folder of transformers; float32."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        from spar.inference.prompt_files import weights_digest
        from spar.training.teacher import load_external_teacher

        self.encoder, self.device = load_external_teacher(str(folder), "features").to(device), device
        kind, digest = type(self.encoder.network).__name__, weights_digest(self.encoder.network)
        self.name = f"{kind}, weights {digest}, mean patch token, {self.encoder.side} pixels, float32"

    def __call__(self, images: np.ndarray) -> Described:
        values = []
        for start in range(0, len(images), _CHUNK):
            tokens, _ = self.encoder(_tensor(images[start : start + _CHUNK]).to(self.device).float() / 255)
            values.append(tokens.mean(1).cpu().double().numpy())
        return Described(np.concatenate(values))


def load_features(path: Path | None, device: torch.device | str = "cpu") -> ImageFeatures:
    """The features of a file of Inception's weights, of an encoder's folder, or the random ones.

    Raises:
        InputError: neither, or files that hold something else.
    """
    if path is None:
        return RandomFeatures()
    if path.is_dir():
        return EncoderFeatures(path, device)
    if path.is_file():
        return InceptionFeatures(path, device)
    raise InputError(f"features: expected Inception's file or the folder of an encoder, found nothing at {str(path)!r}")


def _tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to [N, 3, H, W]."""
    import torch

    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2)


def random_features(images: np.ndarray) -> np.ndarray:
    """Features of images: uint8 [N, H, W, 3] to float64 [N, 96]."""
    step = max(1, _CHUNK * 64 * 64 // (images.shape[1] * images.shape[2]))
    return np.concatenate([_features(images[i : i + step]) for i in range(0, len(images), step)])


def _features(images: np.ndarray) -> np.ndarray:
    import torch

    rng = np.random.Generator(np.random.PCG64(_SEED))
    x = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).double() / 127.5 - 1
    pooled = []
    for inputs, outputs in pairwise(_CHANNELS):
        filters = rng.standard_normal((outputs, inputs, 3, 3)) * np.sqrt(2 / (9 * inputs))
        x = torch.nn.functional.conv2d(x, torch.from_numpy(filters), padding=1).relu()
        pooled += [x.mean((2, 3)), x.std((2, 3), correction=0)]
        x = torch.nn.functional.avg_pool2d(x, 2)
    return torch.cat(pooled, 1).numpy()
