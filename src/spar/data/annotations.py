"""Published formats of sample lists: ShareGPT-4o-Image, GPT-Image-Edit, LLaVA's conversations."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spar.common.errors import InputError
from spar.common.files import open_regular
from spar.common.limits import MAX_ANNOTATION_BYTES, MAX_INDEX_BYTES, MAX_INPUT_IMAGES
from spar.data.captions import first_text, is_text, parse_json
from spar.data.image_files import ImageFileSource, ListedSample, local_path
from spar.data.samples import count_reason


def open_sharegpt(path: Path, cache: Path | None = None) -> ImageFileSource:
    """Open `text_to_image.json` or `text_and_image_to_image.json` of ShareGPT-4o-Image, with images in its folder."""

    def rows() -> Iterator[ListedSample]:
        for place, item in enumerate(_read_list(path)):
            try:
                text = item["input_prompt"]
                if not is_text(text):
                    raise ValueError(f"expected text, got {type(text).__name__}")
                inputs = image_paths(item.get("input_image") or [])
                yield ListedSample(inputs, _string(item["output_image"]), first_text(text).strip())
            except (KeyError, ValueError, AttributeError, TypeError) as error:
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
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_INDEX_BYTES:
                raise InputError(f"expected an index of at most {MAX_INDEX_BYTES} bytes, but {str(path)!r} has {size}")
            text = file.read()
        lines = [line.strip() for line in text.decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected an index of GPT-Image-Edit, but {str(path)!r}: {error}") from error
    for number, line in enumerate(lines):
        parts = [part.strip() for part in line.rsplit(",", 2)]
        if len(parts) != 3:
            raise InputError(f"expected lines image_root,annotation.json,flag in {str(path)!r}, got {line!r}")
        root, annotation = (local_path(path.parent, part) for part in parts[:2])
        roots.append(root)
        rows += [_gpt_edit_row(item, number) for item in _read_list(annotation)]
    kept = [row for row in rows if row is not None]
    skipped = {"entry that the format leaves out": len(rows) - len(kept)} if len(kept) < len(rows) else {}
    return ImageFileSource(str(path), "gptedit", roots, kept, skipped=skipped, cache=cache)


def _gpt_edit_row(item: Any, root: int) -> ListedSample | None:
    """A row, or None for an item that is not one input, one output and an instruction."""
    try:
        source, target = image_paths(item["image"])
        instruction = next(turn["value"] for turn in item["conversations"] if turn["from"] == "human")
        text = " ".join(_string(instruction).replace("<image>", " ").split())
    except (KeyError, TypeError, ValueError, StopIteration):
        return None
    return ListedSample((source,), target, text, root)


# Who speaks in a turn, by the names of the public sets.
_ASKS, _SAYS = {"human", "user"}, {"gpt", "assistant"}
_PLACE = "<image>"
SNIFFED = 1 << 20  # bytes at the start of a list, in which a set of conversations says that it is one


def is_llava(path: Path) -> bool:
    """Whether a JSON list is one of conversations, by its first SNIFFED bytes; False where they cannot be read."""
    try:
        with open_regular(path) as file:
            return b'"conversations"' in file.read(SNIFFED)
    except (OSError, InputError):
        return False


def open_llava(path: Path, cache: Path | None = None) -> ImageFileSource:
    """Open a list of conversations about images as LLaVA has them, with images in its folder.

    Items are `{"image": PATH, "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}`.
    `<image>` is removed, since an image comes first here, as are system turns and a last question without an answer.
    Items of no image, of several, with a question that is the image alone, or whose turns do not alternate are counted
    as skipped.
    """
    skipped: dict[str, int] = {}

    def rows() -> Iterator[ListedSample]:
        for place, item in enumerate(_read_list(path)):
            try:
                images = item.get("image") or []
                paths = [_string(one) for one in ([images] if isinstance(images, str) else images)]
                turns = _turns(item["conversations"])
            except (KeyError, ValueError, AttributeError, TypeError) as error:
                wanted = "expected image and conversations, each turn with from and value"
                raise InputError(f"{wanted} in {str(path)!r}, item {place}: {error!r}") from error
            if len(paths) != 1:
                count_reason(skipped, f"conversation about {'several images' if paths else 'no image'}")
            elif not turns:
                count_reason(skipped, "conversation whose turns do not alternate")
            elif not all(question for question, _ in turns):
                count_reason(skipped, "conversation with a turn of the image alone")
            else:
                yield ListedSample((), paths[0], "", turns=turns)

    return ImageFileSource(str(path), "llava", [path.parent], rows(), skipped=skipped, cache=cache)


def _turns(conversations: Any) -> tuple[tuple[str, str], ...]:
    """Questions and answers of a conversation; none where they do not alternate. A last question is left out."""
    spoken = [(turn["from"], _string(turn["value"])) for turn in conversations]
    spoken = [(who, text) for who, text in spoken if who != "system"]
    if len(spoken) % 2:
        spoken = spoken[:-1]
    asked, said = spoken[::2], spoken[1::2]
    if not {who for who, _ in asked} <= _ASKS or not {who for who, _ in said} <= _SAYS:
        return ()
    return tuple(
        (question.replace(_PLACE, " ").strip(), answer)
        for (_, question), (_, answer) in zip(asked, said, strict=True)
    )


def _read_list(path: Path) -> list[Any]:
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_ANNOTATION_BYTES:
                raise ValueError(f"it has {size} bytes, more than {MAX_ANNOTATION_BYTES}")
            values = parse_json(file.read())
    except OSError as error:
        raise InputError(f"expected a JSON list of samples, but {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected a JSON list of samples in {str(path)!r}: {error}") from error
    if not isinstance(values, list):
        raise InputError(f"expected a JSON list of samples in {str(path)!r}, got {type(values).__name__}")
    return values


def image_paths(value: Any) -> tuple[str, ...]:
    """The paths of a sample's images, of one or of a list; ValueError for anything else, or too many."""
    paths = tuple(map(_string, [value] if isinstance(value, str) else value))
    if len(paths) > MAX_INPUT_IMAGES:
        raise ValueError(f"more than {MAX_INPUT_IMAGES} images")
    return paths


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {type(value).__name__}")
    return value
