"""What is computed once of a source and kept in its cache folder: arrays, such as the sizes of all its images."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spar.common.errors import InputError
from spar.common.files import atomic_file
from spar.processing.images import MAX_BYTES, read_header
from spar.processing.orientation import TAIL_BYTES

HEADER_BYTES = 2**16  # of an image: nearly always enough to contain its size

SIZES = {"version": "2"}  # of what `upright_size` says

Arrays = dict[str, np.ndarray]
Texts = dict[str, str]


def cached_arrays(file: Path, stamp: Texts, compute: Callable[[], tuple[Arrays, Texts]]) -> tuple[Arrays, Texts]:
    """Arrays and texts from a file of this stamp; if it is missing, damaged or has another stamp, computed and kept.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with safe_open(file, framework="numpy") as stored:
            metadata = stored.metadata() or {}
            if stamp.items() <= metadata.items():
                return {name: stored.get_tensor(name) for name in stored.keys()}, metadata  # noqa: SIM118
    except (OSError, SafetensorError):
        pass
    arrays, texts = compute()
    try:
        with atomic_file(file) as temporary:  # ranks that compute the same do not conflict
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary, texts | stamp)
    except OSError as error:
        raise InputError(f"cache: {str(file.parent)!r} cannot be written: {error.strerror or error}") from error
    return arrays, texts


def upright_size(read: Callable[[int, int], bytes]) -> tuple[int, int]:
    """Width and height of an upright image, at most 65535 each; (0, 0) if its header cannot be read.

    Args:
        read: (start, length) to as many bytes of the image, or to all that it has; a start below 0 counts from its end.
    """
    for length in (HEADER_BYTES, MAX_BYTES + 1):  # a large profile may precede a JPEG's size; more bytes are refused
        try:
            data = read(0, length)
            # A PNG's orientation may follow its pixels.
            cut = len(data) == length and data.startswith(b"\x89PNG")
            header = read_header(data, read(-TAIL_BYTES, TAIL_BYTES) if cut else data)
            return min(header.width, 65535), min(header.height, 65535)
        except InputError:
            continue
    return 0, 0


def header_sizes(read: Callable[[int, int, int], bytes], count: int, identity: str, cache: Path | None) -> np.ndarray:
    """Sizes from the images' headers, uint16 [count, 2], cached in the folder under the source's identity.

    Args:
        read: (index, start, length) to those bytes of that sample's image, as `upright_size` reads them.
    """

    def compute() -> tuple[Arrays, Texts]:
        sizes = np.zeros((count, 2), np.uint16)
        for index in range(count):
            sizes[index] = upright_size(partial(read, index))
        return {"sizes": sizes}, {}

    if cache is None:
        return compute()[0]["sizes"]
    return cached_arrays(cache / f"{identity[:24]}.sizes.safetensors", SIZES, compute)[0]["sizes"]
