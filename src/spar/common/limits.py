"""Limits of the pipeline, the command line and the server, and of data sets.

This module imports no heavy library, so that a wrong number is refused before any is imported.
"""

import math
from numbers import Integral, Real
from typing import Any

from spar.common.errors import InputError

MAX_STEPS = 1000
MAX_GUIDANCE = 100
MAX_TEMPERATURE = 100
MAX_TOP_K = 2**20
MAX_SEED = 2**63 - 1
MAX_IMAGES = 4096
MAX_LABELS = 65536  # of one zero-shot classification
MAX_NEW_TOKENS = 2048
MAX_MESSAGES = 256
MAX_PARTS = 64
MAX_CHAT_IMAGES = 16
MAX_IMAGE_TILES = 40  # of one image to answer about, without the whole beside them
MAX_CHAT_TOKENS = 8192  # of a whole conversation with its answer, also if the model could take more
MAX_TILE = 1024
MAX_WORKERS = 256

# Of a data set; limits of images (bytes, pixels) are in `processing.images`.
MAX_SHARDS = 100_000  # files that match one pattern
MAX_MEMBERS = 4_000_000  # members of one tar
MAX_EXTENDED_HEADER = 2**20  # bytes of a tar's long name or pax record
MAX_TEXT_BYTES = 2**20  # a caption, a json member, a line of metadata.jsonl
MAX_INPUT_IMAGES = 8  # references of one edit
MAX_REASONS = 16  # kinds of entries of a data set that are not read, each with its count
MAX_INDEX_BYTES = 2**24  # the lines that name the lists of GPT-Image-Edit
MAX_ANNOTATION_BYTES = 4 * 2**30  # a JSON list of samples, which is parsed in memory
MAX_ROW_GROUP_BYTES = 4 * 2**30  # a parquet row group, which is read in whole


def one_reference(count: int | str) -> str:
    """What an edit of another number of reference images is refused with, by pipeline, API, page and training alike."""
    return f"expected one reference image for each edit, got {count}: the model is trained for edits of one"


def check_range(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Refuse a value that is not a number in [low, high] (NaN is in no range); None, "not given", is accepted.

    Raises:
        InputError: with the expected and the given value.
    """
    if value is None:
        return
    known = isinstance(value, Real) and not isinstance(value, bool)  # numpy's too
    if not known or not low <= value <= high:
        raise InputError(f"{name}: expected {_range(low, high)}, got {value!r}")


def check_int_range(name: str, value: Any, low: int, high: float = math.inf) -> None:
    """Refuse a value that is not a whole number in [low, high]; None is refused too.

    Raises:
        InputError: with the expected and the given value.
    """
    known = isinstance(value, Integral) and not isinstance(value, bool)
    if not known or not low <= value <= high:
        raise InputError(f"{name}: expected {_range(low, high)}, got {value!r}")


def _range(low: float, high: float) -> str:
    return f"{low} or more" if high == math.inf else f"{low} to {high}"
