"""Samples of a list with images in files: the list is packed in memory, files are read on access."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spar.common.errors import InputError
from spar.common.files import open_regular
from spar.common.limits import MAX_TEXT_BYTES
from spar.data.captions import caption_in_json, clean_caption, decode_caption
from spar.data.index_cache import header_sizes
from spar.data.samples import BadSample, Kind, Sample, is_safe_path
from spar.data.string_array import StringArray
from spar.processing.images import MAX_BYTES


@dataclass(frozen=True)
class ListedSample:
    """One sample of a list: paths relative to root number `root`, and the text. Edits have inputs.

    In place of the text, `caption_file` may name a `.txt` or `.json` that has it; `label` is a class number; `turns`
    are questions and answers about the image.
    """

    inputs: tuple[str, ...]
    image: str
    text: str
    root: int = 0
    caption_file: str = ""
    label: int | None = None
    turns: tuple[tuple[str, str], ...] = ()

    def packed(self) -> str:
        """One line of JSON; escapes stand only in a line that is no Unicode, which `read` reports."""
        caption: Any = [self.caption_file] if self.caption_file else self.text if self.label is None else self.label
        if self.turns:
            caption = {"turns": self.turns}
        values = [self.root, self.image, caption, *self.inputs]
        line = json.dumps(values, ensure_ascii=False)
        return line if line.isascii() or _is_unicode(line) else json.dumps(values)

    @classmethod
    def unpacked(cls, line: str) -> "ListedSample":
        root, image, caption, *inputs = json.loads(line)
        if isinstance(caption, dict):
            return cls(tuple(inputs), image, "", root, turns=tuple((asked, said) for asked, said in caption["turns"]))
        text, label = (caption, None) if isinstance(caption, str) else ("", caption)
        if isinstance(label, list):
            return cls(tuple(inputs), image, "", root, label[0])
        return cls(tuple(inputs), image, text, root, label=label)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class ImageFileSource:
    """Samples whose images are files under one or more roots.

    `skipped` counts entries that the format's rules exclude, by reason. A link that leaves the roots is not followed.

    Raises:
        InputError: no samples, or samples of several kinds.
    """

    damage: tuple[str, ...] = ()

    def __init__(
        self, name: str, format: str, roots: list[Path], rows: Iterable[ListedSample], *,
        skipped: dict[str, int] | None = None, captioned: bool = True, cache: Path | None = None,
    ) -> None:  # fmt: skip
        self.name, self.format, self.roots, self.cache, self.captioned = name, format, roots, cache, captioned
        self._real = [_real_roots(root) for root in roots]
        kinds: set[Kind] = set()

        def packed() -> Iterable[str]:
            for row in rows:
                kinds.add("edit" if row.inputs else "dialogue" if row.turns else "text_to_image")
                yield row.packed()

        self._rows = StringArray.of(packed())
        if len(kinds) != 1:
            found = " beside ".join(sorted(kinds)) or "none"
            left = "".join(f"; left out: {count} of {reason!r}" for reason, count in (skipped or {}).items())
            raise InputError(f"expected samples of one kind in {name!r}, found {found}{left}")
        self.kind: Kind = kinds.pop()
        self.skipped = skipped or {}
        digest = hashlib.sha256(format.encode())
        digest.update(self._rows.blob.tobytes())
        digest.update(self._file_sizes().tobytes())
        self.identity = digest.hexdigest()

    def _file_sizes(self) -> np.ndarray:
        """int64: bytes of every file, -1 if it is missing, so that a replaced image changes the identity.

        One of the very same length does not; times of change would show it, but a copy on another disk changes them.
        """
        sizes: list[int] = []
        for index in range(len(self._rows)):
            row = ListedSample.unpacked(self._rows[index])
            for path in (row.image, *row.inputs, *([row.caption_file] if row.caption_file else [])):
                try:
                    sizes.append(os.stat(local_path(self.roots[row.root], path)).st_size if is_safe_path(path) else -1)
                except OSError:
                    sizes.append(-1)
        return np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Sample:
        """Read a sample, images as stored.

        Raises:
            BadSample: a file is missing, too large, or outside its root, or the text is no caption, or a turn has no
                question or no answer.
        """
        row = ListedSample.unpacked(self._rows[index])
        root, key = self.roots[row.root], row.image
        data, *references = (self._read_bytes(row, path) for path in (row.image, *row.inputs))
        text = clean_caption(self._caption(row) if row.caption_file else row.text, key, str(root))
        turns = tuple((clean_caption(a, key, str(root)), clean_caption(b, key, str(root))) for a, b in row.turns)
        if not all(asked and said for asked, said in turns):
            raise BadSample(key, str(root), "expected a question and an answer in each turn, got an empty one")
        return Sample(data, text, key, str(root), row.label, tuple(references), turns)

    def sizes(self) -> np.ndarray:
        """uint16 [N, 2]: width and height of each sample's image, 0 if its header cannot be read."""

        def part(index: int, start: int, length: int) -> bytes:
            row = ListedSample.unpacked(self._rows[index])
            return self._read_bytes(row, row.image, start, length)

        return header_sizes(part, len(self), self.identity, self.cache)

    def _caption(self, row: ListedSample) -> str:
        data = self._read_bytes(row, row.caption_file, 0, MAX_TEXT_BYTES + 1)
        try:
            return caption_in_json(data) if row.caption_file.lower().endswith(".json") else decode_caption(data)
        except (ValueError, RecursionError) as error:
            raise BadSample(row.image, str(self.roots[row.root]), f"its text cannot be read: {error}") from error

    def _read_bytes(self, row: ListedSample, path: str, start: int = 0, length: int = MAX_BYTES + 1) -> bytes:
        """Read `length` bytes of a file from `start` on, which counts from its end if it is negative."""
        root = self.roots[row.root]

        def bad(reason: str) -> BadSample:
            return BadSample(row.image, str(root), reason)

        if not is_safe_path(path):
            raise bad(f"expected a path inside its root, got {path!r}")
        place = local_path(root, path)
        try:
            if not os.path.realpath(place).startswith(self._real[row.root]):
                raise bad(f"expected a file inside its root, but {path!r} is a link that leaves it")
            with open_regular(place) as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_BYTES:
                    raise bad(f"expected a file of at most {MAX_BYTES >> 20} MiB: {path!r}")
                file.seek(start if start >= 0 else max(0, size + start))
                return file.read(min(length, size))
        except OSError as error:
            raise bad(f"{path!r} cannot be read: {error.strerror or error}") from error


def local_path(root: Path, path: str) -> Path:
    """The file of a path in a list; lists that Windows wrote separate folders by backslashes."""
    place = root / path
    return place if "\\" not in path or os.path.lexists(place) else root / path.replace("\\", "/")


def _real_roots(root: Path) -> tuple[str, ...]:
    """The folders in which files of a root may really lie, each with a separator at its end.

    In the Hub's cache the files of `snapshots/REVISION` are links into `blobs`.
    """
    real = os.path.realpath(root)
    found = [real]
    for folder in (Path(real), *Path(real).parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("datasets--"):
            found.append(str(folder.parent.parent / "blobs"))
    return tuple(os.path.join(folder, "") for folder in found)
