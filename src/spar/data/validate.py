"""Validation of a source: reads and decodes every sample, and reports what would disturb training."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b

import numpy as np

from spar.common.errors import InputError
from spar.data.bad_samples import BadSampleRecord
from spar.data.samples import BadSample, EditSample
from spar.data.sources import DataSource
from spar.processing.images import open_training_image, read_header

NAMED = 100  # bad samples and duplicates listed in a report; all are counted
CHUNK = 1024  # samples of one task of a process
SIDES = (224, 448, 768, 1024)  # borders of the histogram of shorter sides, pixels
ASPECTS = (0.5, 0.75, 4 / 3, 2.0)  # borders of the histogram of width over height
_ASPECT_NAMES = ("below 1:2", "1:2 to 3:4", "3:4 to 4:3", "4:3 to 2:1", "2:1 and above")
_COLUMNS = {"indices": "i8", "images": "u8", "wholes": "u8", "sizes": "i4", "characters": "i4"}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ValidationReport:
    """Findings of one source.

    bad, duplicates: counts; `named_bad` and `named_duplicates` (key, key of the earlier one) have the first NAMED.
    A duplicate has the images and the text of an earlier sample; `repeated_pictures` counts samples with the image of
    an earlier one and another text. `captions` has empty, too_long, and characters: shortest, median, longest.
    """

    name: str
    format: str
    kind: str
    files: int
    samples: int
    checked: int
    bad: int
    named_bad: tuple[BadSampleRecord, ...]
    duplicates: int
    named_duplicates: tuple[tuple[str, str], ...]
    repeated_pictures: int
    captions: dict[str, int]
    formats: dict[str, int]
    shorter_sides: dict[str, int]
    aspects: dict[str, int]
    skipped: dict[str, int]
    damage: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def wrong(self) -> tuple[str, ...]:
        """One line per fault; empty if the data are fit for training."""
        unsafe = self.skipped.get("name leaves the folder", 0)
        found = {
            "bad samples": self.bad, "duplicates": self.duplicates, "empty captions": self.captions["empty"],
            "captions too long": self.captions["too_long"], "members whose name leaves the folder": unsafe,
        }  # fmt: skip
        return (*(f"{count} {what}" for what, count in found.items() if count), *self.damage)


@dataclass
class _Part:
    """Findings of some samples: per good sample the hashes of its image and of the whole sample, uint64; width and
    height; characters of its caption.
    """

    indices: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    wholes: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    formats: Counter = field(default_factory=Counter)
    bad: list[BadSampleRecord] = field(default_factory=list)


def validate(
    source: DataSource, *, limit: int | None = None, max_characters: int = 4096, workers: int = 4,
    progress: Progress | None = None,
) -> ValidationReport:  # fmt: skip
    """Check every sample of a source, or `limit` of them, evenly spread.

    Args:
        max_characters: longest caption.
        workers: processes that decode; fewer shards than workers are reported.
    """
    wanted = np.arange(len(source))
    if limit is not None and limit < len(source):
        wanted = np.linspace(0, len(source) - 1, limit).round().astype(np.int64)
    bad: list[BadSampleRecord] = []
    formats: Counter[str] = Counter()
    columns: dict[str, list[np.ndarray]] = {}
    count, done = 0, 0
    for part in _parts(source, wanted, workers):
        count += len(part.bad)
        bad += part.bad[: NAMED - len(bad)]
        formats += part.formats
        done += len(part.bad) + len(part.indices)
        for name, dtype in _COLUMNS.items():
            columns.setdefault(name, []).append(np.array(getattr(part, name), dtype))
        if progress:
            progress(done, len(wanted))
    indices, images, wholes, characters = (
        np.concatenate(columns[name]) for name in ("indices", "images", "wholes", "characters")
    )
    sizes = np.concatenate([part.reshape(-1, 2) for part in columns["sizes"]])
    repeated, first = _repeated(wholes)
    named = [(source.key(int(indices[one])), source.key(int(indices[other]))) for one, other in
             zip(repeated[:NAMED], first[:NAMED], strict=True)]  # fmt: skip
    files = len(getattr(source, "shards", ())) or len(getattr(source, "files", ()))
    notes: tuple[str, ...] = ()
    if 0 < files < workers:
        notes = (f"{files} files for {workers} workers: fine here, as samples are assigned one by one; loaders that "
                 "assign whole shards would fail or be idle",)  # fmt: skip
    needs_words = source.format != "imagenet"
    return ValidationReport(
        name=source.name, format=source.format, kind=source.kind, files=files, samples=len(source),
        checked=len(wanted), bad=count, named_bad=tuple(bad), duplicates=len(repeated), named_duplicates=tuple(named),
        repeated_pictures=len(_repeated(images)[0]) - len(repeated),
        captions=_captions(characters, max_characters, needs_words), formats=dict(formats.most_common()),
        shorter_sides=_histogram(sizes.min(axis=1, initial=2**30), SIDES, _side_names()),
        aspects=_histogram(sizes[:, 0] / np.maximum(sizes[:, 1], 1), ASPECTS, _ASPECT_NAMES),
        skipped=dict(source.skipped), damage=source.damage, notes=notes,
    )  # fmt: skip


def _parts(source: DataSource, wanted: np.ndarray, workers: int) -> Iterator[_Part]:
    chunks = [wanted[start : start + CHUNK] for start in range(0, len(wanted), CHUNK)]
    if min(workers, len(chunks)) < 2:
        yield from (_validate_part(source, chunk) for chunk in chunks)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(partial(_validate_part, source), chunks)


def _validate_part(source: DataSource, wanted: np.ndarray) -> _Part:
    part = _Part()
    for index in wanted.tolist():
        try:
            sample = source.read(index)
            references = sample.input_images if isinstance(sample, EditSample) else ()
            try:
                image, *_ = [open_training_image(data) for data in (sample.image, *references)]
            except InputError as error:
                raise BadSample(sample.key, sample.origin, str(error)) from error
        except BadSample as error:
            part.bad.append(BadSampleRecord(source.name, error.origin, error.key, error.reason))
            continue
        part.indices.append(index)
        part.images.append(_hash(sample.image))
        part.wholes.append(_hash(sample.text.encode("utf-8", "replace"), sample.image, *references))
        part.sizes.append(image.size)
        part.characters.append(len(sample.text))
        part.formats[read_header(sample.image).format] += 1
    return part


def _hash(*parts: bytes) -> int:
    """Hash to 64 bits: among 27 million different samples a collision has a probability of 2e-5."""
    found = blake2b(digest_size=8)
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(found.digest(), "little")


def _repeated(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of values that occurred before, and the index of each one's first occurrence."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    earliest = first[inverse]
    repeated = np.flatnonzero(earliest != np.arange(len(hashes)))
    return repeated, earliest[repeated]


def _captions(characters: np.ndarray, longest: int, needed: bool) -> dict[str, int]:
    present = characters[characters > 0]
    low, middle, high = (int(value) for value in np.quantile(present, (0, 0.5, 1))) if len(present) else (0, 0, 0)
    empty = int((characters == 0).sum()) if needed else 0
    return {"empty": empty, "too_long": int((characters > longest).sum()), "shortest": low, "median": middle,
            "longest": high}  # fmt: skip


def _side_names() -> tuple[str, ...]:
    between = (f"{low} to {high - 1}" for low, high in itertools.pairwise(SIDES))
    return (f"below {SIDES[0]}", *between, f"{SIDES[-1]} and more")


def _histogram(values: np.ndarray, borders: tuple[float, ...], names: tuple[str, ...]) -> dict[str, int]:
    counts = np.bincount(np.searchsorted(borders, values, side="right"), minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}
