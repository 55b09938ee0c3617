"""Folders of images with captions in one table (metadata.jsonl, .csv, .parquet), in files beside them, or without."""

import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, AnyStr

from spar.common.errors import InputError
from spar.common.files import open_regular
from spar.common.limits import MAX_MEMBERS, MAX_TEXT_BYTES
from spar.data.annotations import image_paths
from spar.data.captions import CAPTION_FIELDS, caption_of, is_missing, is_text, parse_json
from spar.data.image_files import ImageFileSource, ListedSample
from spar.data.parquet import open_parquet
from spar.data.samples import count_reason
from spar.data.table import COLUMNS

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
CAPTION_ENDINGS = (".txt", ".caption", ".json")  # of the file beside an image, the first that is there

_BLANK, _END = object(), object()  # in place of a row: an empty line, and none
_TARGETS = [name for name in COLUMNS["image"] if name.partition("_")[2]]
IMAGE_FIELDS = ("file_name", "output_file_name", *(f"{name}_file_name" for name in _TARGETS))
INPUT_FIELDS = (
    "input_file_name", "input_file_names", *(f"{name}_file_name{s}" for name in COLUMNS["input"] for s in ("", "s")),
)  # fmt: skip


def open_image_folder(folder: Path, cache: Path | None = None) -> ImageFileSource:
    """Open a folder with one of METADATA: rows of `file_name` and `text`, in edits also `input_file_name` (or a list).

    Other names of the same fields: CAPTION_FIELDS, INPUT_FIELDS, IMAGE_FIELDS.
    """
    path = next((folder / name for name in METADATA if (folder / name).exists()), folder / METADATA[0])
    return ImageFileSource(str(folder), "folder", [folder], _metadata(path), cache=cache)


def _metadata(path: Path) -> Iterator[ListedSample]:
    rows: Iterator[Any] = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix](path)
    number = 0
    try:
        while True:
            number += 1
            if (values := next(rows, _END)) is _END:
                return
            if values is not _BLANK:
                yield _metadata_row(values)
    except OSError as error:
        raise InputError(f"expected {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError, csv.Error) as error:
        line = number + (path.suffix == ".csv")  # whose first line has the names
        raise InputError(f"expected rows with file_name and text in {str(path)!r}, line {line}: {error}") from error


def _json_rows(path: Path) -> Iterator[Any]:
    with open_regular(path) as file:
        for line in _lines(file):
            yield parse_json(line) if line.strip() else _BLANK


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_regular(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        yield from csv.DictReader(_lines(text))


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    for batch in open_parquet(path).iter_batches(1024):
        yield from batch.to_pylist()


def _lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    while line := file.readline(MAX_TEXT_BYTES + 1):
        if len(line) > MAX_TEXT_BYTES:
            raise ValueError(f"a line of more than {MAX_TEXT_BYTES} bytes")
        yield line


def _metadata_row(values: Any) -> ListedSample:
    if not isinstance(values, dict):
        raise ValueError("not an object")
    image, text = (_first(values, names) for names in (IMAGE_FIELDS, CAPTION_FIELDS))
    if not isinstance(image, str) or not is_text(text):
        raise ValueError(f"got the fields {', '.join(map(repr, values))}")
    return ListedSample(image_paths(_first(values, INPUT_FIELDS) or []), image, caption_of(values).strip())


def _first(values: dict[str, Any], names: Iterable[str]) -> Any:
    return next((values[name] for name in names if not is_missing(values.get(name))), None)


def open_plain_folder(folder: Path, cache: Path | None = None) -> ImageFileSource:
    """Open a folder of images, at any depth, with captions in files of the same stem (CAPTION_ENDINGS) or without.

    Without any caption, images that lie in two or more folders, one level deep, have the number of their folder as the
    label: the layout of classes.

    Raises:
        InputError: there is no image, too many, or a folder cannot be read.
    """
    skipped: dict[str, int] = {}
    found = sorted(_images_of(folder, skipped))
    if not found:
        reasons = "".join(f"; {count} files skipped ({reason})" for reason, count in skipped.items())
        raise InputError(f"expected images ({', '.join(IMAGE_ENDINGS)}) in {str(folder)!r}, found none{reasons}")
    captioned = any(caption for _, caption in found)
    parents = [os.path.dirname(image) for image, _ in found]
    classes = {name: number for number, name in enumerate(sorted(set(parents)))}
    labelled = not captioned and len(classes) > 1 and all(name and not os.path.dirname(name) for name in classes)
    rows = (
        ListedSample((), image, "", caption_file=caption, label=classes[parent] if labelled else None)
        for (image, caption), parent in zip(found, parents, strict=True)
    )
    return ImageFileSource(str(folder), "images", [folder], rows, skipped=skipped, captioned=captioned, cache=cache)


def _images_of(folder: Path, skipped: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Each image and the file of its caption, relative to the folder; what is neither is counted in `skipped`."""

    def refuse(error: OSError) -> None:
        raise InputError(f"expected a folder of images, but {error.filename!r}: {error.strerror}") from error

    count = 0
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(place, folder)
        prefix = "" if inside == os.curdir else os.path.join(inside, "")
        present, used = set(names), set()
        images = {name for name in names if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")}
        for name in images:
            stem = os.path.splitext(name)[0]
            caption = next((stem + ending for ending in CAPTION_ENDINGS if stem + ending in present), "")
            used |= {stem + ending for ending in CAPTION_ENDINGS}
            yield prefix + name, prefix + caption if caption else ""
        if (count := count + len(images)) > MAX_MEMBERS:
            raise InputError(f"expected at most {MAX_MEMBERS} images in a folder, got more in {str(folder)!r}")
        for name in present - images - used:
            hidden, ending = name.startswith("."), os.path.splitext(name)[1]
            count_reason(skipped, "hidden file" if hidden else ending or "no extension")
