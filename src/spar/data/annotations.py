"""Published formats of sample lists: metadata.jsonl of an image folder, ShareGPT-4o-Image, GPT-Image-Edit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spar.common.errors import InputError
from spar.common.limits import MAX_ANNOTATION_BYTES, MAX_INPUT_IMAGES, MAX_TEXT_BYTES
from spar.data.image_files import ImageFileSource, ListedSample

METADATA = "metadata.jsonl"
TEXT_FIELDS = ("text", "caption", "prompt", "instruction")
INPUT_FIELDS = ("input_file_name", "input_file_names", "input_image_file_name")
IMAGE_FIELDS = ("file_name", "output_file_name", "output_image_file_name")


def open_image_folder(folder: Path, cache: Path | None = None) -> ImageFileSource:
    """Open a folder with `metadata.jsonl`: lines of `file_name` and `text`, in edits also `input_file_name` (or list).

    Other names of the same fields: TEXT_FIELDS, INPUT_FIELDS, IMAGE_FIELDS.
    """
    return ImageFileSource(str(folder), "folder", [folder], _metadata(folder / METADATA), cache=cache)


def _metadata(path: Path) -> Iterator[ListedSample]:
    number = 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(MAX_TEXT_BYTES + 1):
                number += 1
                if len(line) > MAX_TEXT_BYTES:
                    raise ValueError(f"a line of more than {MAX_TEXT_BYTES} bytes")
                if line.strip():
                    yield _metadata_row(json.loads(line))
    except OSError as error:
        raise InputError(f"expected {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected lines of JSON with file_name and text in {str(path)!r}, line {number}: {error}") \
            from error  # fmt: skip


def _metadata_row(values: Any) -> ListedSample:
    if not isinstance(values, dict):
        raise ValueError("not an object")
    image, text = (_first(values, names) for names in (IMAGE_FIELDS, TEXT_FIELDS))
    inputs = _paths(_first(values, INPUT_FIELDS) or [])
    if not isinstance(image, str) or not isinstance(text or "", str):
        raise ValueError(f"got the fields {', '.join(map(repr, values))}")
    return ListedSample(inputs, image, (text or "").strip())


def open_sharegpt(path: Path, cache: Path | None = None) -> ImageFileSource:
    """Open `text_to_image.json` or `text_and_image_to_image.json` of ShareGPT-4o-Image, with images in its folder."""

    def rows() -> Iterator[ListedSample]:
        for place, item in enumerate(_read_list(path)):
            try:
                yield ListedSample(_paths(item.get("input_image", [])), _string(item["output_image"]),
                          _string(item["input_prompt"]).strip())  # fmt: skip
            except (KeyError, ValueError, AttributeError) as error:
                wanted = "expected input_prompt, output_image and, for an edit, input_image"
                raise InputError(f"{wanted} in {str(path)!r}, item {place}: {error!r}") from error

    return ImageFileSource(str(path), "sharegpt", [path.parent], rows(), cache=cache)


def open_gpt_edit(path: Path, cache: Path | None = None) -> ImageFileSource:
    """Open the index of GPT-Image-Edit: lines `image_root,annotation.json,flag`, paths absolute or relative to it.

    As in the family's training, items have exactly two images (one input, one output), others are counted as dropped;
    `<image>` and line breaks are removed from the instruction. The flag (region weights) is not used.
    """
    roots: list[Path] = []
    rows: list[ListedSample | None] = []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected an index of GPT-Image-Edit, but {str(path)!r}: {error}") from error
    for number, line in enumerate(lines):
        parts = [part.strip() for part in line.rsplit(",", 2)]
        if len(parts) != 3:
            raise InputError(f"expected lines image_root,annotation.json,flag in {str(path)!r}, got {line!r}")
        roots.append(path.parent / parts[0])
        rows += [_gpt_edit_row(item, number) for item in _read_list(path.parent / parts[1])]
    kept = [row for row in rows if row is not None]
    return ImageFileSource(str(path), "gptedit", roots, kept, dropped=len(rows) - len(kept), cache=cache)


def _gpt_edit_row(item: Any, root: int) -> ListedSample | None:
    """A row, or None for an item that is not one input, one output and an instruction."""
    try:
        source, target = _paths(item["image"])
        instruction = next(turn["value"] for turn in item["conversations"] if turn["from"] == "human")
        text = " ".join(_string(instruction).replace("<image>", " ").split())
    except (KeyError, TypeError, ValueError, StopIteration):
        return None
    return ListedSample((source,), target, text, root)


def _read_list(path: Path) -> list[Any]:
    try:
        if (size := path.stat().st_size) > MAX_ANNOTATION_BYTES:
            raise ValueError(f"it has {size} bytes, more than {MAX_ANNOTATION_BYTES}")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"expected a JSON list of samples, but {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected a JSON list of samples in {str(path)!r}: {error}") from error
    if not isinstance(values, list):
        raise InputError(f"expected a JSON list of samples in {str(path)!r}, got {type(values).__name__}")
    return values


def _first(values: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _paths(value: Any) -> tuple[str, ...]:
    paths = tuple(map(_string, [value] if isinstance(value, str) else value))
    if len(paths) > MAX_INPUT_IMAGES:
        raise ValueError(f"more than {MAX_INPUT_IMAGES} images")
    return paths


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {type(value).__name__}")
    return value
