"""Strict, frozen configuration: dataclasses to JSON and back, without ignored or guessed fields.

Defaults are only in the dataclasses. A field that is unknown, missing or of the wrong type raises `InputError`.
A dataclass with a class variable `kind` writes it beside its fields, and a `Registry` finds the class again: a file
names kinds, never import paths.
"""

import dataclasses
import json
import math
import stat
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar

from spar.common.errors import InputError
from spar.common.files import atomic_file


class DataclassLike(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=DataclassLike)


Registry = Mapping[type, Mapping[str, type]]  # of each base class its kinds by name
NO_KINDS: Registry = MappingProxyType({})
_NO_RESULT = "no result depends on it"
MAX_JSON_BYTES = 64 * 2**20  # parsed, a file takes up to twenty times its bytes
MAX_INT = 2**63 - 1  # of a configuration's numbers: what torch takes as a size


def by_kind(classes: Iterable[Any]) -> dict[str, type]:
    """Classes by their `kind`; ValueError where two have the same one."""
    found: dict[str, type] = {}
    for cls in classes:
        if found.setdefault(cls.kind, cls) is not cls:
            raise ValueError(f"two classes of kind {cls.kind!r}: {found[cls.kind].__name__} and {cls.__name__}")
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a frozen dataclass to a nested dictionary of JSON values, with the kind of what has one."""
    kind = _kind(type(config))
    fields = {item.name: _to_json(getattr(config, item.name)) for item in dataclasses.fields(config)}
    return fields if kind is None else {"kind": kind, **fields}


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    return value


def check_finite(values: Any, where: str) -> None:
    """Refuse JSON values with infinity or NaN among them, for which JSON has no form; InputError says where."""
    if isinstance(values, float) and not math.isfinite(values):
        raise InputError(f"{where}: expected a finite number, got {values}")
    if isinstance(values, Mapping):
        for name, value in values.items():
            check_finite(value, f"{where}.{name}")
    elif isinstance(values, list):
        for value in values:
            named = value.get("name") if isinstance(value, Mapping) else None
            check_finite(value, f"{where}.{named}" if named else where)


def _kind(cls: type) -> str | None:
    """The class variable `kind` of a dataclass; a field of that name does not count."""
    kind = getattr(cls, "kind", None)
    fields = {item.name for item in dataclasses.fields(cls)}
    return kind if isinstance(kind, str) and "kind" not in fields else None


def from_dict(
    cls: type[T], values: dict[str, Any], where: str = "", *, complete: bool = False, registry: Registry = NO_KINDS
) -> T:
    """Build `cls`, or the class of its kind, from a dictionary; nested dataclasses and tuples are rebuilt.

    `complete` is for files that this package wrote: a missing field raises too, instead of taking the current default.

    Raises:
        InputError: a field or a kind that is unknown, or a value of another type.
    """
    name = where or cls.__name__
    if not isinstance(values, dict):
        raise InputError(f"{name}: expected an object with fields, got {type(values).__name__}")
    cls, values = _class_of_kind(cls, values, name, registry)
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(f"{name}: unknown field {', '.join(unknown)}; known fields are {', '.join(sorted(known))}")
    parsed = {key: _parse_value(hints[key], values[key], f"{name}.{key}", complete, registry) for key in values}
    if complete and known - set(values):
        raise InputError(f"{name}: missing field {', '.join(sorted(known - set(values)))}")
    try:
        return cls(**parsed)
    except InputError as error:  # what the class refuses says where it was
        raise InputError(f"{where}: {error}" if where else str(error)) from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}") from error


def from_file(cls: type[T], values: Any, path: Path) -> T:
    """Build `cls` of what a file that this package wrote has for it: `from_dict`, complete, with the file's name."""
    try:
        return from_dict(cls, values, complete=True)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _class_of_kind(cls: type, values: dict[str, Any], name: str, registry: Registry) -> tuple[type, dict[str, Any]]:
    """The class that a dictionary's `kind` names, and the other values."""
    if cls not in registry and _kind(cls) is None:
        return cls, values
    kinds = registry.get(cls) or {str(_kind(cls)): cls}
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{name}.kind: expected one of {', '.join(kinds)}, got {kind!r}")
    return kinds[kind], {key: value for key, value in values.items() if key != "kind"}


def changes_no_result(default: Any = dataclasses.MISSING, *, but: Callable[[Any], Any] = lambda _: None) -> Any:
    """A field of a dataclass that no result depends on, such as how often something is logged.

    Args:
        but: what of its value results do depend on after all.
    """
    return dataclasses.field(default=default, metadata={_NO_RESULT: but})


def decisive(values: Any, config: Any) -> Any:
    """The JSON values of a configuration without the fields that no result depends on."""
    if not dataclasses.is_dataclass(config) or not isinstance(values, dict):
        if isinstance(config, list | tuple) and isinstance(values, list) and len(config) == len(values):
            return [decisive(value, item) for value, item in zip(values, config, strict=True)]
        return values
    kept = dict(values)
    for item in dataclasses.fields(config):
        if _NO_RESULT in item.metadata and item.name in kept:
            kept[item.name] = item.metadata[_NO_RESULT](kept[item.name])
        elif item.name in kept:
            kept[item.name] = decisive(kept[item.name], getattr(config, item.name))
    return kept


def differences(a: Any, b: Any, where: str) -> list[tuple[str, Any, Any]]:
    """(field, value in `a`, value in `b`) for each field in which two configurations of one class differ."""
    found: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(a):
        name, one, other = f"{where}.{item.name}", getattr(a, item.name), getattr(b, item.name)
        if dataclasses.is_dataclass(one) and type(one) is type(other):
            found += differences(one, other, name)
        elif one != other:
            found.append((name, one, other))
    return found


def _parse_value(hint: Any, value: Any, where: str, complete: bool, registry: Registry) -> Any:
    """Convert a JSON value to the type of the hint, or raise."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _parse_value(next(a for a in arguments if a is not type(None)), value, where, complete, registry)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where, complete=complete, registry=registry)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: expected a list, got {value!r}")
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(arguments) != len(value):
            raise InputError(f"{where}: expected {len(arguments)} values, got {len(value)}")
        pairs = enumerate(zip(arguments, value, strict=True))
        return tuple(_parse_value(kind, item, f"{where}[{i}]", complete, registry) for i, (kind, item) in pairs)
    if origin is typing.Literal:
        if value not in arguments:
            raise InputError(f"{where}: expected one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if type(value) is int and abs(value) > MAX_INT:
        raise InputError(f"{where}: expected a number of at most 63 bits, got one of {value.bit_length()}")
    if type(value) is float and not math.isfinite(value):
        raise InputError(f"{where}: expected a finite number, got {value!r}")
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and hint in (int, float, str, bool) and type(value) is not hint:
        raise InputError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; one that is missing, malformed or very large raises `InputError` naming it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # of a pipe there may never be an end
            raise InputError(f"{path} is not readable JSON: it is not a regular file")
        if status.st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: expected a file of at most {MAX_JSON_BYTES >> 20} MiB of JSON")
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing in {path.parent}") from None
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{path} is not readable JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:  # bytes that are no text, text that is no JSON, a number of 5000 digits
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON with a final newline, as `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
