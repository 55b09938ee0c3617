"""Conversion of any source to webdataset shards: `%06d.tar`, keys `%08d`, members as in GPT-Image-Edit's conversion.

Images are decoded to check them, and their bytes are copied unchanged, with the extension of their true format. The
same samples give the same bytes.
"""

import bisect
import io
import itertools
import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from spar.common.config import write_json
from spar.common.errors import InputError
from spar.common.process_group import ONE_PROCESS, ProcessGroup
from spar.common.progress import Advance
from spar.data.bad_samples import BadSampleRecord, BadSampleTracker, decode_images
from spar.data.loader import read_again
from spar.data.samples import BadSample, Sample
from spar.data.sources import DataSource
from spar.processing.images import read_header

MANIFEST, DROPPED = "converted.json", "dropped.jsonl"
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


log = logging.getLogger("spar.data")


@dataclass(frozen=True)
class ConversionResult:
    """Numbers of written samples and shards, and of dropped samples; DROPPED lists these, and the damage of shards."""

    samples: int
    shards: int
    dropped: int


def convert(
    sources: Sequence[DataSource], folder: Path, *, shard: int = 10_000, bad_share: float = 0.01,
    progress: Advance | None = None, group: ProcessGroup = ONE_PROCESS,
) -> ConversionResult:  # fmt: skip
    """Write the good samples of sources of one kind, in order, into an empty folder.

    Several processes read each sample twice: first each its share, to know the bad ones, then those of its shards.

    Raises:
        InputError: sources of two kinds or of dialogues, no good samples, or a share of bad samples above `bad_share`.
    """
    kinds = {source.kind for source in sources}
    if len(kinds) != 1:
        raise InputError(f"expected sources of one kind, got {' and '.join(sorted(kinds)) or 'none'}")
    if kinds == {"dialogue"}:
        raise InputError("expected captions or edits, which the shards have members for, got dialogues")
    if shard < 1:
        raise InputError(f"samples of a shard: expected at least 1, got {shard}")
    bad_samples = BadSampleTracker(bad_share)
    damage = [BadSampleRecord(source.name, source.name, "", reason) for source in sources for reason in source.damage]
    for one in damage if group.main else ():
        log.warning("%s: %s", one.source, one.reason)
    if group.world == 1:
        written = _write_shards(folder, _good(sources, bad_samples, progress), shard)
    else:
        written = _write_shares(sources, folder, bad_samples, shard, group, progress)
    if not written:
        last = next(reversed(bad_samples.named)).reason
        raise InputError(f"expected good samples, but all {bad_samples.seen} are bad, the last one: {last}")
    done = ConversionResult(written, -(-written // shard), bad_samples.bad)
    if not group.main:
        return done
    if named := [*damage, *bad_samples.named]:
        lines = [json.dumps(asdict(bad)) + "\n" for bad in named]
        (folder / DROPPED).write_text("".join(lines), encoding="utf-8")
    names = [{"name": source.name, "format": source.format, "identity": source.identity} for source in sources]
    write_json(folder / MANIFEST, {"kind": kinds.pop(), **vars(done), "samples_of_a_shard": shard, "sources": names})
    return done


def _write_shards(folder: Path, good: Iterator[list[tuple[str, bytes]]], shard: int, written: int = 0) -> int:
    """Write samples as shards, the first with the number `written`; the number after the last."""
    for first in good:
        with tarfile.open(folder / f"{written // shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as out:
            for members in itertools.chain([first], itertools.islice(good, shard - 1)):
                for extension, data in members:
                    info = tarfile.TarInfo(f"{written:08d}.{extension}")
                    info.size = len(data)
                    out.addfile(info, io.BytesIO(data))
                written += 1
    return written


def _write_shares(
    sources: Sequence[DataSource], folder: Path, bad_samples: BadSampleTracker, shard: int, group: ProcessGroup,
    progress: Advance | None,
) -> int:  # fmt: skip
    """Write this process's share of the shards; the number of good samples of all."""
    starts = [0, *itertools.accumulate(map(len, sources))]  # a sample's number in all is its source's start and its own

    def members(number: int) -> list[tuple[str, bytes]]:
        source = bisect.bisect_right(starts, number) - 1
        return _members(read_again(sources[source], number - starts[source]))

    own, found = group.share(range(starts[-1])), dict[int, BadSampleRecord]()
    for done, number in enumerate(own, 1):
        try:
            members(number)
        except BadSample as error:
            source = sources[bisect.bisect_right(starts, number) - 1]
            found[number] = BadSampleRecord(source.name, error.origin, error.key, error.reason)
        if progress:
            progress(done, len(own))
    bad = dict(sorted(itertools.chain.from_iterable(map(dict.items, group.gather_objects(found)))))
    bad_samples.count(starts[-1], tuple(bad.values()))
    good = np.setdiff1d(np.arange(starts[-1]), np.fromiter(bad, np.int64), assume_unique=True)
    for start in group.share(range(0, len(good), shard)):
        try:
            _write_shards(folder, map(members, good[start : start + shard].tolist()), shard, start)
        except BadSample as error:
            raise InputError(f"a sample that was good is bad now, on its second reading: {error}") from error
    group.barrier()
    return len(good)


def _good(
    sources: Sequence[DataSource], bad_samples: BadSampleTracker, progress: Advance | None
) -> Iterator[list[tuple[str, bytes]]]:
    """Yield the members (extension, data) of each good sample; bad ones are counted and logged."""
    total = sum(len(source) for source in sources)
    for source in sources:
        for index in range(len(source)):
            bad: tuple[BadSampleRecord, ...] = ()
            try:
                yield _members(read_again(source, index))
            except BadSample as error:
                bad = (BadSampleRecord(source.name, error.origin, error.key, error.reason),)
            bad_samples.count(1, bad)
            if progress:
                progress(bad_samples.seen, total)


def _members(sample: Sample) -> list[tuple[str, bytes]]:
    """(extension, data) of a sample's members, in their order in the tar."""
    decode_images(sample)
    several = len(sample.input_images) > 1
    images = [(f"input_{number}." if several else "input.", data) for number, data in enumerate(sample.input_images)]
    images.append(("output." if images else "", sample.image))
    members = [(name + EXTENSIONS[read_header(data).format], data) for name, data in images]
    if sample.text:
        members.append(("txt", sample.text.encode()))
    if sample.label is not None:
        members.append(("cls", str(sample.label).encode()))
    return members
