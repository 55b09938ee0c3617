"""The interface of all formats, and the choice of the reader of a path."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, get_args

import numpy as np

from spar.common.errors import InputError
from spar.common.files import home_expanded
from spar.data.annotations import is_llava, open_gpt_edit, open_llava, open_sharegpt
from spar.data.arrow import ArrowSource
from spar.data.image_folder import open_image_folder, open_plain_folder
from spar.data.layout import COMPRESSED, layout_of, shards_in
from spar.data.parquet import ParquetSource
from spar.data.remote import RemoteFile, is_remote, shown
from spar.data.samples import Format, Kind, Sample, count_reason
from spar.data.url_patterns import find_files, refuse_addresses
from spar.data.webdataset import TarSource

log = logging.getLogger("spar.data")


class DataSource(Protocol):
    """Samples by number, in any order, from any process.

    `identity` changes with the samples; `captioned` says whether they are to have captions; `skipped` counts unread
    entries by reason; `damage` describes the files that end early.
    """

    name: str
    format: str
    kind: Kind
    identity: str
    captioned: bool
    skipped: dict[str, int]
    damage: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample: ...

    def sizes(self) -> np.ndarray: ...


def open_source(path: str, format: Format = "auto", *, cache: Path | None = None, workers: int = 1) -> DataSource:
    """Open the reader of a path.

    Args:
        path: shards or parquet files by name, braces, glob, `hf://` or an address; a folder of either, of images, or
            that `datasets` wrote; a JSON list of ShareGPT-4o-Image, or of conversations as LLaVA has them; an index of
            GPT-Image-Edit. What exists is that path, also if its name could be read as a pattern; else a `~` at its
            beginning is the home folder.
        format: format of the path; `auto` detects it from name and content.
        cache: folder of the indexes of shards and the sizes of images.
        workers: processes that index shards.

    Raises:
        InputError: the path matches nothing or is a URL, or its format is unknown.
    """
    refuse_addresses(path)
    path = home_expanded(path)
    if os.path.isdir(path):
        return _open_folder(Path(path), format, cache, workers)
    chosen = _detect(path) if format == "auto" else format
    readers: dict[str, Callable[[], DataSource]] = {
        "webdataset": lambda: TarSource(path, find_files(path), cache, workers),
        "sharegpt": lambda: open_sharegpt(_one(path), cache),
        "gptedit": lambda: open_gpt_edit(_one(path), cache),
        "llava": lambda: open_llava(_one(path), cache),
        "parquet": lambda: ParquetSource(path, find_files(path), cache),
    }
    try:
        return _reader(readers, chosen, f"the path {path!r}, which is no folder")()
    except OSError as error:
        raise InputError(f"{path!r} cannot be read: {error}") from error


def _open_folder(folder: Path, format: str, cache: Path | None, workers: int) -> DataSource:
    chosen, place = layout_of(folder) if format == "auto" else (format, folder)
    if place != folder:
        log.warning("%s: only its folder %s is read", folder, place.relative_to(folder))
    tars, others = shards_in(place, ".tar") if chosen == "webdataset" else ([], 0)
    tables, others = shards_in(place, ".parquet") if chosen == "parquet" else ([], others)
    readers: dict[str, Callable[[], DataSource]] = {
        "webdataset": lambda: TarSource(str(place), tars, cache, workers),
        "folder": lambda: open_image_folder(place, cache),
        "images": lambda: open_plain_folder(place, cache),
        "parquet": lambda: ParquetSource(str(place), tables, cache),
        "arrow": lambda: ArrowSource(place, cache),
    }
    if not (tars or tables) and chosen in ("webdataset", "parquet"):
        raise InputError(f"expected *.{'tar' if chosen == 'webdataset' else chosen} in {str(place)!r}, found none")
    source = _reader(readers, chosen, f"the folder {str(folder)!r}")()
    if others:
        count_reason(source.skipped, "file of another split than train", others)
        log.warning("%s: %d files of other splits than train are not read", place, others)
    return source


def _reader(readers: dict[str, Callable[[], DataSource]], format: str, where: str) -> Callable[[], DataSource]:
    if format not in get_args(Format):
        raise InputError(f"format: expected {', '.join(get_args(Format))}, got {format!r}")
    if format not in readers:
        raise InputError(f"format: expected {', '.join(readers)} for {where}, got {format!r}")
    return readers[format]


def _detect(path: str) -> str:
    """Detect the format of the path of a file, or of a pattern, from the end of its name."""
    whole, path = path, shown(path) if is_remote(path) else path
    endings = {".tar": "webdataset", ".parquet": "parquet", ".json": "sharegpt", ".txt": "gptedit"}
    for ending, format in endings.items():
        if path.endswith((ending, ending + "}")):
            return "llava" if format == "sharegpt" and is_llava(_one(whole)) else format
    if path.lower().endswith(COMPRESSED):
        raise InputError(f"expected an uncompressed set, but {path!r} is compressed: decompress it, or give the format")
    raise InputError(
        f"expected a folder, or a name that ends in {', '.join(endings)}, got {path!r}; or give the format"
    )


def _one(path: str) -> Path:
    files = find_files(path)
    if len(files) > 1:
        raise InputError(f"expected one list of samples, got {len(files)} files of {path!r}")
    (file,) = files
    if isinstance(file, RemoteFile):
        raise InputError(f"expected a list of samples in a local file, since its images are beside it, got {file}")
    return file
