"""The order of samples as pure functions of (seed, epoch, position), without a random generator.

They use only integers, so that every machine has the same order, and no state but the position.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

BLOCK = 64  # neighbours in the files that stay near each other in the order, for partly sequential reads
WINDOW = 64  # blocks that are mixed with each other: 4096 samples, about the family's shuffle buffer
PERIOD = 2**16  # slots after which a schedule repeats: shares are exact to 1 / 65536
_GOLDEN_STRIDE = 40503  # odd, PERIOD over the golden ratio: spreads the slots of one category evenly
_ROUNDS = 6


def hash_key(*parts: int) -> int:
    """Hash a few whole numbers to 64 bits."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed bijection of range(size), position by position: a Feistel network over the next power of four, iterated
    until the value is in range. There is no table: the memory does not grow with `size`.

    Args:
        positions: whole numbers in [0, size), any shape.

    Returns:
        int64, of the same shape.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [np.uint64(hash_key(key, number)) for number in range(_ROUNDS)]
    values = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: Sequence[np.uint64]) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << np.uint64(half)) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shuffled(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """The samples at these positions of one epoch of `size` samples: each sample occurs exactly once per epoch.

    There are two levels, so that tars on a disk or a network are read in runs: blocks of BLOCK neighbours are permuted
    over the whole set, then WINDOW blocks at a time are mixed sample by sample. The set is rotated by a random amount
    first, so that no two neighbours share a block in every epoch.

    Args:
        positions: int64 [n] in [0, size).
        key: hash of (seed, epoch, ...).
    """
    whole = size // BLOCK
    turn = hash_key(key, -1) % size
    result = positions.astype(np.int64)  # unchanged after the last whole block
    windows = positions // (BLOCK * WINDOW)
    for window in np.unique(windows[positions < whole * BLOCK]):
        chosen = np.flatnonzero((windows == window) & (positions < whole * BLOCK))
        start = int(window) * WINDOW
        blocks = min(WINDOW, whole - start)
        mixed = permute(positions[chosen] - start * BLOCK, blocks * BLOCK, hash_key(key, int(window)))
        result[chosen] = permute(start + mixed // BLOCK, whole, key) * BLOCK + mixed % BLOCK
    return (result + turn) % size


class InterleaveSchedule:
    """Interleaves categories in fixed shares: slot k is the `occurrence`-th slot of `category`.

    Every PERIOD slots contain each category exactly in proportion to its share, at least once, and any shorter range
    nearly so.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        weights = np.array(shares, float)
        if not len(weights) or not np.isfinite(weights).all() or (weights <= 0).any() or len(weights) > PERIOD // 2:
            raise ValueError(f"expected positive shares, got {list(shares)}")
        self.quotas = _apportion(weights)
        slots = (np.arange(PERIOD) * _GOLDEN_STRIDE) % PERIOD
        self._category = np.searchsorted(np.cumsum(self.quotas), slots, side="right").astype(np.uint16)
        grouped = np.argsort(self._category, kind="stable")
        starts = np.cumsum(self.quotas) - self.quotas
        self._rank = np.empty(PERIOD, np.uint32)
        self._rank[grouped] = np.arange(PERIOD) - np.repeat(starts, self.quotas)

    def at(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(category, occurrence), int64 each, of slots [n]."""
        within = slots % PERIOD
        category = self._category[within].astype(np.int64)
        return category, (slots // PERIOD) * self.quotas[category] + self._rank[within]


def _apportion(weights: np.ndarray) -> np.ndarray:
    """Seats of PERIOD by largest remainder, one for each category first; int64, their sum is PERIOD."""
    ideal = weights / weights.sum() * (PERIOD - len(weights))
    seats = np.floor(ideal).astype(np.int64)
    rest = PERIOD - len(weights) - int(seats.sum())
    seats[np.argsort(seats - ideal, kind="stable")[:rest]] += 1
    return seats + 1
