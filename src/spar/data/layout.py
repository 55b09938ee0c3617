"""What a folder holds: the layouts of img2dataset, of the library `datasets`, and plain folders of images."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from spar.common.errors import InputError
from spar.common.files import open_regular
from spar.common.limits import MAX_INDEX_BYTES
from spar.data.arrow import SPLITS, STATE
from spar.data.captions import parse_json
from spar.data.image_folder import IMAGE_ENDINGS, METADATA
from spar.data.samples import Format

COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_SPLIT_NAME = re.compile(rf"({'|'.join(_SPLITS)})(?=[-_.\d])")
_NESTED = ("train", "data")  # the folders that are read in place of their root


def layout_of(folder: Path) -> tuple[Format, Path]:
    """The format of a folder and the folder that has the samples, which may be its `train` or `data`.

    Raises:
        InputError: it holds nothing of a known format, or cannot be read.
    """
    if found := _layout(folder):
        return found
    names = _names(folder)
    lists = [name for name in names if name.endswith(".json")]
    hint = f"; name one of its lists: {', '.join(lists[:5])}" if lists else ""
    if packed := [name for name in names if name.lower().endswith(COMPRESSED)]:
        hint = f"; decompress {', '.join(packed[:3])} first"
    raise InputError(
        f"expected *.tar, *.parquet, {' or '.join(METADATA)}, images, or what save_to_disk writes in the folder "
        f"{str(folder)!r}, found none{hint}"
    )


def shards_in(folder: Path, ending: str) -> tuple[list[Path], int]:
    """The files of an ending in a folder, by name, and the number left out.

    Where names begin with the names of splits, as in `train-00000-of-00002.parquet`, only those of `train` are read.
    The tables that img2dataset writes beside its shards are no shards.
    """
    names = _shards(_names(folder), ending)
    splits = {name: match[1] for name in names if (match := _SPLIT_NAME.match(name))}
    kept = [name for name in names if splits.get(name, "train") == "train"] if "train" in splits.values() else names
    return [folder / name for name in kept], len(names) - len(kept)


def _layout(folder: Path) -> tuple[Format, Path] | None:
    names = _names(folder)
    if any(name in names for name in METADATA):
        return "folder", folder
    if STATE in names:
        return "arrow", folder
    if SPLITS in names:
        return _layout(folder / _train_split(folder))
    if _shards(names, ".tar"):
        return "webdataset", folder
    if _shards(names, ".parquet"):
        return "parquet", folder
    inner = [name for name in names if os.path.isdir(folder / name)]
    for name in _NESTED:
        # A folder of images named `train` may also be a class, beside others.
        found = _layout(folder / name) if name in inner else None
        if found and (found[0] != "images" or {*inner} <= {*_SPLITS, *_NESTED}):
            return found
    return ("images", folder) if _has_image(folder) else None


def _names(folder: Path) -> list[str]:
    """The names in a folder, without hidden ones, in order."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise InputError(f"expected a folder of samples, but {str(folder)!r}: {error.strerror}") from error


def _shards(names: Sequence[str], ending: str) -> list[str]:
    found = [name for name in names if name.endswith(ending)]
    if ending == ".parquet":  # of NUMBER.parquet beside NUMBER.tar or NUMBER/ the samples are there
        beside = {name.removesuffix(".tar") for name in names if name.removesuffix(".tar").isdecimal()}
        found = [name for name in found if name.removesuffix(ending) not in beside]
    return found


def _train_split(folder: Path) -> str:
    try:
        with open_regular(folder / SPLITS) as file:
            splits = parse_json(file.read(MAX_INDEX_BYTES))["splits"]
        return "train" if "train" in splits else next(name for name in splits if name in _names(folder))
    except (OSError, ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
        raise InputError(f"expected the splits of a data set in {str(folder / SPLITS)!r}, got {error!r}") from error


def _has_image(folder: Path) -> bool:
    return any(
        name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")
        for _, _, names in os.walk(folder) for name in names
    )  # fmt: skip
