"""Parquet files as a source, with images in the rows as in datasets on the Hub. Needs the extra `data`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spar.common.errors import InputError, install_command
from spar.common.limits import MAX_ROW_GROUP_BYTES
from spar.data.remote import DataFile, RemoteFile, stamp_of
from spar.data.table import TableSource


class ParquetSource(TableSource):
    """Rows of parquet files, whose row groups are read whole.

    Raises:
        InputError: pyarrow is missing, a file cannot be read, a row group is too large, or no column has images.
    """

    format = "parquet"

    def __init__(self, name: str, files: Sequence[DataFile], cache: Path | None = None) -> None:
        digest, groups = hashlib.sha256(), []
        for number, path in enumerate(files):
            meta = open_parquet(path).metadata
            digest.update(f"{path.name} {stamp_of(path)['bytes']} {meta.num_rows}\n".encode())
            for group in range(meta.num_row_groups):
                if (size := meta.row_group(group).total_byte_size) > MAX_ROW_GROUP_BYTES:
                    limit = f"expected row groups of at most {MAX_ROW_GROUP_BYTES} bytes"
                    raise InputError(f"{limit}, but one of {str(path)!r} has {size}")
                groups.append((number, group, meta.row_group(group).num_rows))
        columns = open_parquet(files[0]).schema_arrow.names
        super().__init__(name, files, groups, columns, digest.hexdigest(), cache)

    def _load(self, file: int, group: int, columns: list[str]) -> Any:
        return open_parquet(self.files[file]).read_row_group(group, columns=columns)


def open_parquet(path: DataFile) -> Any:
    """The pyarrow.parquet.ParquetFile of a path; InputError if it is none, or pyarrow is missing."""
    pyarrow = import_pyarrow("parquet")
    try:
        if isinstance(path, RemoteFile):
            return pyarrow.parquet.ParquetFile(path.seekable())
        if not path.is_file():
            raise OSError("there is no such file")
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(path, RemoteFile) and not isinstance(error, pyarrow.ArrowException):
            raise  # it may be back in a moment
        raise InputError(f"expected a parquet file, but {str(path)!r}: {error}") from error


def import_pyarrow(what: str) -> Any:
    """The module pyarrow; InputError that says how to install it to read a format."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        reason = "needs pyarrow, which is not installed"
        raise InputError(f"reading {what} {reason}: {install_command('data')}") from error
    return pyarrow
