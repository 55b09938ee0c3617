"""The index of one tar shard: offset and size of each member of each sample, from one pass over the headers.

Members are then read by offset. Nothing is extracted or unpickled: the extension gives a member's role, from a list of
known ones, and all others are skipped. Keys are as in webdataset: the extension is everything after the first dot of
the base name, and folders belong to the key.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spar.common.errors import InputError
from spar.common.files import atomic_file
from spar.common.limits import MAX_EXTENDED_HEADER, MAX_INPUT_IMAGES, MAX_MEMBERS
from spar.data.samples import is_safe_path
from spar.data.string_array import StringArray
from spar.processing.images import MAX_BYTES, read_header

IMAGE, INPUT, TXT, JSON, CLS = range(5)
VERSION = 1
HEADER_BYTES = 2**16  # of an image: nearly always enough to contain its size

_BLOCK = 512
_IMAGE_EXTENSION = re.compile(r"(?:output\.|(input)(?:_(\d{1,4}))?\.)?(?:jpg|jpeg|png|webp)")
_TEXTS = {"txt": TXT, "json": JSON, "cls": CLS}
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_WITHOUT_DATA = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip
_COLUMNS = ("keys", "key_ends", "first", "role", "number", "offset", "size", "sizes")


@dataclass(frozen=True)
class TarIndex:
    """N samples of M members; those of a sample are adjacent, references in order.

    keys [N]; first uint32 [N + 1]: a sample's members are first[i] to first[i + 1]; role, number uint8 [M] (number
    counts references); offset uint64, size uint32 [M], in bytes; sizes uint16 [N, 2]: width and height of the upright
    image, 0 if its header cannot be read. `skipped` counts unread members by reason, `damage` is the reason why the
    pass ended early.
    """

    keys: StringArray
    first: np.ndarray
    role: np.ndarray
    number: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    sizes: np.ndarray
    skipped: dict[str, int]
    damage: str

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, index: int) -> list[tuple[int, int, int]]:
        """(role, offset, size) of a sample's members."""
        span = slice(int(self.first[index]), int(self.first[index + 1]))
        return [*zip(self.role[span].tolist(), self.offset[span].tolist(), self.size[span].tolist(), strict=True)]

    def columns(self) -> dict[str, np.ndarray]:
        own = {"keys": self.keys.blob, "key_ends": self.keys.ends}
        return own | {name: getattr(self, name) for name in _COLUMNS[2:]}

    def digest(self) -> str:
        """Hash of the index; the same on every machine."""
        found = hashlib.sha256()
        for name, column in self.columns().items():
            found.update(f"{name} {column.shape}".encode() + np.ascontiguousarray(column).tobytes())
        return found.hexdigest()


def role_of(name: str) -> tuple[str, int, int] | str:
    """(key, role, number) of a member's name, or the reason why the member is not read."""
    if not is_safe_path(name):
        return "name leaves the folder"
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    key, extension = (f"{folder}/{stem}" if folder else stem), extension.lower()
    if extension in _TEXTS:
        return key, _TEXTS[extension], 0
    if not (match := _IMAGE_EXTENSION.fullmatch(extension)):
        return f".{extension}"
    number = int(match[2] or 0)
    if number >= MAX_INPUT_IMAGES:
        return f"more than {MAX_INPUT_IMAGES} references"
    return key, INPUT if match[1] else IMAGE, number


def index_tar(path: Path) -> TarIndex:
    """Index a tar in one pass over its headers and the header of each image.

    Raises:
        InputError: the file cannot be read, is compressed or not a tar, or has too many members.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return _index(file.fileno(), path.name)
    except OSError as error:
        raise InputError(f"expected a tar shard, but {str(path)!r}: {error.strerror or error}") from error


def _index(descriptor: int, name: str) -> TarIndex:
    skipped: dict[str, int] = {}
    samples: dict[str, dict[tuple[int, int], tuple[int, int]]] = {}
    damage, count = "", 0
    try:
        for member, offset, size in _members(descriptor):
            count += 1
            if count > MAX_MEMBERS:
                raise InputError(f"expected at most {MAX_MEMBERS} members in a tar, got more in {name!r}")
            found = role_of(member) if offset else "no regular file"
            if not isinstance(found, str):
                key, place = found[0], found[1:]
                roles = samples.setdefault(key, {})
                if place not in roles:
                    roles[place] = (offset, size)
                    continue
                found = "a second of its kind in one sample"
            skipped[found] = skipped.get(found, 0) + 1
    except _Damaged as error:
        damage = str(error)
        if not count:
            raise InputError(f"expected an uncompressed tar shard, but {name!r}: {damage}") from None
    rows = [(place, *where) for roles in samples.values() for place, where in sorted(roles.items())]
    counts = [len(roles) for roles in samples.values()]
    values = [(role, number, offset, min(size, 2**32 - 1)) for (role, number), offset, size in rows]
    column = np.array(values, np.uint64).reshape(-1, 4)
    places = [roles.get((IMAGE, 0)) for roles in samples.values()]
    sizes = [_image_size(descriptor, *where) if where else (0, 0) for where in places]
    return TarIndex(
        StringArray.of(samples), np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32),
        column[:, 0].astype(np.uint8), column[:, 1].astype(np.uint8), column[:, 2].copy(),
        column[:, 3].astype(np.uint32), np.array(sizes, np.uint16).reshape(-1, 2), skipped, damage,
    )  # fmt: skip


class _Damaged(Exception):
    """The tar ends early or has an invalid header."""


def _members(descriptor: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the data, bytes) of every member; offset 0 if it is not a regular file."""
    end, position = os.fstat(descriptor).st_size, 0
    longer: dict[str, str] = {}
    while block := os.pread(descriptor, _BLOCK, position):
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if not any(block):
                return
            if not position and block.startswith(_COMPRESSED):
                raise _Damaged("is compressed; decompress it, as members are read by offset") from None
            raise _Damaged(f"breaks at byte {position}: {error}") from None
        data, size = position + _BLOCK, info.size
        if info.type in _EXTENDED:
            if not 0 <= size <= MAX_EXTENDED_HEADER:
                raise _Damaged(f"breaks at byte {position}: an extended header of {size} bytes")
            record = os.pread(descriptor, size, data)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                longer["path"] = _text(record.rstrip(b"\0"))
            elif info.type == tarfile.XHDTYPE:
                longer |= _pax(record)
        else:
            size = int(longer.get("size", size)) if longer.get("size", "0").isdecimal() else -1
            if info.type == tarfile.GNUTYPE_SPARSE or any(name.startswith("GNU.sparse") for name in longer):
                raise _Damaged(f"breaks at byte {position}: a sparse member")
            size = 0 if info.type in _WITHOUT_DATA else size
            if size < 0 or data + size > end:
                raise _Damaged(f"is truncated: {longer.get('path', info.name)!r} at byte {position} is not complete")
            if not info.isdir():
                yield longer.get("path", info.name), data if info.isreg() else 0, size
            longer = {}
        position = data + -(-size // _BLOCK) * _BLOCK
    raise _Damaged(f"is truncated: it ends at byte {end} without the empty block that ends a tar")


def _pax(record: bytes) -> dict[str, str]:
    r"""Parse consecutive records `length key=value\n`; invalid ones are dropped."""
    found = {}
    while match := re.match(rb"(\d{1,7}) ([^=]+)=", record):
        length = int(match[1])
        if length <= match.end():
            break
        found[_text(match[2])] = _text(record[match.end() : length - 1])
        record = record[length:]
    return found


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _image_size(descriptor: int, offset: int, size: int) -> tuple[int, int]:
    """Width and height of an upright image, at most 65535 each; (0, 0) if the header cannot be read."""
    for length in (min(size, HEADER_BYTES), size):  # a large profile may precede a JPEG's size
        try:
            header = read_header(os.pread(descriptor, min(length, MAX_BYTES + 1), offset))
            return min(header.width, 65535), min(header.height, 65535)
        except InputError:
            continue
    return 0, 0


def cached_index(path: Path, cache: Path | None) -> TarIndex:
    """The index of a shard, from the cache folder if the shard's size and time are unchanged."""
    if cache is None:
        return index_tar(path)
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"expected a tar shard, but {str(path)!r}: {error.strerror or error}") from error
    stamp = {"version": str(VERSION), "bytes": str(status.st_size), "mtime_ns": str(status.st_mtime_ns)}
    digest = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:24]
    file = cache / f"{digest}.index.safetensors"
    if (index := _load(file, stamp)) is None:
        index = index_tar(path)
        _save(file, index, stamp)
    return index


def _load(file: Path, stamp: dict[str, str]) -> TarIndex | None:
    """Load an index; None if it is missing, damaged or has another stamp."""
    try:
        with safe_open(file, framework="numpy") as stored:
            metadata = stored.metadata() or {}
            if any(metadata.get(name) != value for name, value in stamp.items()):
                return None
            column = {name: stored.get_tensor(name) for name in _COLUMNS}
            keys = StringArray(column.pop("keys"), column.pop("key_ends"))
            return TarIndex(keys, **column, skipped=json.loads(metadata["skipped"]), damage=metadata["damage"])
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def _save(file: Path, index: TarIndex, stamp: dict[str, str]) -> None:
    """Write to a temporary file and rename it, so that ranks that index the same shard do not conflict."""
    metadata = stamp | {"skipped": json.dumps(index.skipped), "damage": index.damage}
    columns = {name: np.ascontiguousarray(column) for name, column in index.columns().items()}
    try:
        with atomic_file(file) as temporary:
            save_file(columns, temporary, metadata)
    except OSError as error:
        raise InputError(f"cache: {str(file.parent)!r} cannot be written: {error.strerror or error}") from error
