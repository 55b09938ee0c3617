"""tyro parses the arguments of a verb; its errors, which are boxes, become one `InputError` each."""

import contextlib
import difflib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TypeVar

import tyro
from tyro.conf import DisallowNone
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from spar.common.errors import InputError
from spar.common.files import home_expanded

LIKENESS = 0.45  # of a flag that is suggested; tyro's own are often far off
T = TypeVar("T")
Verb = Callable[[list[str]], int]  # from its words to the exit status


def takes(kind: type[T], prog: str) -> Callable[[Callable[[T], int]], Verb]:
    """Decorate a function of parsed arguments: it becomes a verb, which parses its words."""

    def decorate(function: Callable[[T], int]) -> Verb:
        @wraps(function)
        def verb(argv: list[str]) -> int:
            return function(parse(kind, argv, prog))

        return verb

    return decorate


def parse(kind: type[T], argv: Sequence[str], prog: str, *, none: bool = False) -> T:
    """Parse a verb's arguments; `--help` prints and raises SystemExit(0).

    Args:
        none: whether a flag accepts the value None, as for an optional field of a recipe.

    Raises:
        InputError: tyro or the dataclasses refuse an argument; the message is one sentence.
    """
    output = io.StringIO()
    helped = bool({"-h", "--help"} & set(argv))
    try:
        with contextlib.nullcontext() if helped else _capture_errors(output):
            config = () if none else (DisallowNone,)
            return tyro.cli(kind, args=list(argv), prog=prog, config=config, registry=_PATHS)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise InputError(_sentence(output.getvalue(), prog))


def read_path(text: str) -> Path:
    """The path that a word names: `~` is the home folder, which no shell puts in after `--flag=`.

    Raises:
        InputError: an empty word, as of a shell's variable that is not set: it would be the working folder; or "-".
    """
    if not text:
        raise InputError("expected a path, got an empty text")
    if text == "-":
        raise InputError("expected a path, got '-': neither standard input nor output is used (a file of it: ./-)")
    return Path(home_expanded(text))


_PATHS = ConstructorRegistry()


@_PATHS.primitive_rule
def _path_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1, metavar="PATH", instance_from_str=lambda words: read_path(words[0]),
        is_instance=lambda value: isinstance(value, Path), str_from_instance=lambda value: [str(value)],
    )  # fmt: skip


@contextlib.contextmanager
def _capture_errors(output: io.StringIO) -> Iterator[None]:
    """Redirect tyro's errors to `output`, in ASCII, without colours and without line breaks."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


# Messages of tyro and Python, and our replacements.
_ERROR_PATTERNS = (
    (r"^Error parsing (-\S+):\s*", r"\1: "),
    (r"^Error parsing (stages\.\S+\.\S+):\s*", r"\1: "),  # a stage names itself, its objective and data do not
    (r"^Error parsing [^-\s]\S*:\s*", ""),
    (r"no type matching .* could be instantiated from .*Got errors:.*- <class '[^']*'>: ", ""),
    (r"invalid literal for int\(\) with base 10: ", "expected a whole number, got "),
    (r"could not convert string to float: ", "expected a number, got "),
    (r"^Missing value for argument '(.*?)'\. Expected 1 values?\..*", r"\1: expected a value, got none"),
    (r"^Missing value for argument '(.*?)'\. Expected (\d+) values\..*", r"\1: expected \2 values, got fewer"),
    (r"Could not find valid parse for arguments: ", "expected values of its type, none of them empty, got "),
    (r"^invalid choice (.*?) for argument '(.*?)'\. Expected one of \((.*?),?\)\.", r"\2: expected one of \3, got \1"),
)


def _sentence(box: str, prog: str) -> str:
    """Convert tyro's box (a title, the error, hints, separated by rules) to one line."""
    sections = re.split(r"^\s*-+\s*$", box, flags=re.MULTILINE)
    sentence = " ".join(sections[min(1, len(sections) - 1)].split())
    if unknown := re.fullmatch(r"Unrecognized options?: (.*)", sentence):
        near = [part for part in sections[2:] if "Perhaps you meant" in part]
        flags = [flag.rstrip(",") for flag in re.findall(r"^\s*(--\S+)", near[0], re.MULTILINE)] if near else []
        given = re.split("[,=]", unknown[1])[0]
        meant = difflib.get_close_matches(given, flags, 5, LIKENESS)
        hint = f"; perhaps you meant {' or '.join(meant)}" if meant else ""
        return f"unknown arguments: {unknown[1]}{hint} ({prog} --help lists all)"
    if missing := re.match(r"Missing from [^:]*: (\S+)", sentence):
        return f"expected {missing[1]}, got nothing ({prog} --help lists all)"
    for pattern, ours in _ERROR_PATTERNS:
        sentence = re.sub(pattern, ours, sentence)
    return sentence.rstrip(".")
