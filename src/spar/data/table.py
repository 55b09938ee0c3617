"""Rows of Arrow tables as samples: what parquet files and the files of `datasets` have in common."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spar.common.errors import InputError
from spar.common.files import open_regular
from spar.common.limits import MAX_INPUT_IMAGES
from spar.data.captions import CAPTION_FIELDS, caption_in_json, caption_of, clean_caption, is_missing, is_text
from spar.data.index_cache import header_sizes
from spar.data.remote import DataFile, RemoteFile
from spar.data.samples import BadSample, Kind, Sample, is_safe_path
from spar.processing.images import MAX_BYTES

# Of each role the names of its column, the more specific first.
COLUMNS = {
    "input": ("input_images", "input_image", "source_image", "source_img", "original_image"),
    "image": (
        "output_image", "edited_image", "target_image", "target_img", "image", "jpg", "jpeg", "png", "webp", "img",
    ),
    "text": CAPTION_FIELDS,
    "json": ("json",),
    "key": ("__key__", "key", "id"),
    "label": ("label", "cls"),
}  # fmt: skip
_EMBED = "embed the images before the table is written (the library datasets does so in save_to_disk and push_to_hub)"


class TableSource(ABC):
    """Rows of the tables of several files. An image is bytes, or the Hub's struct of bytes and path; edits have inputs.

    A group of rows is read at a time and the last one is kept: the loader's order stays within a few at a time.

    Args:
        groups: number of a file, number of the group in it, and its rows.
        columns: names of the first file's columns.
        identity: hash that changes with the samples.

    Raises:
        InputError: there are no rows, or no column of images.
    """

    format: str
    damage: tuple[str, ...] = ()

    def __init__(
        self, name: str, files: Sequence[DataFile], groups: list[tuple[int, int, int]], columns: list[str],
        identity: str, cache: Path | None = None,
    ) -> None:  # fmt: skip
        self.name, self.files, self.cache, self.identity = name, [*files], cache, identity
        self._groups = [(file, group) for file, group, _ in groups]
        self.starts = np.concatenate([[0], np.cumsum([rows for *_, rows in groups], dtype=np.int64)])
        self._first_rows: dict[int, int] = {}  # of each file
        for place, (file, _) in enumerate(self._groups):
            self._first_rows.setdefault(file, int(self.starts[place]))
        found = {role: [column for column in names if column in columns] for role, names in COLUMNS.items()}
        self.columns = {role: names for role, names in found.items() if names}
        if "image" not in self.columns or not len(self):
            raise InputError(
                f"expected rows with one of the columns {', '.join(COLUMNS['image'])} in {name!r}, got {len(self)} "
                f"rows with {', '.join(columns)}"
            )
        self.kind: Kind = "edit" if "input" in self.columns else "text_to_image"
        self.captioned = "text" in self.columns or "label" not in self.columns
        self.skipped: dict[str, int] = {}
        self._last: tuple[int, dict[str, Any]] | None = None

    @abstractmethod
    def _load(self, file: int, group: int, columns: list[str]) -> Any:
        """The Arrow table of some columns of one group."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_last": None}

    def read(self, index: int) -> Sample:
        """Read a sample, images as stored; without a column of keys its key is FILE-ROW.

        Raises:
            BadSample: a column is empty or has another type in this row.
        """
        group, row = self._find(index)
        file = self._groups[group][0]
        origin, key = self.files[file].name, f"{self.files[file].stem}-{index - self._first_rows[file]}"
        columns = self._columns(group)
        try:
            values = {name: column[row].as_py() for name, column in columns.items()}
            key = str(values[self.columns["key"][0]]) if "key" in self.columns else key
            text = self._caption(values, key, origin)
        except BadSample:
            raise
        except Exception as error:  # text that is not UTF-8, or a damaged page: Arrow raises nearly anything
            raise BadSample(key, origin, f"its text cannot be read: {error}") from error
        inputs = values[self.columns["input"][0]] if self.kind == "edit" else []
        inputs = inputs if isinstance(inputs, list) else [inputs]
        if self.kind == "edit" and not 1 <= len(inputs) <= MAX_INPUT_IMAGES:
            raise BadSample(key, origin, f"expected 1 to {MAX_INPUT_IMAGES} references, got {len(inputs)}")
        stored = (values[self.columns["image"][0]], *inputs)
        image, *references = (self._image_bytes(one, file, key, origin) for one in stored)
        label = None if self.captioned or self.kind == "edit" else values[self.columns["label"][0]]
        label = label if isinstance(label, int) and label >= 0 else None
        return Sample(image, text, key, origin, label, input_images=tuple(references))

    def sizes(self) -> np.ndarray:
        """uint16 [N, 2]: width and height of each row's image, 0 if its header cannot be read."""

        def part(index: int, start: int, length: int) -> bytes:
            group, row = self._find(index)
            stored = self._columns(group)[self.columns["image"][0]][row].as_py()
            data = self._image_bytes(stored, self._groups[group][0], "", "")
            return data[start:][:length]

        return header_sizes(part, len(self), self.identity, self.cache)

    def _caption(self, values: dict[str, Any], key: str, origin: str) -> str:
        texts = {name: values[name] for name in self.columns.get("text", ())}
        first = next((value for value in texts.values() if not is_missing(value)), None)
        if not is_text(first):
            raise BadSample(key, origin, f"expected text, got {type(first).__name__}")
        text, stored = caption_of(texts), values.get("json")
        if not text and isinstance(stored, dict):
            text = caption_of(stored)
        elif not text and isinstance(stored, str | bytes):
            text = caption_in_json(stored)
        return clean_caption(text, key, origin)

    def _find(self, index: int) -> tuple[int, int]:
        """(group, row in it)."""
        if not 0 <= index < len(self):
            raise IndexError(f"expected 0 to {len(self) - 1}, got {index}")
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        return group, index - int(self.starts[group])

    def _columns(self, group: int) -> dict[str, Any]:
        """Arrow columns of one group, by name."""
        if self._last is None or self._last[0] != group:
            file, place = self._groups[group]
            names = [name for found in self.columns.values() for name in found]
            try:
                table = self._load(file, place, names)
                self._last = (group, {name: table.column(name) for name in names})
            except Exception as error:  # a damaged page makes Arrow raise nearly anything
                if isinstance(self.files[file], RemoteFile) and isinstance(error, OSError):
                    raise  # it may be back in a moment, and is no fault of the data
                raise BadSample(f"row group {place}", self.files[file].name, f"cannot be read: {error}") from error
        return self._last[1]

    def _image_bytes(self, value: Any, file: int, key: str, origin: str) -> bytes:
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, str):  # a column of paths
            data, path = None, data
        if data is None and isinstance(path, str):
            return self._read_file(path, file, key, origin)
        if not isinstance(data, bytes):
            raise BadSample(key, origin, f"expected an image's bytes in the row, got {type(data).__name__}")
        return data

    def _read_file(self, path: str, file: int, key: str, origin: str) -> bytes:
        """The image of a row that has a path in place of the bytes, as `datasets` writes images that it found in files.

        A relative path stays inside the table's folder. An absolute one is the writer's own, on this machine or
        another; a table from elsewhere names no file of this machine.
        """
        table = self.files[file]
        if isinstance(table, RemoteFile):
            raise BadSample(key, origin, f"expected an image's bytes in the row, got the path {path!r}: {_EMBED}")
        root = os.path.realpath(table.parent)
        own = os.path.isabs(path) and not self.name.startswith("hf://") and "\0" not in path
        place = os.path.realpath(os.path.join(root, path)) if own or is_safe_path(path) else ""
        if not own and not place.startswith(os.path.join(root, "")):
            raise BadSample(key, origin, f"expected an image's bytes in the row, got the path {path!r}: {_EMBED}")
        try:
            with open_regular(place) as image:
                if os.fstat(image.fileno()).st_size > MAX_BYTES:
                    raise BadSample(key, origin, f"expected a file of at most {MAX_BYTES >> 20} MiB: {path!r}")
                return image.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadSample(key, origin, f"its image is in the file {path!r} ({reason}): {_EMBED}") from error
