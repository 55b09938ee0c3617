"""Features for the Fréchet distance, independent of the model under test: fixed random convolutions.

They are three layers of random filters with rectifiers, and the mean and the standard deviation of every channel over
places, which describe textures, edges and colours. Distances compare with each other, never with an Inception FID.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

FEATURES = "random-convolutions-1 (3 layers, 16 channels each, mean and deviation: 96 features)"
_CHANNELS = (3, 16, 16, 16)
_SEED = 20240
_CHUNK = 128


def random_features(images: np.ndarray) -> np.ndarray:
    """Features of images: uint8 [N, H, W, 3] to float64 [N, 96]."""
    return np.concatenate([_features(images[i : i + _CHUNK]) for i in range(0, len(images), _CHUNK)])


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


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features, [N, D] and [M, D].

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with C = X^T X / N of the centred features; the last trace
    is that of the symmetric (R C_b R)^(1/2), R the root of C_a, so that all eigenvalues are real.
    """
    mean_a, mean_b = a.mean(0), b.mean(0)
    x, y = a - mean_a, b - mean_b
    values, vectors = np.linalg.eigh(x.T @ x / len(a))
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ (y.T @ y) @ root / len(b)).clip(0)).sum()
    spread = (x**2).sum() / len(a) + (y**2).sum() / len(b)
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + spread - 2 * overlap))
