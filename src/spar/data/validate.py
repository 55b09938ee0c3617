"""Validation of a source: reads and decodes every sample, and reports what would disturb training."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

import numpy as np

from spar.common.progress import Advance
from spar.data.bad_samples import BadSampleRecord, decode_images
from spar.data.loader import read_again
from spar.data.processes import map_in_processes
from spar.data.samples import BadSample
from spar.data.sources import DataSource
from spar.processing.images import profile_of, read_header

NAMED = 100  # bad samples and duplicates listed in a report; all are counted
CHUNK = 1024  # samples of one task of a process
SIDES = (224, 448, 768, 1024)  # borders of the histogram of shorter sides, pixels
ASPECTS = (0.5, 0.75, 4 / 3, 2.0)  # borders of the histogram of width over height
_SIDE_NAMES = ("below 224", "224 to 447", "448 to 767", "768 to 1023", "1024 and more")
_ASPECT_NAMES = ("below 1:2", "1:2 to 3:4", "3:4 to 4:3", "4:3 to 2:1", "2:1 and above")
# Of a good sample: its number, the hashes of its image and of the whole sample, and the length of its caption.
_ROW = np.dtype([
    ("index", "i8"), ("image", "u8"), ("whole", "u8"), ("width", "i4"), ("height", "i4"), ("characters", "i4"),
])  # fmt: skip


@dataclass(frozen=True)
class ValidationReport:
    """Findings of one source.

    bad, duplicates: counts; `named_bad` and `named_duplicates` (key, key of the earlier one) have the first NAMED.
    A duplicate has the images and the text of an earlier sample; `repeated_pictures` counts samples with the image of
    an earlier one and another text. `profiles` counts the uses of colour profiles (spar.processing.color).
    `captions` (of dialogues: the longest text of each) has empty, too_long, and characters: shortest, median, longest.
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
    profiles: dict[str, int]
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


@dataclass(frozen=True)
class _Part:
    """Findings of some samples: `rows`, of _ROW, has the good ones."""

    rows: np.ndarray
    formats: Counter[str]
    profiles: Counter[str]
    bad: list[BadSampleRecord]


def validate(
    source: DataSource, *, limit: int | None = None, max_characters: int = 4096, workers: int = 4,
    progress: Advance | None = None,
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
    profiles: Counter[str] = Counter()
    rows = np.empty(len(wanted), _ROW)
    count, good = 0, 0
    chunks = [wanted[start : start + CHUNK] for start in range(0, len(wanted), CHUNK)]
    for part in map_in_processes(partial(_validate_part, source), chunks, workers):
        count += len(part.bad)
        bad += part.bad[: NAMED - len(bad)]
        formats += part.formats
        profiles += part.profiles
        rows[good : good + len(part.rows)] = part.rows
        good += len(part.rows)
        if progress:
            progress(good + count, len(wanted))
    rows = rows[:good]
    repeated, first = _repeated(rows["whole"])
    pairs = zip(rows["index"][repeated[:NAMED]].tolist(), rows["index"][first[:NAMED]].tolist(), strict=True)
    named = [(read_again(source, one).key, read_again(source, other).key) for one, other in pairs]
    files = len(getattr(source, "shards", ())) or len(getattr(source, "files", ()))
    note = (f"{files} files for {workers} workers: fine here, as samples are assigned one by one; loaders that "
            "assign whole shards would fail or be idle")  # fmt: skip
    return ValidationReport(
        name=source.name, format=source.format, kind=source.kind, files=files, samples=len(source),
        checked=len(wanted), bad=count, named_bad=tuple(bad), duplicates=len(repeated), named_duplicates=tuple(named),
        repeated_pictures=len(_repeated(rows["image"])[0]) - len(repeated),
        captions=_captions(rows["characters"], max_characters, source.captioned), formats=dict(formats.most_common()),
        profiles=dict(profiles.most_common()),
        shorter_sides=_histogram(np.minimum(rows["width"], rows["height"]), SIDES, _SIDE_NAMES),
        aspects=_histogram(rows["width"] / rows["height"], ASPECTS, _ASPECT_NAMES),
        skipped=dict(source.skipped), damage=source.damage, notes=(note,) if 0 < files < workers else (),
    )  # fmt: skip


def _validate_part(source: DataSource, wanted: np.ndarray) -> _Part:
    rows, formats, profiles, bad = [], Counter[str](), Counter[str](), []
    for index in wanted.tolist():
        try:
            sample = read_again(source, index)
            image, *_ = decode_images(sample)
        except BadSample as error:
            bad.append(BadSampleRecord(source.name, error.origin, error.key, error.reason))
            continue
        whole = _hash(sample.words.encode(), sample.image, *sample.input_images)
        longest = max(map(len, (sample.text, *(text for turn in sample.turns for text in turn))))
        rows.append((index, _hash(sample.image), whole, *image.size, longest))
        formats[read_header(sample.image).format] += 1
        profiles[profile_of(sample.image)] += 1
    return _Part(np.array(rows, _ROW), formats, profiles, bad)


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


def _histogram(values: np.ndarray, borders: tuple[float, ...], names: tuple[str, ...]) -> dict[str, int]:
    counts = np.bincount(np.searchsorted(borders, values, side="right"), minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}
