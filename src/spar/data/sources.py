"""The interface of all formats, and the choice of the reader of a path."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from spar.common.errors import InputError
from spar.data.annotations import METADATA, open_gpt_edit, open_image_folder, open_sharegpt
from spar.data.parquet import ParquetSource
from spar.data.samples import Format, Kind, Sample
from spar.data.url_patterns import find_files, refuse_addresses
from spar.data.webdataset import TarSource


class DataSource(Protocol):
    """Samples by number, in any order, from any process.

    `identity` changes with the samples; `skipped` counts unread entries by reason; `damage` describes the files that
    end early.
    """

    name: str
    format: str
    kind: Kind
    identity: str
    skipped: dict[str, int]
    damage: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample: ...

    def sizes(self) -> np.ndarray: ...


def open_source(path: str, format: Format = "auto", *, cache: Path | None = None, workers: int = 1) -> DataSource:
    """Open the reader of a path.

    Args:
        path: shards by name, braces, glob or `hf://`; a folder of shards, of parquet files, or with metadata.jsonl; a
            JSON list of ShareGPT-4o-Image; an index of GPT-Image-Edit; parquet files.
        format: format of the path; `auto` detects it from name and content.
        cache: folder of the indexes of shards and the sizes of images.
        workers: processes that index shards.

    Raises:
        InputError: the path matches nothing or is a URL, or its format is unknown.
    """
    refuse_addresses(path)
    chosen = _detect(path) if format == "auto" else format
    readers: dict[str, Callable[[], DataSource]] = {
        "webdataset": lambda: TarSource(path, _files(path, "tar"), cache, workers),
        "folder": lambda: open_image_folder(Path(path), cache),
        "sharegpt": lambda: open_sharegpt(_one(path), cache),
        "gptedit": lambda: open_gpt_edit(_one(path), cache),
        "parquet": lambda: ParquetSource(path, _files(path, "parquet"), cache),
    }
    if chosen not in readers:
        raise InputError(f"format: expected auto, {', '.join(readers)}, got {format!r}")
    return readers[chosen]()


def _detect(path: str) -> str:
    """Detect the format of a path from the end of its name or the contents of its folder."""
    if os.path.isdir(path):
        names = os.listdir(path)
        if METADATA in names:
            return "folder"
        for ending, format in ((".tar", "webdataset"), (".parquet", "parquet")):
            if any(name.endswith(ending) for name in names):
                return format
        lists = sorted(name for name in names if name.endswith(".json"))
        hint = f"; name one of its lists: {', '.join(lists[:5])}" if lists else ""
        raise InputError(f"expected *.tar, *.parquet or {METADATA} in the folder {path!r}, found none{hint}")
    endings = {".tar": "webdataset", ".parquet": "parquet", ".json": "sharegpt", ".txt": "gptedit"}
    for ending, format in endings.items():
        if path.endswith((ending, ending + "}")):
            return format
    raise InputError(
        f"expected a folder, or a name that ends in {', '.join(endings)}, got {path!r}; or give the format"
    )


def _files(path: str, ending: str) -> list[Path]:
    return find_files(os.path.join(path, f"*.{ending}") if os.path.isdir(path) else path)


def _one(path: str) -> Path:
    files = find_files(path)
    if len(files) > 1:
        raise InputError(f"expected one list of samples, got {len(files)} files of {path!r}")
    return files[0]
