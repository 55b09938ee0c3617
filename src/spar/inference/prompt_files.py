"""Images of a file of prompts, in a folder that a later call goes on with, shared out over processes.

`generation.json` has all that the images depend on; a call with something else is refused. A plain folder is a data
set: its `metadata.jsonl` has the file and the prompt of every image. Benchmarks have layouts of their own
(`spar.evaluation.prompt_formats`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from PIL import Image
from torch import Tensor, nn

from spar.common.config import read_json, write_json
from spar.common.errors import InputError
from spar.common.files import atomic_file, is_temporary
from spar.common.limits import MAX_TEXT_BYTES, check_range
from spar.common.process_group import ProcessGroup
from spar.common.progress import Advance
from spar.common.seeds import list_seeds
from spar.inference.base import Pipeline
from spar.inference.contact_sheet import contact_sheet
from spar.inference.image_files import numbered_names, read_metadata, save_images, source_metadata
from spar.processing.images import ImageSource, open_image

FORMAT, SETTINGS, LIST = "spar-images", "generation.json", "metadata.jsonl"
SUFFIXES = {".png": "PNG", ".jpeg": "JPEG"}  # and what Pillow calls them
OTHER_FORMATS = (".json", ".csv", ".tsv", ".yaml", ".yml", ".parquet")  # whose lines are no prompts
MAX_PROMPTS, MAX_FILES = 10**6, 10**7
DIGEST_NUMBERS = 64  # of each tensor


@dataclass(frozen=True)
class ImageFile:
    """A file, the number of its prompt, and those of the images that it shows, a grid of them if several."""

    name: str
    prompt: int
    images: range


class SourceImage(Protocol):
    """An image that is edited, wherever it lies."""

    @property
    def name(self) -> str: ...

    def exists(self) -> bool: ...

    def read(self) -> ImageSource: ...

    def metadata(self) -> dict[str, str]:
        """What an edit of it says of it."""


@dataclass(frozen=True)
class SourceFile:
    """An image in a file of its own."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def exists(self) -> bool:
        return self.path.is_file()

    def read(self) -> ImageSource:
        return self.path

    def metadata(self) -> dict[str, str]:
        return source_metadata(self.path)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and the files that their images become; with `sources`, an image each, they are edits of these."""

    prompts: Sequence[str]
    sources: Sequence[SourceImage] = ()
    format: ClassVar[str] = "plain"

    def files(self, seeds: Sequence[int]) -> list[ImageFile]:
        """The files of the images, which have these seeds, those of a prompt one after the other."""
        each = len(seeds) // len(self.prompts)
        names = numbered_names(seeds)
        return [ImageFile(f"{name}.png", i // each, range(i, i + 1)) for i, name in enumerate(names)]

    def lists(self, seeds: Sequence[int]) -> Iterator[tuple[str, str]]:
        """Names and contents of the text files beside the images, which are written last."""
        rows = [
            {"file_name": file.name, "text": self.prompts[file.prompt], "seed": seeds[file.images[0]]}
            for file in self.files(seeds)
        ]
        yield LIST, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def expect_images(self, seeds: Sequence[int], *allowed: int) -> int:
        """Images of a prompt; InputError for a number that a format has no files for."""
        each = len(seeds) // len(self.prompts)
        if each not in allowed:
            expected = " or ".join(map(str, allowed))
            raise InputError(f"--num-images-per-prompt: expected {expected} of {self.format}, got {each}")
        return each

    def copies(self) -> Mapping[str, SourceImage]:
        """Images of the benchmark's own that its scorer wants beside the edits, by their names there."""
        return {}


def read_prompts(path: Path) -> PromptSet:
    """The prompts of a text file, one a line, or the `prompt` of each object of a .jsonl file; empty lines are skipped.

    Raises:
        InputError: an unreadable file, one of another format by its name, no prompts or too many, or a line that has
            none, with its number.
    """
    if path.suffix.lower() in OTHER_FORMATS:
        raise InputError(f"{path}: expected a text with a prompt a line, or .jsonl, got a {path.suffix} by its name")
    prompts: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_TEXT_BYTES + 2), ""), 1):
                if len(line.rstrip("\r\n")) > MAX_TEXT_BYTES:
                    raise InputError(f"{path}, line {number}: expected at most {MAX_TEXT_BYTES} characters")
                if line.strip():
                    prompts.append(_prompt(path, number, line.strip()))
                if len(prompts) > MAX_PROMPTS:
                    raise InputError(f"{path}: expected at most {MAX_PROMPTS} prompts")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"--prompts: {path} cannot be read: {reason}") from error
    if not prompts:
        raise InputError(f"{path}: expected a prompt a line, found none")
    return PromptSet(tuple(prompts))


def _prompt(path: Path, number: int, line: str) -> str:
    if path.suffix.lower() != ".jsonl":
        return line
    try:
        text = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{path}, line {number}: expected an object with a "prompt", got {line[:80]}')
    return text


def begin(
    folder: Path, pipe: Pipeline, given: PromptSet, group: ProcessGroup, *, seed: int | None, each: int,
    settings: Mapping[str, Any],
) -> list[int]:  # fmt: skip
    """Make the folder, or check that the same call began it; the seed of every image.

    Raises:
        InputError: a prompt that the model does not take, an image that is not there, or a folder with something else.
    """
    if missing := [source for source in given.sources if not source.exists()]:
        raise InputError(f"expected the images of all instructions, {len(missing)} are missing, first {missing[0]}")
    for number, text in enumerate(given.prompts, 1):
        try:
            pipe.check_text(text, "prompt")
        except InputError as error:
            raise InputError(f"prompt {number} of {len(given.prompts)}: {error}") from None
    count = len(given.prompts) * each
    check_range("images in all", count, 1, MAX_FILES)
    given.files(range(count))  # refuses a number of images that the format has no files for
    wanted = {
        **_identity(given),
        "images": count,
        "images_per_prompt": each,
        "settings": {name: value for name, value in settings.items() if value is not None},
        "model": {name: value for name, value in pipe.run_metadata().items() if name != "device"},
        "weights": weights_digest(pipe.model),
    }

    def begun() -> int:
        if (folder / SETTINGS).is_file() and any(file.suffix in SUFFIXES for file in folder.rglob("*")):
            found = read_json(folder / SETTINGS)
            first: Any = found.get("seed") if seed is None else seed
            _compare(folder, found, {**wanted, "seed": first})
        elif folder.exists() and (not folder.is_dir() or not _is_unused(folder)):
            raise InputError(f"{folder}: expected an empty or new folder, or one that the same call began")
        else:  # also where the settings were refused before the first image
            first = list_seeds(seed, count)[0]
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / SETTINGS, {**wanted, "seed": first})
        return int(first)

    return list_seeds(group.main_only(begun), count)


def _is_unused(folder: Path) -> bool:
    """Whether a folder is empty, or has no more than what a call leaves that was stopped before its first image."""
    if not (folder / SETTINGS).is_file():
        return not any(folder.iterdir())
    left = (file for file in folder.rglob("*") if not file.is_dir() and file != folder / SETTINGS)
    return all(is_temporary(file) for file in left)


def weights_digest(model: nn.Module) -> str:
    """A digest of the beginnings of all weights, which a training or an adapter changes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if type(value) is Tensor:  # no quantised one, whose origin was read by now
            first = value.detach().flatten()[:DIGEST_NUMBERS].float().cpu().numpy()
            digest.update(f"{name} {tuple(value.shape)}".encode() + first.tobytes())
    return digest.hexdigest()


def _identity(given: PromptSet) -> dict[str, Any]:
    asked = json.dumps([list(given.prompts), [source.name for source in given.sources]])
    digest = hashlib.sha256(asked.encode()).hexdigest()
    found = {"format": FORMAT, "files": given.format, "prompts": digest}
    if given.sources:
        pictures = json.dumps([source.metadata() for source in given.sources])
        found["pictures"] = hashlib.sha256(pictures.encode()).hexdigest()
    return found


def _compare(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(f"{folder} was begun with another {name}: expected {found.get(name)!r}, got {value!r}")


def draw(
    folder: Path, pipe: Pipeline, given: PromptSet, seeds: Sequence[int], group: ProcessGroup, *, batch: int,
    settings: Mapping[str, Any], advance: Advance | None = None,
) -> int:  # fmt: skip
    """Draw the files that the folder lacks, each process its share; how many this process has drawn."""
    files = given.files(seeds)
    left = group.main_only(lambda: [file for file in files if not (folder / file.name).is_file()])
    own = group.share(left)
    for done, some in _batches(own, 1 if given.sources else batch):  # images of one call share their proportions
        texts = [given.prompts[file.prompt] for file in some for _ in file.images]
        asked = {**settings, "seed": [seeds[i] for file in some for i in file.images]}
        if given.sources:
            (source,) = (given.sources[file.prompt] for file in some)
            out, origin = pipe.edit([source.read()] * len(texts), texts, **asked), source.metadata()
        else:
            out, origin = pipe.generate(texts, **asked), {}
        rows = iter(zip(out.images, [values | origin for values in out.metadata], strict=True))
        shown = [[next(rows) for _ in file.images] for file in some]
        whole = [one[0][0] if len(one) == 1 else contact_sheet([image for image, _ in one], 2, gap=0) for one in shown]
        save_images(whole, [folder / file.name for file in some], [one[0][1] for one in shown])
        if advance:
            advance(done, len(own))
    group.barrier()
    if group.main:
        if missing := [file.name for file in files if not (folder / file.name).is_file()]:
            raise InputError(f"{folder}: {len(missing)} images are missing, first {missing[0]}: run it again")
        for name, text in given.lists(seeds):
            with atomic_file(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        for name, source in given.copies().items():
            if not (folder / name).is_file():
                save_images([open_image(source.read())], [folder / name])
    return len(own)


def _batches(files: Sequence[ImageFile], size: int) -> Iterator[tuple[int, list[ImageFile]]]:
    """Files with about `size` images together, and how many files are done after them."""
    some: list[ImageFile] = []
    for done, file in enumerate(files, 1):
        some.append(file)
        if done == len(files) or sum(len(one.images) for one in some) + len(file.images) > size:
            yield done, some
            some = []


def check(folder: Path, given: PromptSet) -> list[str]:
    """What a folder of images lacks or has wrong, a sentence each; nothing if it is complete.

    Raises:
        InputError: a folder that no such call began, or a picture that cannot be read.
    """
    found = read_json(folder / SETTINGS)
    if missing := [source for source in given.sources if not source.exists()]:
        raise InputError(f"expected the images of all instructions, {len(missing)} are missing, first {missing[0]}")
    _compare(folder, found, _identity(given))
    seed, count = found.get("seed"), found.get("images")
    if not isinstance(seed, int) or not isinstance(count, int) or count < 1 or count % len(given.prompts):
        raise InputError(f"{folder / SETTINGS}: expected a seed and a number of images, got {seed!r} and {count!r}")
    seeds = list_seeds(seed, count)
    wrong = []
    for file in given.files(seeds):
        key = "instruction" if given.sources else "prompt"
        wrong += _faults(folder, file.name, key, given.prompts[file.prompt])
    for name in given.copies():
        wrong += _faults(folder, name)
    for name, text in given.lists(seeds):
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            wrong.append(f"{name} is missing or differs: run the same call again")
    return wrong


def _faults(folder: Path, name: str, key: str = "", text: str = "") -> list[str]:
    """What is wrong with an image file, or with the text under a key of its metadata; a JPEG has none."""
    path, said = folder / name, None
    try:
        with Image.open(path, formats=(SUFFIXES[path.suffix],)) as image:
            image.load()
        if key and path.suffix == ".png":
            said = read_metadata(path).values.get(key)
    except FileNotFoundError:
        return [f"{name} is missing"]
    except (OSError, SyntaxError, ValueError) as error:
        return [f"{name} is damaged: {error}"]
    return [] if said in (None, text) else [f"{name} shows another prompt: {said!r}"]
