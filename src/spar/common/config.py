"""Strict, frozen configuration: dataclasses to JSON and back, without ignored or guessed fields.

Defaults are only in the dataclasses. A field that is unknown, missing or of the wrong type raises `InputError`.
"""

import dataclasses
import json
import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from spar.common.errors import InputError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a frozen dataclass to a nested dictionary of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: dict[str, Any], where: str = "", *, complete: bool = False) -> T:
    """Build `cls` from a dictionary; nested dataclasses and tuples are rebuilt, unknown fields raise.

    `complete` is for files that this package wrote: a missing field raises too, instead of taking the current default.
    """
    name = where or cls.__name__
    if not isinstance(values, dict):
        raise InputError(f"{name}: expected an object with fields, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(f"{name}: unknown field {', '.join(unknown)}; known fields are {', '.join(sorted(known))}")
    try:
        built = {key: _parse_value(hints[key], value, f"{name}.{key}", complete) for key, value in values.items()}
        if complete and known - set(values):
            raise InputError(f"{name}: missing field {', '.join(sorted(known - set(values)))}")
        return cls(**built)
    except TypeError as error:
        raise InputError(f"{name}: {error}") from error


def differences(a: Any, b: Any, where: str) -> list[tuple[str, Any, Any]]:
    """(field, value in `a`, value in `b`) for each field in which two configurations of one class differ."""
    found: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(a):
        name, one, other = f"{where}.{item.name}", getattr(a, item.name), getattr(b, item.name)
        if dataclasses.is_dataclass(one):
            found += differences(one, other, name)
        elif one != other:
            found.append((name, one, other))
    return found


def merge_overrides(target: T, base: T, changed: T) -> T:
    """`target` with every field in which `changed` differs from `base`."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(target):
        own, old, new = (getattr(config, item.name) for config in (target, base, changed))
        values[item.name] = (
            merge_overrides(own, old, new) if dataclasses.is_dataclass(own) else (new if new != old else own)
        )
    return type(target)(**values)


def _parse_value(hint: Any, value: Any, where: str, complete: bool) -> Any:
    """Convert a JSON value to the type of the hint, or raise."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _parse_value(next(a for a in arguments if a is not type(None)), value, where, complete)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where, complete=complete)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: expected a list, got {value!r}")
        if arguments[-1] is Ellipsis:
            return tuple(_parse_value(arguments[0], item, f"{where}[{i}]", complete) for i, item in enumerate(value))
        if len(arguments) != len(value):
            raise InputError(f"{where}: expected {len(arguments)} values, got {len(value)}")
        pairs = zip(arguments, value, strict=True)
        return tuple(
            _parse_value(argument, item, f"{where}[{i}]", complete) for i, (argument, item) in enumerate(pairs)
        )
    if origin is typing.Literal:
        if value not in arguments:
            raise InputError(f"{where}: expected one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and hint in (int, float, str, bool) and type(value) is not hint:
        raise InputError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; a missing or malformed file raises `InputError` naming it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing in {path.parent}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON with a final newline to a temporary file and rename it: a reader sees the old or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
