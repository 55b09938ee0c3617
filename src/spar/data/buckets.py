"""Aspect ratio buckets: a few sizes of about equal area, and the assignment of images to them."""

import math

import numpy as np

from spar.common.errors import InputError

STRIDE = 28  # pixels per visual token: InternVL's patch of 14, two by two merged
SMALLEST_SHARE = 1 / 8192  # of a source: a bucket with less is merged into its neighbour
SMALLEST_PART_OF_A_BATCH = 1 / 8  # else a batch would repeat the same few images

Size = tuple[int, int]


def make_buckets(side: int, max_aspect: float = 1.0, stride: int = STRIDE) -> tuple[Size, ...]:
    """(width, height) of every bucket, wide ones last: multiples of `stride`, their areas near side x side.

    Args:
        side: pixels of the square, a multiple of `stride`.
        max_aspect: longest over shortest side; 1 gives only the square.

    Raises:
        InputError: the side is not a multiple of `stride`, or the aspect is below 1 or above 8.
    """
    if side < stride or side % stride:
        raise InputError(f"side: expected a multiple of {stride} pixels, got {side}")
    if not 1 <= max_aspect <= 8:
        raise InputError(f"max_aspect: expected 1 to 8, got {max_aspect}")
    grid = side // stride
    found = set()
    for short in range(1, grid + 1):
        long = round(grid * grid / short)
        if long <= max_aspect * short:
            found.update({(short * stride, long * stride), (long * stride, short * stride)})
    return tuple(sorted(found))


def assign(sizes: np.ndarray, buckets: tuple[Size, ...], batch: int) -> np.ndarray:
    """Assign each image of one source to the bucket of the nearest aspect ratio, without rare buckets.

    Args:
        sizes: [N, 2] width and height; 0 if unknown, which counts as square.
        batch: samples of a global batch.

    Returns:
        uint8 [N].
    """
    ratios = np.array([math.log(width / height) for width, height in buckets])
    if len(buckets) == 1:
        return np.zeros(len(sizes), np.uint8)
    known = (sizes > 0).all(axis=1)
    wanted = np.zeros(len(sizes))
    wanted[known] = np.log(sizes[known, 0] / sizes[known, 1])
    chosen = _nearest(wanted, ratios, np.arange(len(buckets)))
    counts = np.bincount(chosen, minlength=len(buckets))
    least = max(1.0, len(sizes) * SMALLEST_SHARE, min(batch * SMALLEST_PART_OF_A_BATCH, counts.max(initial=0)))
    return _nearest(wanted, ratios, np.flatnonzero(counts >= least))


def _nearest(wanted: np.ndarray, ratios: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The allowed bucket of the nearest log aspect, uint8 [N]; borders are half way between two buckets."""
    allowed = allowed[np.argsort(ratios[allowed], kind="stable")]
    ordered = ratios[allowed]
    return allowed[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, wanted)].astype(np.uint8)
