"""Parquet files as a source, with images in the rows as in datasets on the Hub. Needs the extra `data`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spar.common.errors import InputError, install_command
from spar.common.limits import MAX_INPUT_IMAGES, MAX_ROW_GROUP_BYTES
from spar.data.index_cache import header_sizes
from spar.data.samples import BadSample, Kind, Sample

# Of each role the names of its column, the more specific first.
COLUMNS = {
    "input": ("input_images", "input_image", "source_image", "original_image"),
    "image": ("output_image", "edited_image", "target_image", "image", "jpg", "png", "webp", "img"),
    "text": ("instruction", "edit_prompt", "input_prompt", "caption", "text", "txt", "prompt"),
    "key": ("__key__", "key", "id"),
}


class ParquetSource:
    """Rows of parquet files. An image is bytes, or the Hub's struct of bytes and path; an edit has input images.

    Row groups are read whole and the last one is cached: the loader's order stays within a few at a time.

    Raises:
        InputError: pyarrow is missing, a file cannot be read, or there is no column of images.
    """

    format = "parquet"
    damage: tuple[str, ...] = ()

    def __init__(self, name: str, files: Sequence[Path], cache: Path | None = None) -> None:
        self.name, self.files, self.cache = name, [*files], cache
        digest, counts, self._groups = hashlib.sha256(), [], []
        for number, path in enumerate(self.files):
            meta = _open(path).metadata
            digest.update(f"{path.name} {path.stat().st_size} {meta.num_rows}\n".encode())
            for group in range(meta.num_row_groups):
                if (size := meta.row_group(group).total_byte_size) > MAX_ROW_GROUP_BYTES:
                    limit = f"expected row groups of at most {MAX_ROW_GROUP_BYTES} bytes"
                    raise InputError(f"{limit}, but one of {str(path)!r} has {size}")
                counts.append(meta.row_group(group).num_rows)
                self._groups.append((number, group))
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        columns = _open(self.files[0]).schema_arrow.names
        found = {role: [column for column in names if column in columns] for role, names in COLUMNS.items()}
        self.columns = {role: names[0] for role, names in found.items() if names}
        if "image" not in self.columns or not len(self):
            raise InputError(
                f"expected rows with one of the columns {', '.join(COLUMNS['image'])} in {name!r}, got {len(self)} "
                f"rows with {', '.join(columns)}"
            )
        self.kind: Kind = "edit" if "input" in self.columns else "text_to_image"
        self.identity = digest.hexdigest()
        self.skipped: dict[str, int] = {}
        self._last: tuple[int, dict[str, list[Any]]] | None = None

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
        values = {role: column[row] for role, column in self._read(group).items()}
        number = self._groups[group][0]
        first = next(place for place, (file, _) in enumerate(self._groups) if file == number)
        key = str(values.get("key", f"{self.files[number].stem}-{index - int(self.starts[first])}"))
        origin, text = self.files[number].name, values.get("text") or ""
        if not isinstance(text, str):
            raise BadSample(key, origin, f"expected text, got {type(text).__name__}")
        inputs = values.get("input", [])
        inputs = inputs if isinstance(inputs, list) else [inputs]
        if self.kind == "edit" and not 1 <= len(inputs) <= MAX_INPUT_IMAGES:
            raise BadSample(key, origin, f"expected 1 to {MAX_INPUT_IMAGES} references, got {len(inputs)}")
        image, *references = (_image_bytes(one, key, origin) for one in (values["image"], *inputs))
        return Sample(image, text.strip(), key, origin, input_images=tuple(references))

    def sizes(self) -> np.ndarray:
        """uint16 [N, 2]: width and height of each row's image, 0 if its header cannot be read."""

        def head(index: int, length: int) -> bytes:
            group, row = self._find(index)
            return _image_bytes(self._read(group)["image"][row], "", "")[:length]

        return header_sizes(head, len(self), self.identity, self.cache)

    def _find(self, index: int) -> tuple[int, int]:
        """(row group, row in it)."""
        if not 0 <= index < len(self):
            raise IndexError(f"expected 0 to {len(self) - 1}, got {index}")
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        return group, index - int(self.starts[group])

    def _read(self, group: int) -> dict[str, list[Any]]:
        """Columns of one row group, by role."""
        if self._last is None or self._last[0] != group:
            number, place = self._groups[group]
            try:
                table = _open(self.files[number]).read_row_group(place, columns=[*self.columns.values()])
                self._last = (group, {role: table.column(name).to_pylist() for role, name in self.columns.items()})
            except Exception as error:  # a damaged page makes Arrow raise nearly anything
                name = self.files[number].name
                raise BadSample(f"row group {place}", name, f"cannot be read: {error}") from error
        return self._last[1]


def _open(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"reading parquet needs pyarrow, which is not installed: {install_command('data')}") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"expected a parquet file, but {str(path)!r}: {error}") from error


def _image_bytes(value: Any, key: str, origin: str) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise BadSample(key, origin, f"expected an image's bytes in the row, got {type(data).__name__}")
    return data
