"""Tar shards as a source: text-to-image, edit pairs and ImageNet; samples are read by offset in any order."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from spar.common.errors import InputError
from spar.common.limits import MAX_TEXT_BYTES
from spar.data.captions import caption_in_json, clean_caption, decode_caption
from spar.data.processes import map_in_processes
from spar.data.remote import ByteReader, DataFile, RemoteFile, open_reader
from spar.data.samples import BadSample, Kind, Sample, count_reason
from spar.data.tar_index import CLS, IMAGE, INPUT, JSON, TXT, TarIndex, cached_index
from spar.processing.images import MAX_BYTES

OPEN_SHARDS = 128  # twice the blocks that are mixed at a time: a shard is opened about once per window


class TarSource:
    """Samples of tar shards. `kind` is that of the first sample; samples of the other kind are bad.

    With a cache folder the shards' indexes stay on disk, and only those of open shards are in memory.

    Raises:
        InputError: a shard is not a tar, or there are no samples.
    """

    def __init__(self, name: str, shards: Sequence[DataFile], cache: Path | None = None, workers: int = 1) -> None:
        self.name, self.shards, self.cache = name, [*shards], cache
        self.kind: Kind = "text_to_image"
        self.format = "webdataset"
        self.skipped: dict[str, int] = {}
        counts, sizes, damage, digest = [0], [], [], hashlib.sha256()
        self._kept: list[TarIndex] = []
        # They come one by one, so that cached ones need not be in memory together.
        indexes = map_in_processes(partial(cached_index, cache=cache), self.shards, workers)
        for shard, index in zip(self.shards, indexes, strict=True):
            if len(index) and not sum(counts):
                first = {role for role, _, _ in index.members(0)}
                self.kind = "edit" if INPUT in first else "text_to_image"
                self.format = "imagenet" if CLS in first else "webdataset"
            counts.append(len(index))
            sizes.append(index.sizes)
            damage += [f"{shard.name!r} {index.damage}"] if index.damage else []
            digest.update(index.digest().encode())
            for reason, count in index.skipped.items():
                count_reason(self.skipped, reason, count)
            self._kept += [] if cache else [index]
        self.captioned = self.format != "imagenet"
        self.starts = np.cumsum(counts, dtype=np.int64)
        if not len(self):
            passed = [f"{count} members skipped ({reason})" for reason, count in self.skipped.items()]
            reasons = "".join(f"; {reason}" for reason in (*passed, *damage[:3]))
            raise InputError(f"expected samples of png, jpg, jpeg or webp in {name!r}, found none{reasons}")
        self._sizes, self.damage, self.identity = np.concatenate(sizes), tuple(damage), digest.hexdigest()
        self._open: OrderedDict[int, tuple[ByteReader, TarIndex]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}  # a worker opens files of its own

    def __del__(self) -> None:
        for file, _ in self.__dict__.get("_open", {}).values():
            file.close()

    def sizes(self) -> np.ndarray:
        """uint16 [N, 2]: width and height of each sample's image, 0 if its header cannot be read."""
        return self._sizes

    def read(self, index: int) -> Sample:
        """Read a sample, images as stored.

        Raises:
            BadSample: a member is missing, too large or unreadable.
        """
        shard, origin, place = self._find(index)
        file, table = self._opened(shard)
        key = table.keys[place]
        found: dict[int, list[bytes]] = {}
        for role, offset, size in table.members(place):
            cap = MAX_BYTES if role in (IMAGE, INPUT) else MAX_TEXT_BYTES
            if size > cap:
                raise BadSample(key, origin, f"expected members of at most {cap} bytes, got one of {size}")
            data = file.pread(size, offset)
            if len(data) < size:
                raise BadSample(key, origin, f"expected a member of {size} bytes, but the shard ends after {len(data)}")
            found.setdefault(role, []).append(data)
        if IMAGE not in found:
            raise BadSample(key, origin, "expected an image (jpg, jpeg, png, webp), found none")
        if (INPUT in found) != (self.kind == "edit"):
            wanted = "an edit with an input image" if self.kind == "edit" else "an image without references"
            raise BadSample(key, origin, f"expected {wanted}, as the first sample is, got the other")
        try:
            text = clean_caption(_caption(found), key, origin)
            label = int(found[CLS][0]) if CLS in found and self.kind != "edit" else None
            return Sample(found[IMAGE][0], text, key, origin, label, tuple(found.get(INPUT, ())))
        except BadSample:
            raise
        except (ValueError, RecursionError) as error:  # not UTF-8, JSON or a number
            raise BadSample(key, origin, f"its text cannot be read: {error}") from error

    def _find(self, index: int) -> tuple[int, str, int]:
        """(shard, its name, place in it)."""
        if not 0 <= index < len(self):
            raise IndexError(f"expected 0 to {len(self) - 1}, got {index}")
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, self.shards[shard].name, index - int(self.starts[shard])

    def _opened(self, shard: int) -> tuple[ByteReader, TarIndex]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        table = self._kept[shard] if self._kept else cached_index(self.shards[shard], self.cache)
        if len(table) != self.starts[shard + 1] - self.starts[shard]:
            raise InputError(f"the shard {str(self.shards[shard])!r} changed while it was read")
        try:
            self._open[shard] = (open_reader(self.shards[shard]), table)
        except OSError as error:
            if isinstance(self.shards[shard], RemoteFile):  # it may be back in a moment
                raise
            raise InputError(f"the shard {str(self.shards[shard])!r} is gone: {error.strerror or error}") from error
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1][0].close()
        return self._open[shard]


def _caption(found: dict[int, list[bytes]]) -> str:
    """The text member, or the caption of the json member; empty if neither has text."""
    text = decode_caption(found[TXT][0]) if TXT in found else ""
    return caption_in_json(found[JSON][0]) if JSON in found and not text.removeprefix("\ufeff").strip() else text
