"""The caption of a sample: where it lies in foreign fields, and what text is fit to be one."""

import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from spar.common.limits import MAX_TEXT_BYTES
from spar.data.samples import BadSample

# Names of a caption in every format, the more specific first.
CAPTION_FIELDS = ("instruction", "edit_prompt", "input_prompt", "caption", "text", "txt", "prompt", "captions")

_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Zs"}  # categories: control, format, separators
# Letters and marks that show nothing: fillers, the empty braille cell, joiners.
_BLANKS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")


def clean_caption(text: str, key: str, origin: str) -> str:
    """A caption without a byte order mark and without spaces around it; empty if there is none.

    Raises:
        BadSample: the text is no Unicode, contains NUL, is too long, or shows nothing.
    """

    def bad(got: str) -> BadSample:
        return BadSample(key, origin, f"its text cannot be read: {got}")

    text = text.removeprefix("\ufeff").strip()
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise bad(f"expected Unicode, got half a surrogate pair or bytes that are not UTF-8 ({found})") from None
    if size > MAX_TEXT_BYTES:
        raise bad(f"expected at most {MAX_TEXT_BYTES} bytes, got {size}")
    if "\0" in text:
        raise bad(f"expected a caption, got a NUL at character {text.index(chr(0))}")
    if text and all(map(_shows_nothing, text)):
        raise bad(f"expected a caption, got {len(text)} characters that show nothing, as {text[0]!a}")
    return text


def decode_caption(data: bytes) -> str:
    """The text of a file of UTF-8, to be cleaned by `clean_caption`; a byte that is not UTF-8 is half a pair there.

    Raises:
        ValueError: the file has another encoding, by its byte order mark.
    """
    if data.startswith(_BYTE_ORDER_MARKS):
        raise ValueError("expected UTF-8, got UTF-16, by its byte order mark")
    return data.decode("utf-8", "surrogateescape")


def caption_of(values: Mapping[str, Any]) -> str:
    """The first caption among the fields of CAPTION_FIELDS; empty if there is none."""
    return next((text for name in CAPTION_FIELDS if (text := first_text(values.get(name))).strip()), "")


def caption_in_json(data: bytes | str) -> str:
    """The caption of a JSON object; empty if it has none.

    Raises:
        ValueError: the data are not JSON.
        RecursionError: they are nested too deeply.
    """
    values = parse_json(data)
    return caption_of(values) if isinstance(values, dict) else ""


def parse_json(data: bytes | str) -> Any:
    """Parse JSON, with None for NaN and infinity: what pandas writes for a missing text."""
    return json.loads(data, parse_constant=lambda _: None)


def first_text(value: Any) -> str:
    """A text, or the first one of a list of captions that is not empty; empty for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return next((text for text in value if isinstance(text, str) and text.strip()), "")
    return ""


def is_text(value: Any) -> bool:
    """Whether a value may be a caption: text, texts, or nothing (None, NaN)."""
    if isinstance(value, list | tuple):
        return all(isinstance(one, str) or is_missing(one) for one in value)
    return isinstance(value, str) or is_missing(value)


def is_missing(value: Any) -> bool:
    """Whether a value is None or NaN, which pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _shows_nothing(character: str) -> bool:
    # U+FE00 to U+FE0F and U+E0100 to U+E01EF select the variant of the character before them.
    selector = 0xFE00 <= ord(character) <= 0xFE0F or 0xE0100 <= ord(character) <= 0xE01EF
    return selector or character in _BLANKS or unicodedata.category(character) in _INVISIBLE
