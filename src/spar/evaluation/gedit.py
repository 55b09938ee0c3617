"""GEdit-Bench: edits of the images in its parquet files, in the layout that its scorer reads.

Facts of stepfun-ai/Step1X-Edit e78b811. The images lie in the rows: `input_image_raw` is what is edited, and
`input_image` what the scorer compares with. Needs the extra `data`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from spar.common.errors import InputError
from spar.common.limits import MAX_ROW_GROUP_BYTES, MAX_TEXT_BYTES
from spar.data.parquet import open_parquet
from spar.data.samples import is_safe_path
from spar.inference.prompt_files import MAX_PROMPTS, ImageFile, PromptSet, SourceImage
from spar.processing.images import MAX_BYTES, ImageSource

_WORDS = ("task_type", "key", "instruction_language", "instruction")
_LANGUAGES = ("en", "cn")
_EDITED, _COMPARED = "input_image_raw", "input_image"


class _Images:
    """Images in rows of parquet files; the row group that was read last is kept."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Path, int, str], Any] | None = None

    def read(self, path: Path, group: int, row: int, column: str) -> bytes:
        place = (path, group, column)
        if self._last is None or self._last[0] != place:
            self._last = place, _read_group(path, open_parquet(path), group, [column]).column(column)
        try:
            stored = self._last[1][row].as_py()
        except Exception as error:  # of a damaged page Arrow raises nearly anything
            raise InputError(f"{path}: {column} of row {row} of group {group} cannot be read: {error}") from error
        data = stored.get("bytes") if isinstance(stored, dict) else stored
        if not isinstance(data, bytes) or not 0 < len(data) <= MAX_BYTES:
            raise InputError(f"{path}: expected an image as {column} of row {row} of group {group}, found none")
        return data


@dataclass(frozen=True)
class _RowImage:
    """An image of a row."""

    images: _Images
    path: Path
    group: int
    row: int
    column: str
    name: str

    def exists(self) -> bool:
        return self.path.is_file()

    def read(self) -> ImageSource:
        return self.images.read(self.path, self.group, self.row, self.column)

    def metadata(self) -> dict[str, str]:
        data = self.images.read(self.path, self.group, self.row, self.column)
        return {"image": self.name, "image_sha256": hashlib.sha256(data).hexdigest()}


@dataclass(frozen=True)
class GEdit(PromptSet):
    """`fullset/TASK/LANGUAGE/KEY.png`, one edit an instruction, and the image before it as `KEY_SRCIMG.png`."""

    format: ClassVar[str] = "gedit"
    names: Sequence[str] = ()
    compared: Sequence[SourceImage] = ()

    def files(self, seeds: Sequence[int]) -> list[ImageFile]:
        self.expect_images(seeds, 1)
        return [ImageFile(f"{name}.png", i, range(i, i + 1)) for i, name in enumerate(self.names)]

    def lists(self, seeds: Sequence[int]) -> Iterator[tuple[str, str]]:
        yield from ()

    def copies(self) -> Mapping[str, SourceImage]:
        return {f"{name}_SRCIMG.png": image for name, image in zip(self.names, self.compared, strict=True)}


def read_gedit(path: Path, languages: Sequence[str] = _LANGUAGES) -> GEdit:
    """GEdit-Bench's parquet file, or the folder of its files; its instructions in some of its languages.

    Raises:
        InputError: pyarrow is missing, or a file or a row that is none of GEdit-Bench.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    images, found = _Images(), dict[str, tuple[str, _RowImage, _RowImage]]()
    for file in files:
        for group, row, (task, key, language, text) in _rows(file, languages):
            name = f"fullset/{task}/{language}/{key}"
            if name in found:
                raise InputError(f"{path}: expected each key once, got {name!r} twice")
            edited, compared = (
                _RowImage(images, file, group, row, column, f"{key}.png") for column in (_EDITED, _COMPARED)
            )
            found[name] = text, edited, compared
            if len(found) > MAX_PROMPTS:
                raise InputError(f"{path}: expected at most {MAX_PROMPTS} instructions")
    if not found:
        raise InputError(f"{path}: expected instructions in {' or '.join(languages)} in parquet files, found none")
    rows = [*found.values()]
    return GEdit(
        [text for text, *_ in rows], [edited for _, edited, _ in rows], names=tuple(found),
        compared=[compared for *_, compared in rows],
    )  # fmt: skip


def _read_group(path: Path, parquet: Any, group: int, columns: list[str]) -> Any:
    try:
        return parquet.read_row_group(group, columns=columns)
    except Exception as error:
        raise InputError(f"{path}: group {group} of its rows cannot be read: {error}") from error


def _rows(file: Path, languages: Sequence[str]) -> Iterator[tuple[int, int, list[str]]]:
    """Of each row in one of the languages its group, its number there, and the texts of _WORDS."""
    parquet = open_parquet(file)
    missing = [name for name in (*_WORDS, _EDITED, _COMPARED) if name not in parquet.schema_arrow.names]
    if missing:
        raise InputError(f"{file}: expected columns {', '.join((*_WORDS, _EDITED, _COMPARED))}, missing {missing[0]}")
    for group in range(parquet.metadata.num_row_groups):
        if (size := parquet.metadata.row_group(group).total_byte_size) > MAX_ROW_GROUP_BYTES:
            raise InputError(f"{file}: expected row groups of at most {MAX_ROW_GROUP_BYTES} bytes, got {size}")
        table = _read_group(file, parquet, group, [*_WORDS])
        for row in range(len(table)):
            try:
                words = [table.column(name)[row].as_py() for name in _WORDS]
            except Exception as error:  # text that is not UTF-8
                raise InputError(f"{file}, row {row} of group {group}: its text cannot be read: {error}") from error
            if words[_WORDS.index("instruction_language")] not in languages:
                continue
            for name, word in zip(_WORDS, words, strict=True):
                if not isinstance(word, str) or not word.strip() or len(word) > MAX_TEXT_BYTES:
                    raise InputError(f"{file}, row {row} of group {group}: expected text as {name}, got {word!r:.80}")
                if name != "instruction" and ("/" in word or not is_safe_path(word)):
                    raise InputError(f"{file}, row {row} of group {group}: expected a name as {name}, got {word!r:.80}")
            yield group, row, words
