"""Batches of pixels and text from a mixture, decoded in worker processes.

A worker builds whole batches, so that the result does not depend on the number of workers or shards. Batches come in
the order of their steps, and resuming starts at the requested step.
"""

import logging
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spar.common.errors import InputError
from spar.data.bad_samples import BadSampleRecord, BadSampleTracker, decode_images
from spar.data.buckets import Size
from spar.data.mixture import BatchIndices, Mixture
from spar.data.samples import BadSample, Kind, Sample, check_references
from spar.data.sources import DataSource
from spar.processing.images import to_size

# Neighbours tried as replacements of one bad sample: the first number, or as many as the budget of bad samples admits
# in the whole source, up to the second. A cluster of bad samples within the budget ends no run.
MIN_TRIES, MAX_TRIES = 16, 1000
READ_TRIES, READ_PAUSE = 3, 0.2  # of a sample whose file cannot be read at the moment, and seconds between them
SHARED_MEMORY = Path("/dev/shm")
WORKER_GRACE = 10  # seconds
PREFETCH = 2  # batches that each worker may be ahead

log = logging.getLogger("spar.data")


@contextmanager
def any_number_of_workers() -> Iterator[None]:
    """Start torch's workers without its warning that there are more than processors: they are slower at most."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


@dataclass(frozen=True)
class LoaderBatch:
    """One rank's part of a step: b samples of one kind and one size.

    images: uint8 [b, 3, H, W].
    inputs: uint8 [r, 3, H, W], the references of all edits, one sample's together; r is 0 for text-to-image.
    owners: int64 [r], the row that each reference belongs to.
    texts, keys, sources: of each row. `places`: its source's identity and its number there, a unique pair. `turns`:
    questions and answers of dialogues.
    `bad` has the samples that were passed over for these rows, of which `replaced` do not have their own.
    """

    step: int
    kind: Kind
    images: Tensor
    inputs: Tensor
    owners: Tensor
    texts: tuple[str, ...]
    keys: tuple[str, ...]
    sources: tuple[str, ...]
    places: tuple[tuple[str, int], ...] = ()
    bad: tuple[BadSampleRecord, ...] = ()
    replaced: int = 0
    turns: tuple[tuple[tuple[str, str], ...], ...] = ()


def to_pixels(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Convert uint8 [B, 3, H, W] to float32 in [0, 1] on a device; moved first, while it has a quarter of the size."""
    return images.to(device, non_blocking=True).float().div_(255)


class Loader:
    """Loads one rank's batches of a mixture.

    Args:
        workers: processes that decode; 0 decodes in this process.
        bad_share: share of bad samples above which the run ends.
        bad_samples: JSONL file of bad samples; with several ranks each has its own (`bad.0.jsonl`).
        captions: whether a sample without text is bad; reconstruction needs none.
        one_reference: whether an edit of several reference images is bad.
        known: predicate of (a source's identity, a sample's number there) for cached features: with it no image is
            decoded, and a sample for which it is False is bad.
        profiles: whether images are converted to sRGB by their colour profiles.
        check: raises BadSample for a sample that the training cannot use; it runs in the workers.
    """

    def __init__(
        self, mixture: Mixture, *, rank: int = 0, world: int = 1, workers: int = 4, bad_share: float = 0.01,
        bad_samples: Path | None = None, captions: bool = True, one_reference: bool = False,
        known: Callable[[str, int], bool] | None = None, profiles: bool = True,
        check: Callable[[Sample], None] | None = None,
    ) -> None:  # fmt: skip
        mixture.batch_indices(0, rank, world)  # refuses ranks that do not divide the batch
        if workers < 0:
            raise InputError(f"workers: expected at least 0, got {workers}")
        if bad_samples is not None and world > 1:
            bad_samples = bad_samples.with_suffix(f".{rank}{bad_samples.suffix}")
        self.mixture, self.rank, self.world, self.workers = mixture, rank, world, workers
        self.captions, self.one_reference, self.known = captions, one_reference, known
        self.profiles, self.check = profiles, check
        self.bad_samples = BadSampleTracker(bad_share, bad_samples)
        for source in mixture.sources:
            for reason in source.damage:
                log.warning("%s: %s", source.name, reason)
                self.bad_samples.write((BadSampleRecord(source.name, source.name, "", reason),))

    def state(self, step: int) -> dict[str, str | int]:
        """State of the data for a checkpoint: the next step, and the fingerprint of the order."""
        return {"step": step, "data": self.mixture.fingerprint()}

    def resume(self, state: dict[str, str | int]) -> Iterator[LoaderBatch]:
        """The batches after a state.

        Raises:
            InputError: the state has other data, weights, batch or seed.
        """
        if state.get("data") != self.mixture.fingerprint():
            raise InputError("expected the data, weights, batch and seed that the run began with, got others")
        return self.batches(int(state["step"]))

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[LoaderBatch]:
        """The batches of steps start, start + 1, ... without end, or up to `stop`.

        Raises:
            InputError: too many bad samples, or a bad sample without good neighbours.
        """
        numbers = count(start) if stop is None else range(start, stop)
        if not self.workers:
            yield from (self._counted(self._build(step)) for step in numbers)
            return
        # The batch that is being read and the PREFETCH ones of each worker have a slot each.
        slots = self.workers * PREFETCH + 1
        check_shared_memory(_StepDataset.bytes_of(self, slots))
        steps = _StepDataset(self, slots)
        with any_number_of_workers():
            loaded = iter(DataLoader(
                steps, batch_size=None, sampler=numbers, num_workers=self.workers, prefetch_factor=PREFETCH,
                worker_init_fn=_begin_worker, generator=torch.Generator(),  # else it would use the training's own
            ))  # fmt: skip
        for batch in loaded:
            yield self._counted(batch if isinstance(batch, _Failure) else steps.fetch(batch))

    def _build(self, step: int) -> "LoaderBatch | _Failure":
        """Build the batch of a step in this process."""
        indices = self.mixture.batch_indices(step, self.rank, self.world)
        bad: list[BadSampleRecord] = []
        rows, replaced = [], 0
        try:
            for row in range(len(indices.slot)):
                before = len(bad)
                rows.append(self._row(indices, row, bad))
                replaced += len(bad) > before
        except InputError as error:
            return _Failure(str(error), tuple(bad))
        numbers, samples, images = zip(*rows, strict=True)
        sources = [self.mixture.sources[number] for number in indices.source]
        owners = [row for row, sample in enumerate(samples) for _ in sample.input_images]
        size = indices.size if self.known is None else (1, 1)
        return LoaderBatch(
            step, indices.kind, _stack([image for image, *_ in images], size),
            _stack([reference for _, *references in images for reference in references], size),
            torch.tensor(owners, dtype=torch.long), tuple(sample.text for sample in samples),
            tuple(sample.key for sample in samples), tuple(source.name for source in sources),
            tuple(zip((source.identity for source in sources), numbers, strict=True)), tuple(bad), replaced,
            tuple(sample.turns for sample in samples),
        )  # fmt: skip

    def _row(self, indices: BatchIndices, row: int, bad: list[BadSampleRecord]) -> tuple[int, Sample, list[np.ndarray]]:
        """A sample's number in its source, the sample, its image and references; the next good one replaces a bad one.

        Images are uint8 [H, W, 3], cropped to the bucket's size.
        """
        source = self.mixture.sources[int(indices.source[row])]
        tries = min(MAX_TRIES, max(MIN_TRIES, int(self.bad_samples.limit * len(source))), len(source) - 1)
        for neighbour in range(tries + 1):
            try:
                number = self.mixture.sample_index(indices, row, neighbour)
                sample = read_again(source, number)
                if self.captions and not sample.words:
                    raise BadSample(sample.key, sample.origin, "expected a caption, got none")
                if self.one_reference:
                    check_references(sample)
                if self.check is not None:
                    self.check(sample)
                if self.known is not None:
                    if not self.known(source.identity, number):
                        raise BadSample(sample.key, sample.origin, "expected its features in the cache, got none")
                    blank = np.zeros((1, 1, 3), np.uint8)
                    return number, sample, [blank] * (1 + len(sample.input_images))
                decoded = decode_images(sample, profiles=self.profiles)
                return number, sample, [np.asarray(to_size(image, *indices.size)) for image in decoded]
            except BadSample as error:
                bad.append(BadSampleRecord(source.name, error.origin, error.key, error.reason))
        raise InputError(
            f"expected a good sample among {tries + 1} neighbours in {source.name!r}, got none; the last one, "
            f"{bad[-1].key!r}: {bad[-1].reason}"
        )

    def _counted(self, batch: "LoaderBatch | _Failure") -> LoaderBatch:
        if isinstance(batch, _Failure):
            self.bad_samples.write(batch.bad)
            raise InputError(batch.message)
        self.bad_samples.count(len(batch.images), batch.bad, batch.replaced)
        return batch


def read_again(source: DataSource, number: int) -> Sample:
    """A sample of a source; a read that fails is tried again, since a network's file system may be away for a moment.

    Raises:
        BadSample: it cannot be read.
    """
    for attempt in range(READ_TRIES):
        try:
            return source.read(number)
        except OSError as error:
            if attempt == READ_TRIES - 1:
                raise BadSample(
                    f"number {number}", source.name,
                    f"cannot be read after {READ_TRIES} tries: {error.strerror or error}",
                ) from error
            time.sleep(READ_PAUSE)
    raise AssertionError


def check_shared_memory(wanted: int, folder: Path = SHARED_MEMORY) -> None:
    """Refuse workers whose batches would not fit into shared memory: writing beyond its end kills them.

    Raises:
        InputError: with what is there and the ways out.
    """
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise InputError(
            f"data.workers: expected {wanted / 2**20:.0f} MiB of shared memory for the workers' batches, got "
            f"{free / 2**20:.0f} MiB free in {folder}: give the container more (docker run --shm-size), or load in "
            "this process (--data.workers 0)"
        )


@dataclass(frozen=True)
class _Failure:
    """An InputError of a worker: raised there, its message would arrive wrapped in a traceback."""

    message: str
    bad: tuple[BadSampleRecord, ...]


def _begin_worker(_: int) -> None:
    """Leave signals to the training, which saves: one to the whole process group reaches its workers too.

    After SIGTERM a worker stays for WORKER_GRACE seconds and then leaves in peace: torch sends it as well, to workers
    of a training that failed, and a worker that dies by it would end the training in the middle of its save.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))


class _StepDataset(Dataset):
    """Step to batch in a worker, with the images in preallocated shared memory.

    By default each batch would get new shared memory, whose first access costs a twentieth of the decoding. Slot
    `step % slots` is free by then: the loader requests a step after it has read the one `slots` before it.
    """

    def __init__(self, loader: Loader, slots: int) -> None:
        self.loader = loader
        shape = (slots, self.bytes_of(loader, slots) // slots)
        self.memory = torch.empty(shape, dtype=torch.uint8).share_memory_()

    @staticmethod
    def bytes_of(loader: Loader, slots: int) -> int:
        """Shared memory that so many slots take."""
        sizes = loader.mixture.buckets if loader.known is None else [(1, 1)]
        pixels = max(width * height for width, height in sizes)
        return slots * (loader.mixture.batch // loader.world) * pixels * 3

    def __getitem__(self, step: int) -> "LoaderBatch | _Failure":
        batch = self.loader._build(step)
        if isinstance(batch, _Failure):
            return batch
        self._view(step, batch.images.shape).copy_(batch.images)
        count, _, height, width = batch.images.shape
        return replace(batch, images=torch.empty((count, 0, height, width), dtype=torch.uint8))

    def fetch(self, batch: LoaderBatch) -> LoaderBatch:
        """The batch with its images, copied from their slot."""
        return replace(batch, images=self._view(batch.step, batch.images.shape).clone())

    def _view(self, step: int, shape: Sequence[int]) -> Tensor:
        """View of a step's slot, channels last in memory."""
        count, _, height, width = shape
        flat = self.memory[step % len(self.memory), : count * height * width * 3]
        return flat.view(count, height, width, 3).permute(0, 3, 1, 2)


def _stack(images: list[np.ndarray], size: Size) -> Tensor:
    """Stack to uint8 [n, 3, H, W], channels last in memory: Pillow's layout, and the fastest for convolutions."""
    width, height = size
    stacked = np.array(images, np.uint8).reshape(-1, height, width, 3)  # also of no images
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)
