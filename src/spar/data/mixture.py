"""The samples of each batch, as a pure function of the step, over weighted sources and aspect ratio buckets.

A batch has one kind and one bucket. Each (source, bucket) is an endless stream, epoch after epoch, each with another
order; schedules give the stream of each sample of each batch. A position is therefore just a step, the same for any
number of workers and ranks: rank r of W takes the samples r, r + W, ... of each batch.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spar.common.errors import InputError
from spar.data.buckets import Size, assign
from spar.data.samples import Kind
from spar.data.shuffle import InterleaveSchedule, hash_key, shuffled
from spar.data.sources import DataSource

ORDER = 1  # version of the order: part of the fingerprint


@dataclass(frozen=True)
class BatchIndices:
    """The b samples of one rank's part of a batch: `source` and `slot`, int64 [b], are the place of each."""

    category: int
    kind: Kind
    size: Size
    source: np.ndarray
    slot: np.ndarray


class Mixture:
    """The order of all samples.

    Args:
        weights: each source's share of the samples.
        batch: samples of a step, of all ranks together.
        buckets: sizes (width, height) in pixels.
    """

    def __init__(
        self, sources: Sequence[DataSource], weights: Sequence[float], *, batch: int, seed: int = 0,
        buckets: tuple[Size, ...] = ((448, 448),),
    ) -> None:  # fmt: skip
        if not sources:
            raise InputError("expected at least one source of samples, got none")
        if not all(0 < weight < float("inf") for weight in weights):
            raise InputError(f"expected every source's weight above 0, got {', '.join(map(str, weights))}")
        if batch < 1:
            raise InputError(f"batch: expected at least 1, got {batch}")
        self.sources, self.batch, self.seed, self.buckets = [*sources], batch, seed, buckets
        self.weights = np.array(weights, float) / sum(weights)
        self._lists: dict[tuple[int, int], Sequence[int] | np.ndarray] = {}  # (source, bucket) to the samples in it
        shares: dict[tuple[Kind, int], dict[int, float]] = {}  # of the sources in a category
        for number, (source, weight) in enumerate(zip(sources, self.weights, strict=True)):
            for bucket, members in self._split(source):
                self._lists[number, bucket] = members
                part = len(members) / len(source)
                shares.setdefault((source.kind, bucket), {})[number] = weight * part
        self.categories = sorted(shares)
        ordered = [shares[category] for category in self.categories]
        self._batches = InterleaveSchedule([sum(own.values()) for own in ordered])
        self._within = [(np.array([*own]), InterleaveSchedule([*own.values()])) for own in ordered]

    def _split(self, source: DataSource) -> list[tuple[int, Sequence[int] | np.ndarray]]:
        """(bucket, samples in it) of a source."""
        if len(self.buckets) == 1:
            return [(0, range(len(source)))]
        chosen = assign(source.sizes(), self.buckets, self.batch)
        width = np.uint32 if len(source) < 2**32 else np.uint64
        return [(int(bucket), np.flatnonzero(chosen == bucket).astype(width)) for bucket in np.unique(chosen)]

    def batch_indices(self, step: int, rank: int = 0, world: int = 1) -> BatchIndices:
        """Samples of rank `rank` in step `step`, in order.

        Raises:
            InputError: the ranks do not divide the batch, or there is no such rank or step.
        """
        if step < 0 or not 0 <= rank < world or self.batch % world:
            raise InputError(
                f"expected a step of at least 0 and a rank below the world size, which divides the batch, "
                f"got step {step}, rank {rank} of {world}, batch {self.batch}"
            )
        category, turn = (int(found[0]) for found in self._batches.at(np.array([step])))
        numbers, schedule = self._within[category]
        chosen, occurrence = schedule.at(turn * self.batch + np.arange(rank, self.batch, world))
        source, slot = numbers[chosen], np.empty_like(occurrence)
        kind, bucket = self.categories[category]
        for number in np.unique(source):
            size, mine = len(self._lists[number, bucket]), source == number
            epochs = occurrence[mine] // size
            for epoch in np.unique(epochs):
                where = np.flatnonzero(mine)[epochs == epoch]
                key = hash_key(self.seed, int(number), bucket, int(epoch))
                slot[where] = shuffled(occurrence[where] % size, size, key)
        return BatchIndices(category, kind, self.buckets[bucket], source, slot)

    def sample_index(self, indices: BatchIndices, row: int, neighbour: int = 0) -> int:
        """Number of a sample in its source, or of the n-th sample after it in the same bucket."""
        members = self._lists[int(indices.source[row]), self.categories[indices.category][1]]
        return int(members[(int(indices.slot[row]) + neighbour) % len(members)])

    def epochs(self, steps: int) -> dict[str, float]:
        """Epochs of each source in this many steps."""
        pairs = zip(self.sources, self.weights, strict=True)
        return {source.name: steps * self.batch * float(weight) / len(source) for source, weight in pairs}

    def fingerprint(self) -> str:
        """Hash of everything that the order depends on: a run resumes only on the same data."""
        parts = [ORDER, self.batch, self.seed, self.buckets, self.weights.tolist(), [s.identity for s in self.sources]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
