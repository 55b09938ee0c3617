"""Settings that a user writes: an object in a JSON or YAML file, read with limits and without surprises."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spar.common.errors import InputError, first_line

MAX_BYTES = 2**18
SUFFIXES = (".json", ".yaml", ".yml")


class PlainLoader(yaml.SafeLoader):
    """YAML's safe loader without aliases, which may grow without bounds, and without keys given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("expected plain values, got an alias (*)")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := next((key for key, count in keys.items() if count > 1), None):
            raise yaml.YAMLError(f"expected each key once, got {twice!r} twice")
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-4 as a text.
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_settings(path: Path, flag: str, what: str) -> dict[str, Any]:
    """The object in a JSON or YAML file of at most MAX_BYTES; an alias or a key given twice is refused.

    Args:
        flag: the argument that names the file, and `what` the file is, in messages.

    Raises:
        InputError: another file.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{flag}: expected a file that ends in {', '.join(SUFFIXES)}, got {str(path)!r}")
    try:
        if not path.is_file():
            raise InputError(f"{flag}: expected {what}, but there is no file {str(path)!r}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"{flag}: expected at most {MAX_BYTES >> 10} KiB, but {str(path)!r} has more")
        text = data.decode("utf-8-sig")  # some editors begin with a byte order mark
        values = json.loads(text) if path.suffix.lower() == ".json" else yaml.load(text, Loader=PlainLoader)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or first_line(error)
        raise InputError(f"{flag}: {str(path)!r} cannot be read: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{flag}: expected an object with fields in {str(path)!r}, got {type(values).__name__}")
    return values


def merged(own: dict[str, Any], changes: Any, where: str, config: Any = None) -> dict[str, Any]:
    """Values with the changes put over them, object by object; another `kind` replaces an object whole.

    Args:
        config: the configuration that `own` is of, if known: where `kind` is one of its fields (a router's), the others
            stay.
    """
    if not isinstance(changes, Mapping):
        raise InputError(f"{where}: expected an object with fields, got {short(changes)}")
    is_field = dataclasses.is_dataclass(config) and "kind" in {one.name for one in dataclasses.fields(config)}
    if "kind" in changes and changes["kind"] != own.get("kind") and not is_field:
        return dict(changes)
    found = dict(own)
    for key, value in changes.items():
        inner = found.get(key)
        of = getattr(config, key, None)
        found[key] = merged(inner, value, f"{where}.{key}", of) if isinstance(inner, dict) else value
    return found


def short(value: Any) -> str:
    """A value, of an object its keys, as it is shown in an error."""
    return repr(list(value) if isinstance(value, Mapping) else value)[:100]
