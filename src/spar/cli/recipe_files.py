"""Recipes from files: a run's `recipe.json`, or YAML that names a recipe and what differs from it."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from spar.common.config import from_dict, to_dict
from spar.common.errors import InputError, first_line

if TYPE_CHECKING:
    from spar.training.config import Recipe

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


def read_recipe_file(path: Path) -> "tuple[Recipe, bool]":
    """The recipe of a file, and whether the file says the sizes of its model.

    The file has a whole recipe, as `recipe.json` of a run; or under `recipe` the name of one, and beside it the fields
    that differ, stages by name: `{recipe: tiny, seed: 3, stages: {dit: {steps: 9}}}`.

    Raises:
        InputError: an unreadable file, or a recipe that there is not.
    """
    from spar.recipes import REGISTRY, recipe
    from spar.training.config import Recipe

    values = _read(path)
    base: type[Any] = Recipe  # abstract: the registry has the class of its kind
    name = values.pop("recipe", None)
    if name is None:
        return _checked(from_dict(base, values, f"{path}", registry=REGISTRY), path), "model" in values
    if not isinstance(name, str):
        raise InputError(f"{path}: recipe: expected a name, got {name!r}")
    own = to_dict(recipe(name))
    stages, named = values.pop("stages", {}), {stage["name"]: stage for stage in own["stages"]}
    if not isinstance(stages, Mapping) or not stages.keys() <= named.keys():
        raise InputError(f"{path}: stages: expected fields by stage, of {', '.join(named)}, got {_short(stages)}")
    changed = [_merged(stage, stages.get(key, {}), f"{path}: stages.{key}") for key, stage in named.items()]
    merged = _merged(own, values, f"{path}")
    chosen = from_dict(base, {**merged, "stages": changed}, f"{path}", registry=REGISTRY)
    nearest = type(chosen.data).nearest  # what a source of data has of each stage's
    fitted = tuple(replace(stage, data=nearest(stage.data)) for stage in chosen.stages)
    return _checked(replace(chosen, stages=fitted), path), "model" in values


def _checked(recipe: "Recipe", path: Path) -> "Recipe":
    """A recipe whose name can name the folder of a run."""
    name = recipe.name
    if not name or name.startswith((".", "-")) or Path(name).name != name:
        raise InputError(f"{path}: name: expected the name of a folder, got {name!r}")
    return recipe


def _merged(own: dict[str, Any], changes: Any, where: str) -> dict[str, Any]:
    """Values with the changes put over them, object by object; another `kind` replaces an object whole."""
    if not isinstance(changes, Mapping):
        raise InputError(f"{where}: expected an object with fields, got {_short(changes)}")
    if "kind" in changes and changes["kind"] != own.get("kind"):
        return dict(changes)
    merged = dict(own)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value, f"{where}.{key}") if isinstance(inner, dict) else value
    return merged


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON or YAML file of at most MAX_BYTES; an alias or a key given twice is refused."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--config: expected a file that ends in {', '.join(SUFFIXES)}, got {str(path)!r}")
    try:
        if not path.is_file():
            raise InputError(f"--config: expected a recipe's file, but there is no file {str(path)!r}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"--config: expected at most {MAX_BYTES >> 10} KiB, but {str(path)!r} has more")
        text = data.decode()
        values = json.loads(text) if path.suffix.lower() == ".json" else yaml.load(text, Loader=PlainLoader)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or first_line(error)
        raise InputError(f"--config: {str(path)!r} cannot be read: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"--config: expected an object with fields in {str(path)!r}, got {type(values).__name__}")
    return values


def _short(value: Any) -> str:
    return repr(list(value) if isinstance(value, Mapping) else value)[:100]
