"""A data set that the library `datasets` saved with `save_to_disk`: Arrow streams. Needs the extra `data`."""

import hashlib
from pathlib import Path
from typing import Any

from spar.common.errors import InputError
from spar.common.files import open_regular
from spar.common.limits import MAX_INDEX_BYTES, MAX_SHARDS
from spar.data.captions import parse_json
from spar.data.parquet import import_pyarrow
from spar.data.samples import is_safe_path
from spar.data.table import TableSource

STATE, SPLITS = "state.json", "dataset_dict.json"


class ArrowSource(TableSource):
    """Rows of the `data-*.arrow` files that `state.json` lists; they are mapped into memory, never copied into it.

    Raises:
        InputError: pyarrow is missing, a file cannot be read, or there is no column of images.
    """

    format = "arrow"

    def __init__(self, folder: Path, cache: Path | None = None) -> None:
        files = _files(folder)
        digest, groups = hashlib.sha256(), []
        columns: list[str] = []
        for number, path in enumerate(files):
            table = _read(path)
            digest.update(f"{path.name} {path.stat().st_size} {table.num_rows}\n".encode())
            groups.append((number, 0, table.num_rows))
            columns = columns or table.column_names
        super().__init__(str(folder), files, groups, columns, digest.hexdigest(), cache)
        self._paths = files

    def _load(self, file: int, group: int, columns: list[str]) -> Any:
        table = _read(self._paths[file]).select(columns)
        table.validate(full=True)  # what a stream says of its own offsets is not checked before
        return table


def _files(folder: Path) -> list[Path]:
    wanted = f"expected a data set saved by datasets ({STATE} and data-*.arrow) in {str(folder)!r}"
    try:
        with open_regular(folder / STATE) as file:
            state = parse_json(file.read(MAX_INDEX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{wanted}, but {STATE} cannot be read: {error}") from error
    listed = state.get("_data_files") if isinstance(state, dict) else None
    entries = listed if isinstance(listed, list) else []
    names = [one.get("filename") if isinstance(one, dict) else None for one in entries]
    if not names or len(names) > MAX_SHARDS or not all(isinstance(name, str) and is_safe_path(name) for name in names):
        raise InputError(f"{wanted}, but {STATE} lists no files of this folder")
    if state.get("_indices_files"):
        raise InputError(f"{wanted}, but it is a selection of rows: save it after flatten_indices()")
    return [folder / str(name) for name in names]


def _read(path: Path) -> Any:
    """The whole table of a file, mapped."""
    pyarrow = import_pyarrow("Arrow files")
    try:
        if not path.is_file():
            raise OSError("there is no such file")
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            return stream.read_all()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"expected an Arrow stream, but {str(path)!r}: {error}") from error
