"""Image files: output paths, atomic writing, and the metadata of PNGs.

Files are written under a temporary name in their folder and renamed; existing files are kept unless the caller
requests otherwise. A PNG has its metadata as text chunks, which are also read here. Pillow is imported late.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar.checkpoints.bundled import DEFAULT_MODEL
from spar.common.errors import InputError
from spar.common.files import atomic_file

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

MAX_HEADER_BYTES = 4 * 2**20  # of a PNG before its pixels, which contain the metadata

# Keys of an image's metadata and their types: what has a flag of its name, between what it is made of and made with.
FLAGS: dict[str, type] = {
    "negative_prompt": str, "seed": int, "steps": int, "guidance": float, "sampler": str,
    "guidance_interval": str, "step_cache": float, "layout": str, "no_layout": bool,
    "temperature": float, "top_k": int, "top_p": float, "dtype": str, "device": str, "weights": str,
    "compile": bool, "decode_tile": int, "model": str, "adapter": str,
}  # fmt: skip
METADATA_KEYS: dict[str, type] = {
    **dict.fromkeys(("prompt", "instruction", "image", "image_sha256"), str), **FLAGS,
    **dict.fromkeys(("recipe", "commit", "spar", "torch", "transformers", "diffusers"), str),
}  # fmt: skip
BUNDLED_MODEL = DEFAULT_MODEL  # the model's name if no folder was given
EARLIER_NAME = "bundled"  # of the same model, in images of earlier versions
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def output_paths(output: Path | None, names: Sequence[str]) -> list[Path]:
    """Paths of output images: a `.png` file or a folder for one image, a folder for several.

    Args:
        output: a file name that ends in .png, or a folder; by default `out.png` for one image, else `out`.
        names: the images' names inside a folder, without suffix.

    Raises:
        InputError: another kind of image file, or a file for several images.
    """
    if output is None:
        output = Path("out.png" if len(names) == 1 else "out")
    suffix = "" if os.path.isdir(output) else output.suffix.lower()
    if suffix == ".png" and len(names) == 1:
        return [output]
    if suffix == ".png":
        raise InputError(f"output: expected a folder for {len(names)} images, got the file name {str(output)!r}")
    if suffix in IMAGE_SUFFIXES:
        raise InputError(f"output: expected a file name that ends in .png, or a folder, got {str(output)!r}")
    return [output / f"{name}.png" for name in names]


def numbered_names(seeds: Sequence[int]) -> list[str]:
    """Names of images in a folder, without suffix: their numbers and seeds, as "03-seed7"."""
    digits = len(str(len(seeds) - 1))
    return [f"{index:0{digits}}-seed{seed}" for index, seed in enumerate(seeds)]


def check_writable(paths: Iterable[Path], *, overwrite: bool = False) -> None:
    """Refuse files that cannot be written, before any work.

    Raises:
        InputError: a path exists (with `overwrite`: is a folder), is listed twice, or its folder cannot be written.
    """
    paths = list(paths)
    if len(set(paths)) < len(paths):
        raise InputError("output: expected a separate file for each image, but two would have the same name")
    for path in paths:
        if os.path.isdir(path):
            raise InputError(f"output: expected a file to write, but {str(path)!r} is a folder")
        if os.path.lexists(path) and not overwrite:
            raise InputError(f"output: {str(path)!r} exists already; give another name, or --overwrite")
        check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not writable and cannot be created."""
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not os.path.isdir(existing):
        raise InputError(f"output: expected a folder, but {str(existing)!r} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"output: the folder {str(existing)!r} cannot be written")


def save_images(
    images: Sequence["Image.Image"], paths: Sequence[Path], metadata: Sequence[Mapping[str, object]] = ()
) -> None:
    """Write images as PNG, all under temporary names first, then renamed; folders are created.

    Args:
        images: the images to write.
        paths: one path per image; one that ends in .jpeg becomes a JPEG at quality 95, without metadata.
        metadata: one mapping per image, written as text chunks; None values are left out.

    Raises:
        InputError: a file cannot be written; the message names it.
    """
    path = paths[0]
    try:
        with ExitStack() as files:
            for index, (image, path) in enumerate(zip(images, paths, strict=True)):
                temporary = files.enter_context(atomic_file(path))
                kind = "jpeg" if path.suffix == ".jpeg" else "png"
                temporary.write_bytes(encode_image(image, kind, metadata[index] if metadata else {}))
    except OSError as error:
        name = str(error.filename2 or path)
        raise InputError(f"output: {name!r} cannot be written: {error.strerror or error}") from error


def source_metadata(source: Path) -> dict[str, str]:
    """Metadata of the source image: its name and the hash of its content."""
    try:
        with open(source, "rb") as file:
            return {"image": source.name, "image_sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError:  # it existed when it was read
        return {"image": source.name}


def _text_chunks(metadata: Mapping[str, object]) -> "PngInfo":
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in metadata.items():
        if value is not None:
            chunks.add_text(key, str(value).encode(errors="replace").decode())  # a file name may not be valid text
    return chunks


def encode_image(image: "Image.Image", kind: str, metadata: Mapping[str, object]) -> bytes:
    """Encode an image as "png" with its metadata as text chunks, or as "jpeg" or "webp" at quality 95 without."""
    file = BytesIO()
    if kind == "png":
        image.save(file, format="PNG", pnginfo=_text_chunks(metadata))
    else:
        image.save(file, format=kind.upper(), quality=95)
    return file.getvalue()


@dataclass(frozen=True)
class PngMetadata:
    """An image's size in pixels, and its metadata."""

    width: int
    height: int
    values: dict[str, Any]

    def reproduce_command(self) -> list[str]:
        """The command that reproduces the image; its inputs are named as in the metadata, without their folders.

        Missing names are IMAGE and MODEL, for the reader to replace.
        """
        metadata, image = self.values, self.values.get("image", "IMAGE")
        if "prompt" in metadata:
            words, size = ["generate", metadata["prompt"]], [f"--height={self.height}", f"--width={self.width}"]
        else:
            words = ["edit", image, metadata["instruction"]] if "instruction" in metadata else ["reconstruct", image]
            size = []
        values = {"model": "MODEL", **metadata}
        if values["model"] in (BUNDLED_MODEL, EARLIER_NAME):
            del values["model"]
        flags = [
            f"--{name.replace('_', '-')}" + ("" if kind is bool else f"={values[name]}")
            for name, kind in FLAGS.items() if values.get(name, False) is not False
        ]
        if any(word.startswith("-") for word in words[1:]):  # a word that is not a flag
            return ["spar", words[0], *size, *flags, "--", *words[1:]]
        return ["spar", *words, *size, *flags]


def read_metadata(path: str | Path) -> PngMetadata:
    """Read the metadata of a PNG written by spar, from its header: no pixel is decoded, other keys are ignored.

    Raises:
        InputError: a missing or damaged file, another format, or missing or invalid metadata.
    """
    from PIL import Image, UnidentifiedImageError

    path, expected = Path(path), "expected a PNG written by spar, or a folder of weights"
    try:
        if not path.is_file():
            raise InputError(f"{expected}, but there is no file {str(path)!r}")
        with path.open("rb") as file:
            header = file.read(MAX_HEADER_BYTES)
        with Image.open(BytesIO(header), formats=("PNG",)) as image:
            size, texts = image.size, {key: str(value) for key, value in image.info.items() if key in METADATA_KEYS}
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{expected}, got {str(path)!r}, which is not a PNG") from None
    except Exception as error:  # a hostile header makes Pillow raise nearly anything
        raise InputError(f"{expected}, but {str(path)!r} cannot be read: {error}") from error
    if "spar" not in texts:
        raise InputError(f"{expected}, got {str(path)!r}, which has no metadata of spar")
    return PngMetadata(*size, {key: _parse_value(key, texts[key]) for key in METADATA_KEYS if key in texts})


def _parse_value(key: str, text: str) -> Any:
    try:
        return METADATA_KEYS[key](text)
    except ValueError:
        raise InputError(f"expected metadata of spar, got {key} {text[:40]!r}, which is not a number") from None


def list_images(folder: Path) -> list[Path]:
    """List the image files directly in a folder, by name.

    Raises:
        InputError: the folder cannot be read or has no images.
    """
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    except OSError as error:
        raise InputError(f"expected a folder of images, but {str(folder)!r}: {error.strerror or error}") from error
    if not found:
        raise InputError(f"expected images ({' '.join(IMAGE_SUFFIXES)}) in {str(folder)!r}, found none")
    return found


def check_replaceable(folder: Path, mark: str, *, overwrite: bool = False) -> None:
    """Refuse a folder that an output may not create or replace.

    Args:
        folder: the output folder.
        mark: a file that every such output has: a folder without it has other contents and is never replaced.
        overwrite: whether an earlier output may be replaced.

    Raises:
        InputError: the folder is not empty and may not be replaced, or cannot be written.
    """
    check_folder(folder)
    if not os.path.isdir(folder) or not any(folder.iterdir()):
        return
    if not (folder / mark).is_file():
        raise InputError(f"output: the folder {str(folder)!r} has other contents; give another name")
    if not overwrite:
        raise InputError(f"output: {str(folder)!r} exists already; give another name, or --overwrite")
