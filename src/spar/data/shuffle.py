"""Which sample comes when, as pure functions of (seed, epoch, position): nothing is drawn from a running generator.

Integers only, so that every machine deals the same sequence, and no state but the position.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

BLOCK = 64  # neighbours in the files that stay near each other in time: reading them is half sequential
WINDOW = 64  # blocks that are mixed with each other: 4096 samples, about the shuffle buffer that the family uses
PERIOD = 2**16  # slots after which a schedule repeats: shares are exact to 1 / 65536
_GOLDEN_STRIDE = 40503  # odd, PERIOD over the golden ratio: slots of one category lie as evenly as they can
_ROUNDS = 6


def hash_key(*parts: int) -> int:
    """64 bits of a few whole numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed bijection of range(size), position by position: a Feistel network over the next power of four, walked
    until it falls inside. No table: the memory does not grow with `size`.

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
    """The samples at these positions of one epoch of `size` samples: each sample comes exactly once an epoch.

    Two levels, so that tars on a disk or a network are read in pieces and not one file at a time: blocks of BLOCK
    neighbours are permuted over the whole set, then WINDOW blocks at a time are mixed sample by sample. The set is
    turned by a random amount first, so that no two neighbours share a block in every epoch.

    Args:
        positions: int64 [n] in [0, size).
        key: of (seed, epoch, ...).
    """
    whole = size // BLOCK
    turn = hash_key(key, -1) % size
    result = positions.astype(np.int64)  # behind the last whole block: as they lie
    windows = positions // (BLOCK * WINDOW)
    for window in np.unique(windows[positions < whole * BLOCK]):
        chosen = np.flatnonzero((windows == window) & (positions < whole * BLOCK))
        start = int(window) * WINDOW
        blocks = min(WINDOW, whole - start)
        mixed = permute(positions[chosen] - start * BLOCK, blocks * BLOCK, hash_key(key, int(window)))
        result[chosen] = permute(start + mixed // BLOCK, whole, key) * BLOCK + mixed % BLOCK
    return (result + turn) % size


class InterleaveSchedule:
    """Categories dealt in fixed shares: slot k belongs to `category` and is its `occurrence`-th slot, both at once.

    Every PERIOD slots hold each category exactly as often as its share says, at least once, and any stretch of them
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
