"""Samples of a list with images in files: the list is packed in memory, files are read on access."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spar.common.errors import InputError
from spar.data.index_cache import header_sizes
from spar.data.samples import BadSample, Kind, Sample, is_safe_path
from spar.data.string_array import StringArray
from spar.processing.images import MAX_BYTES


@dataclass(frozen=True)
class ListedSample:
    """One sample of a list: paths relative to root number `root`, and the text. Edits have inputs."""

    inputs: tuple[str, ...]
    image: str
    text: str
    root: int = 0


class ImageFileSource:
    """Samples whose images are files under one or more roots.

    `dropped` counts entries that the format's rules exclude.

    Raises:
        InputError: no samples, or edits together with samples without references.
    """

    damage: tuple[str, ...] = ()

    def __init__(
        self, name: str, format: str, roots: list[Path], rows: Iterable[ListedSample], *, dropped: int = 0,
        cache: Path | None = None,
    ) -> None:  # fmt: skip
        self.name, self.format, self.roots, self.cache = name, format, roots, cache
        kinds: set[Kind] = set()

        def packed() -> Iterable[str]:
            for row in rows:
                kinds.add("edit" if row.inputs else "text_to_image")
                yield json.dumps([row.root, row.image, row.text, *row.inputs], ensure_ascii=False)

        self._rows = StringArray.of(packed())
        if len(kinds) != 1:
            found = "none" if not kinds else "edits beside text-to-image samples"
            raise InputError(f"expected samples of one kind in {name!r}, found {found}")
        self.kind: Kind = kinds.pop()
        self.skipped = {"entry that the format leaves out": dropped} if dropped else {}
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
            number, image, _, *inputs = json.loads(self._rows[index])
            for path in (image, *inputs):
                try:
                    sizes.append(os.stat(self.roots[number] / path).st_size if is_safe_path(path) else -1)
                except OSError:
                    sizes.append(-1)
        return np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Sample:
        """Read a sample, images as stored.

        Raises:
            BadSample: a file is missing, too large, or outside its root.
        """
        number, image, text, *inputs = json.loads(self._rows[index])
        root = self.roots[number]
        data, *references = (_read_bytes(root, path, image) for path in (image, *inputs))
        return Sample(data, text, image, str(root), input_images=tuple(references))

    def sizes(self) -> np.ndarray:
        """uint16 [N, 2]: width and height of each sample's image, 0 if its header cannot be read."""

        def head(index: int, length: int) -> bytes:
            number, image, *_ = json.loads(self._rows[index])
            return _read_bytes(self.roots[number], image, image, length)

        return header_sizes(head, len(self), self.identity, self.cache)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


def _read_bytes(root: Path, path: str, key: str, length: int = -1) -> bytes:
    """Read a file, or its first `length` bytes."""
    if not is_safe_path(path):
        raise BadSample(key, str(root), f"expected a path inside its root, got {path!r}")
    try:
        with open(root / path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                raise BadSample(key, str(root), f"expected a file of at most {MAX_BYTES >> 20} MiB: {path!r}")
            return file.read(length)
    except OSError as error:
        raise BadSample(key, str(root), f"{path!r} cannot be read: {error.strerror or error}") from error
