"""The index of one tar shard: offset and size of each member of each sample, from one pass over the headers.

Members are then read by offset. Nothing is extracted or unpickled: the extension gives a member's role, from a list of
known ones, and all others are skipped. Keys are as in webdataset: the extension is everything after the first dot of
the base name, and folders belong to the key.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spar.common.errors import InputError
from spar.common.limits import MAX_EXTENDED_HEADER, MAX_INPUT_IMAGES, MAX_MEMBERS
from spar.data.index_cache import Arrays, Texts, cached_arrays, upright_size
from spar.data.remote import ByteReader, DataFile, RemoteFile, address_of, open_reader, stamp_of
from spar.data.samples import count_reason, is_safe_path
from spar.data.string_array import StringArray

IMAGE, INPUT, TXT, JSON, CLS = range(5)
VERSION = 2

_BLOCK = 512
_RECORD = 20 * _BLOCK  # a tar is filled with zeros to a multiple of this
_SCANNED = 2**20  # bytes of zeros that are read at a time
_IMAGE_EXTENSION = re.compile(r"(?:output\.|(input)(?:_(\d{1,4}))?\.)?(?:jpg|jpeg|png|webp)")
_LONGEST_EXTENSION = 16
_TEXTS = {"txt": TXT, "json": JSON, "cls": CLS}
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_WITHOUT_DATA = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip
_MEMBER = {"role": "u1", "number": "u1", "offset": "u8", "size": "u4"}


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
        keys = {"keys": self.keys.blob, "key_ends": self.keys.ends}
        return keys | {name: getattr(self, name) for name in ("first", *_MEMBER, "sizes")}

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
    folder, _, base = name.replace("\\", "/").removeprefix("./").rpartition("/")
    if base.startswith("._"):
        return "._ files of macOS"
    stem, _, extension = base.partition(".")
    key, extension = (f"{folder}/{stem}" if folder else stem), extension.lower()
    if extension in _TEXTS:
        return key, _TEXTS[extension], 0
    if not (match := _IMAGE_EXTENSION.fullmatch(extension)):
        last = extension.rpartition(".")[2]
        if last != extension and (last in _TEXTS or _IMAGE_EXTENSION.fullmatch(last)):
            return "several dots in the name, whose extension begins at the first"
        return f".{extension}" if len(extension) <= _LONGEST_EXTENSION else "another extension"
    number = int(match[2] or 0)
    if number >= MAX_INPUT_IMAGES:
        return f"more than {MAX_INPUT_IMAGES} references"
    return key, INPUT if match[1] else IMAGE, number


def index_tar(path: DataFile) -> TarIndex:
    """Index a tar in one pass over its headers and the header of each image.

    Raises:
        InputError: the file cannot be read, is compressed or not a tar, or has too many members.
    """
    try:
        with closing(open_reader(path, whole=True)) as file:
            return _index(file, path.name)
    except OSError as error:
        if isinstance(path, RemoteFile):  # it may be back in a moment
            raise
        raise InputError(f"expected a tar shard, but {str(path)!r}: {error.strerror or error}") from error


def _index(file: ByteReader, name: str) -> TarIndex:
    skipped: dict[str, int] = {}
    samples: dict[str, dict[tuple[int, int], tuple[int, int]]] = {}
    shapes: dict[str, tuple[int, int]] = {}  # read as the pass comes by: elsewhere bytes are fetched once
    damage, count = "", 0
    try:
        for member, offset, size in _members(file):
            count += 1
            if count > MAX_MEMBERS:
                raise InputError(f"expected at most {MAX_MEMBERS} members in a tar, got more in {name!r}")
            found = role_of(member) if offset else "no regular file"
            if not isinstance(found, str):
                key, place = found[0], found[1:]
                roles = samples.setdefault(key, {})
                if place not in roles:
                    roles[place] = (offset, size)
                    if place == (IMAGE, 0):
                        shapes[key] = _image_size(file, offset, size)
                    continue
                found = "a second of its kind in one sample"
            count_reason(skipped, found)
    except _Damaged as error:
        damage = str(error)
        if not count:
            raise InputError(f"expected an uncompressed tar shard, but {name!r}: {damage}") from None
    members = np.array([
        (*place, offset, min(size, 2**32 - 1))
        for roles in samples.values() for place, (offset, size) in sorted(roles.items())
    ], [*_MEMBER.items()])  # fmt: skip
    first = np.cumsum([0, *map(len, samples.values())]).astype(np.uint32)
    sizes = [shapes.get(key, (0, 0)) for key in samples]
    return TarIndex(
        StringArray.of(samples), first, **{name: members[name].copy() for name in _MEMBER},
        sizes=np.array(sizes, np.uint16).reshape(-1, 2), skipped=skipped, damage=damage,
    )  # fmt: skip


def _image_size(file: ByteReader, offset: int, size: int) -> tuple[int, int]:
    def read(start: int, length: int) -> bytes:
        start = start if start >= 0 else max(0, size + start)
        return file.pread(min(length, size - start), offset + start)

    return upright_size(read)


class _Damaged(Exception):
    """The tar ends early or has an invalid header."""


def _members(file: ByteReader) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the data, bytes) of every member; offset 0 if it is not a regular file."""
    end, position = file.size, 0
    longer: dict[str, str] = {}
    while block := file.pread(_BLOCK, position):
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if not any(block):
                return _check_end(file, position, end)
            if not position and block.startswith(_COMPRESSED):
                raise _Damaged("is compressed; decompress it, as members are read by offset") from None
            raise _Damaged(f"breaks at byte {position}: {error}") from None
        data, size = position + _BLOCK, info.size
        if info.type in _EXTENDED:
            if not 0 <= size <= MAX_EXTENDED_HEADER:
                raise _Damaged(f"breaks at byte {position}: an extended header of {size} bytes")
            record = file.pread(size, data)
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


def _check_end(file: ByteReader, start: int, end: int) -> None:
    """Raise _Damaged if more follows the zeros at `start` than those that end a tar and fill its last record."""
    for position in range(start, end, _SCANNED):
        found = file.pread(_SCANNED, position)
        if data := found.lstrip(b"\0"):
            first = position + len(found) - len(data)
            raise _Damaged(f"ends at byte {start}, but data that are not read follow at byte {first}")
    if end - start > _RECORD + _BLOCK:
        raise _Damaged(f"holds {end - start} bytes of zeros from byte {start} to its end: a part was never written")


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


def cached_index(path: DataFile, cache: Path | None) -> TarIndex:
    """The index of a shard, from the cache folder if the shard's size and time are unchanged."""
    if cache is None:
        return index_tar(path)
    try:
        stamp = {"version": str(VERSION), **stamp_of(path)}
    except OSError as error:
        if isinstance(path, RemoteFile):
            raise
        raise InputError(f"expected a tar shard, but {str(path)!r}: {error.strerror or error}") from error
    digest = hashlib.sha256(address_of(path)).hexdigest()[:24]
    file = cache / f"{digest}.index.safetensors"

    def compute() -> tuple[Arrays, Texts]:
        index = index_tar(path)
        return index.columns(), {"skipped": json.dumps(index.skipped), "damage": index.damage}

    columns, texts = cached_arrays(file, stamp, compute)
    keys = StringArray(columns.pop("keys"), columns.pop("key_ends"))
    return TarIndex(keys, **columns, skipped=json.loads(texts["skipped"]), damage=texts["damage"])
