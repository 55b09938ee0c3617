"""Published benchmarks of generation and editing: their prompt files, and the layouts of images that their own scorers
read.

The scorers, with their networks, are the benchmarks' own. Facts of GenEval (djghosh13/geneval af4902f), GenEval 2, WISE
(PKU-YuanGroup/WISE eb51174), DPG-Bench (TencentQQGYLab/ELLA 3c228f1), GenAI-Bench (linzhiqiu/t2v_metrics a3cea5e) and
ImgEdit (PKU-YuanGroup/ImgEdit 547185d).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from spar.common.errors import InputError
from spar.common.limits import MAX_TEXT_BYTES
from spar.evaluation.gedit import read_gedit
from spar.inference.prompt_files import MAX_PROMPTS, ImageFile, PromptSet, SourceFile, SourceImage, read_prompts

MAX_FILE_BYTES = 2**26  # of a benchmark's prompts
GRID = 4  # images of a prompt that DPG-Bench has in one file, two by two


@dataclass(frozen=True)
class GenEval(PromptSet):
    """`00000/metadata.jsonl`, one line with the prompt's own object, and `00000/samples/00000.png`."""

    format: ClassVar[str] = "geneval"
    entries: Sequence[Mapping[str, Any]] = ()

    def files(self, seeds: Sequence[int]) -> list[ImageFile]:
        each = len(seeds) // len(self.prompts)
        return [
            ImageFile(f"{i // each:05}/samples/{i % each:05}.png", i // each, range(i, i + 1))
            for i in range(len(seeds))
        ]

    def lists(self, seeds: Sequence[int]) -> Iterator[tuple[str, str]]:
        for number, entry in enumerate(self.entries):
            yield f"{number:05}/metadata.jsonl", json.dumps(entry, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class GenEval2(PromptSet):
    """`00000.png`, one image a prompt, and `images.json`, {prompt: file}."""

    format: ClassVar[str] = "geneval2"

    def files(self, seeds: Sequence[int]) -> list[ImageFile]:
        self.expect_images(seeds, 1)
        return [ImageFile(f"{i:05}.png", i, range(i, i + 1)) for i in range(len(seeds))]

    def lists(self, seeds: Sequence[int]) -> Iterator[tuple[str, str]]:
        named = {self.prompts[file.prompt]: file.name for file in self.files(seeds)}
        yield "images.json", json.dumps(named, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Named(PromptSet):
    """`NAME.png`, one file a prompt, with one image or, where `grid` is, four."""

    names: Sequence[str] = ()
    entries: Sequence[Mapping[str, Any]] = ()  # as the benchmark's file has them, where it has more than prompts
    grid: ClassVar[bool] = False
    suffix: ClassVar[str] = ".png"

    def files(self, seeds: Sequence[int]) -> list[ImageFile]:
        each = self.expect_images(seeds, *((1, GRID) if self.grid else (1,)))
        return [
            ImageFile(name + self.suffix, i, range(i * each, (i + 1) * each)) for i, name in enumerate(self.names)
        ]

    def lists(self, seeds: Sequence[int]) -> Iterator[tuple[str, str]]:
        yield from ()


@dataclass(frozen=True)
class Wise(Named):
    """`ID.png`, one image a prompt."""

    format: ClassVar[str] = "wise"


@dataclass(frozen=True)
class Dpg(Named):
    """`ID.png`, an image, or four of them in a grid (upper left, upper right, lower left, lower right)."""

    format: ClassVar[str] = "dpg"
    grid: ClassVar[bool] = True


@dataclass(frozen=True)
class GenAIBench(Named):
    """`ID.jpeg`, one image a prompt."""

    format: ClassVar[str] = "genai"
    suffix: ClassVar[str] = ".jpeg"


@dataclass(frozen=True)
class ImgEdit(Named):
    """`KEY.png`, one edit an instruction."""

    format: ClassVar[str] = "imgedit"


def read_geneval(path: Path) -> GenEval:
    """`evaluation_metadata.jsonl`: objects with `tag`, `include` and `prompt`, one a line."""
    entries = []
    for number, line in _lines(path):
        entry = _object(path, number, line)
        if not all(isinstance(entry.get(key), kind) for key, kind in (("tag", str), ("include", list))):
            raise InputError(f"{path}, line {number}: expected tag and include of GenEval, got {line[:80]}")
        entries.append(entry)
    return GenEval(_unlike(path, [entry["prompt"] for entry in entries]), entries=entries)


def read_geneval2(path: Path) -> GenEval2:
    """GenEval 2's prompts: objects with a `prompt`, one a line or as one list."""
    if path.suffix.lower() == ".json":
        return GenEval2(_unlike(path, [entry["prompt"] for entry in _list(path, "prompt")]))
    return GenEval2(_unlike(path, [_object(path, number, line)["prompt"] for number, line in _lines(path)]))


def read_wise(path: Path) -> Wise:
    """WISE's list, or a folder of its lists: objects with `Prompt` and `prompt_id`. Of a folder `*_rewrite.json` are
    left out, and beside other lists `merge.json`, which repeats them.
    """
    files = [file for file in sorted(path.glob("*.json")) if not file.stem.endswith("_rewrite")]
    files = [file for file in files if file.stem != "merge" or len(files) == 1] if path.is_dir() else [path]
    entries = [entry for file in files for entry in _list(file, "Prompt")]
    names = []
    for entry in entries:
        number = entry.get("prompt_id")
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise InputError(f"{path}: expected a number as prompt_id, got {number!r}")
        names.append(str(number))
    return Wise(tuple(entry["Prompt"] for entry in entries), names=_unlike(path, names), entries=entries)


def read_dpg(path: Path) -> Dpg:
    """DPG-Bench's folder of prompts, each a text file that its ID names."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else []
    if not files:
        raise InputError(f"{path}: expected a folder of prompts (ID.txt), found none")
    return Dpg(tuple(" ".join(_text(file).split()) for file in files), names=tuple(file.stem for file in files))


def read_genai(path: Path) -> GenAIBench:
    """GenAI-Bench's `genai_image.json`: {number: {prompt, ...}}."""
    found = _numbered(path, "prompts")
    return GenAIBench(tuple(one["prompt"] for one in found.values()), names=tuple(found), entries=tuple(found.values()))


def read_edits(path: Path, images: Path) -> PromptSet:
    """Objects with `image`, a file in the folder `images`, and `prompt`, the instruction, one a line."""
    entries = [(number, _object(path, number, line)) for number, line in _lines(path)]
    sources = [_inside(f"{path}, line {number}", images, one, "image") for number, one in entries]
    return PromptSet(tuple(one["prompt"] for _, one in entries), sources)


def read_imgedit(path: Path, images: Path) -> ImgEdit:
    """ImgEdit's object {key: {id, prompt, edit_type}}; `id` is a file in the folder `images`."""
    found = _numbered(path, "instructions")
    sources = [_inside(f"{path}, {key!r}", images, entry, "id") for key, entry in found.items()]
    return ImgEdit(
        tuple(entry["prompt"] for entry in found.values()), sources, tuple(found), entries=tuple(found.values())
    )


def _numbered(path: Path, what: str) -> dict[str, dict[str, Any]]:
    """An object of objects that have a prompt, by their numbers as text."""
    found = _parsed(path, f"an object of {what}")
    if not isinstance(found, dict) or not 0 < len(found) <= MAX_PROMPTS:
        raise InputError(f"{path}: expected an object of 1 to {MAX_PROMPTS} {what}")
    for key, entry in found.items():
        if not (key.isascii() and key.isdigit()) or not isinstance(entry, dict) or not _is_prompt(entry.get("prompt")):
            raise InputError(f'{path}, {key!r}: expected a number and an object with a "prompt", got {str(entry)[:80]}')
    return found


def _inside(where: str, images: Path, entry: Mapping[str, Any], key: str) -> SourceImage:
    """The file of a folder that an entry names; `where` the entry is, for the error."""
    name = entry.get(key)
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{where}: expected a file inside {images} as {key}, got {name!r}")
    return SourceFile(images / name)


EDIT_FORMATS: dict[str, Callable[[Path, Path], PromptSet]] = {
    "plain": read_edits, "imgedit": read_imgedit,
    "gedit": lambda path, _: read_gedit(path), "gedit-en": lambda path, _: read_gedit(path, ("en",)),
}  # fmt: skip
FORMATS: dict[str, Callable[[Path], PromptSet]] = {
    "plain": read_prompts, "geneval": read_geneval, "geneval2": read_geneval2, "wise": read_wise, "dpg": read_dpg,
    "genai": read_genai,
}  # fmt: skip


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: expected a file of at most {MAX_FILE_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"--prompts: {path} cannot be read: {reason}") from error
    if not text.strip():
        raise InputError(f"{path}: expected prompts, found an empty file")
    return text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield number, line


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    """An object with a prompt."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not _is_prompt(found.get("prompt")):
        raise InputError(f'{path}, line {number}: expected an object with a "prompt", got {line[:80]}')
    return found


def _list(path: Path, key: str) -> list[dict[str, Any]]:
    """A JSON list of objects that have a prompt under `key`."""
    found = _parsed(path, f"a JSON list of objects with {key!r}")
    if not isinstance(found, list) or not found or len(found) > MAX_PROMPTS:
        raise InputError(f"{path}: expected a JSON list of 1 to {MAX_PROMPTS} objects with {key!r}")
    for number, entry in enumerate(found):
        if not isinstance(entry, dict) or not _is_prompt(entry.get(key)):
            raise InputError(f"{path}, entry {number}: expected an object with {key!r}, got {str(entry)[:80]}")
    return found


def _parsed(path: Path, what: str) -> Any:
    text = _text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected {what}, which it is not: {error}") from None


def _is_prompt(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip()) and len(text) <= MAX_TEXT_BYTES


def _unlike(path: Path, values: Sequence[str]) -> tuple[str, ...]:
    """Values that name files or prompts; InputError for one that occurs twice, and for none."""
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise InputError(f"{path}: expected each prompt and number once, got {value!r} twice")
        seen.add(value)
    if not values:
        raise InputError(f"{path}: expected prompts, found none")
    return tuple(values)
