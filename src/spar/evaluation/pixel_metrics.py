"""PSNR and SSIM of 8-bit images. Libraries differ in their SSIM: here are torchmetrics', which Shapes-Recon has, and
scikit-image's, which papers on tokenizers have, some of them with a wrong range.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

MAX_PSNR = 100.0  # decibels of equal images
# From which spatial frequency on, in cycles a pixel: areas, forms (periods of 16 to 4 pixels), edges.
BANDS = {"low": 0.0, "middle": 1 / 16, "high": 1 / 4}
WINDOW = 7
_CHUNK = 4  # images per call of SSIM: on a CPU four times as fast as 64


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 values against others, the peak at 255; MAX_PSNR when equal."""
    error = np.mean(((image.astype(np.float64) - reference) / 255) ** 2)
    return MAX_PSNR if error == 0 else min(MAX_PSNR, float(-10 * np.log10(error)))


def band_psnr(image: np.ndarray, reference: np.ndarray) -> list[float]:
    """PSNR of the part of the error in each of BANDS, by spatial frequency: uint8 [H, W, 3] twice to three numbers.

    In dB. The errors of the bands add up to the whole error (Parseval); MAX_PSNR where a band has none.
    """
    error = (image.astype(np.float64) - reference) / 255
    power = (np.abs(np.fft.fft2(error, axes=(0, 1))) ** 2).mean(-1) / (error.shape[0] * error.shape[1]) ** 2
    rows, columns = (np.fft.fftfreq(side) for side in error.shape[:2])
    frequency = np.hypot(rows[:, None], columns)
    edges = [*BANDS.values(), np.inf]
    parts = [float(power[(low <= frequency) & (frequency < high)].sum()) for low, high in pairwise(edges)]
    return [MAX_PSNR if part <= 10 ** (-MAX_PSNR / 10) else -10 * float(np.log10(part)) for part in parts]


def ssim(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Structural similarity of each image as torchmetrics has it: uint8 [N, H, W, 3] twice to float [N].

    Uniform window, data_range 1, borders reflected, mean over pixels and channels.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    def chunk(all_images: np.ndarray, start: int) -> torch.Tensor:
        return torch.from_numpy(all_images[start : start + _CHUNK].copy()).permute(0, 3, 1, 2).double() / 255

    values = []
    for start in range(0, len(images), _CHUNK):
        value = structural_similarity_index_measure(
            chunk(images, start), chunk(references, start), gaussian_kernel=False, kernel_size=WINDOW, data_range=1.0,
            reduction="none",
        )
        values.append((value if isinstance(value, torch.Tensor) else value[0]).reshape(-1))  # a pair with other options
    return torch.cat(values).numpy()


def ssim_inside(images: np.ndarray, references: np.ndarray, data_ranges: Sequence[float] = (1.0,)) -> np.ndarray:
    """Structural similarity as scikit-image has it by default: uint8 [N, H, W, 3] twice to float [R, N], R ranges.

    Uniform window, sample covariance, only windows that lie inside the image, mean over pixels and channels. Values are
    in [0, 1]; a range of 2, in LlamaGen, TokenFlow and UniLIP, makes the constants four times as large.
    """
    if min(images.shape[1:3]) < WINDOW:
        raise ValueError(f"expected images of at least {WINDOW} x {WINDOW} pixels, got {images.shape}")
    return np.array([_inside(a / 255.0, b / 255.0, data_ranges) for a, b in zip(images, references, strict=True)]).T


def _inside(x: np.ndarray, y: np.ndarray, data_ranges: Sequence[float]) -> list[float]:
    """Of two images [H, W, 3] in [0, 1], by each range."""
    mean_x, mean_y = _window_means(x), _window_means(y)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    spread_x, spread_y = (sample * (_window_means(z**2) - mean**2) for z, mean in ((x, mean_x), (y, mean_y)))
    together = sample * (_window_means(x * y) - mean_x * mean_y)
    values = []
    for data_range in data_ranges:
        first, second = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        above = (2 * mean_x * mean_y + first) * (2 * together + second)
        values.append(float((above / ((mean_x**2 + mean_y**2 + first) * (spread_x + spread_y + second))).mean()))
    return values


def _window_means(x: np.ndarray) -> np.ndarray:
    """Means of all windows inside [H, W, 3]."""
    from scipy.ndimage import uniform_filter

    edge = WINDOW // 2
    return uniform_filter(x, (WINDOW, WINDOW, 1))[edge:-edge, edge:-edge]
