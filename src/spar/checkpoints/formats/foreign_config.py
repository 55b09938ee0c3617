"""A foreign configuration, read field by field: unsupported values are refused, never ignored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spar.common.config import MAX_INT, read_json
from spar.common.errors import InputError

REQUIRED = object()


def is_whole(value: Any) -> bool:
    """Whether a value of JSON is a whole number that fits 63 bits."""
    return type(value) is int and abs(value) <= MAX_INT


class ForeignConfig:
    """The fields of a JSON object, named `where` in errors. Of several names of a field the first one found is used."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise InputError(f"{where}: expected an object with fields, got {type(values).__name__}")
        self.values, self.where = values, where

    @classmethod
    def read(cls, path: Path) -> "ForeignConfig":
        return cls(read_json(path), str(path))

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, *names: str, default: Any = REQUIRED) -> Any:
        """Value of the first of `names` that has one."""
        for name in names:
            if name in self:
                return self.values[name]
        if default is REQUIRED:
            raise InputError(f"{self.where}: expected a field {' or '.join(names)}, got none")
        return default

    def inner(self, *names: str) -> "ForeignConfig":
        """The object in the first of `names` that exists."""
        name = next((name for name in names if name in self), names[0])
        return ForeignConfig(self.get(name), f"{self.where}: {name}")

    def whole(self, *names: str, default: Any = REQUIRED) -> int:
        return self._number(int, names, default)

    def number(self, *names: str, default: Any = REQUIRED) -> float:
        return float(self._number((int, float), names, default))

    def _number(self, kind: Any, names: tuple[str, ...], default: Any) -> Any:
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise InputError(f"{self.where}: {names[0]}: expected a number, got {value!r}")
        if not abs(value) <= MAX_INT:  # NaN is not
            raise InputError(f"{self.where}: {names[0]}: expected a number of at most 63 bits, got a larger one")
        return value

    def wholes(self, name: str) -> tuple[int, ...]:
        """Whole numbers, one at least."""
        value = self.get(name)
        if not isinstance(value, list | tuple) or not value or not all(is_whole(one) for one in value):
            raise InputError(f"{self.where}: {name}: expected whole numbers, got {value!r}")
        return tuple(value)

    def side(self, name: str) -> int:
        """Side of a square, given as a number or a pair."""
        value = self.get(name)
        sides = value if isinstance(value, list) else [value, value]
        if len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int:
            raise InputError(f"{self.where}: {name}: expected a square, got {value!r}")
        return sides[0]

    def numbers(self, config: type, names: Mapping[str, str], **defaults: Any) -> dict[str, Any]:
        """Numbers under our names (the keys of `names`), whole where the field of the dataclass `config` is."""
        found = {}
        for ours, theirs in names.items():
            read = self.whole if config.__annotations__[ours] is int else self.number
            found[ours] = read(theirs, default=defaults.get(ours, REQUIRED))
        return found

    def expect(self, name: str, wanted: Any, default: Any = REQUIRED) -> None:
        """Refuse another value than `wanted`; a missing field has the value `default`."""
        value = self.get(name, default=default)
        if value != wanted:
            raise InputError(f"{self.where}: {name}: expected {wanted!r}, got {value!r}")

    def expect_if_given(self, **wanted: Any) -> None:
        """Refuse other values than these; each of the fields may be missing."""
        for name, value in wanted.items():
            self.expect(name, value, default=value)
