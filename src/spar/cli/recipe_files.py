"""Recipes from files: a run's `recipe.json`, or YAML that names a recipe and what differs from it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar.common.config import from_dict
from spar.common.errors import InputError
from spar.common.settings_files import read_settings

if TYPE_CHECKING:
    from spar.training.config import Recipe


def read_recipe_file(path: Path) -> "tuple[Recipe, bool]":
    """The recipe of a file, and whether the file says the sizes of its model.

    The file has a whole recipe, as `recipe.json` of a run; or under `recipe` the name of one, and beside it the fields
    that differ, stages by name: `{recipe: tiny, seed: 3, stages: {dit: {steps: 9}}}`.

    Raises:
        InputError: an unreadable file, or a recipe that there is not.
    """
    from spar.recipes import REGISTRY, recipe
    from spar.training.changes import changed_recipe
    from spar.training.config import Recipe

    values = read_settings(path, "--config", "a recipe's file")
    base: type[Any] = Recipe  # abstract: the registry has the class of its kind
    sized = "model" in values
    if "recipe" not in values:
        return _checked(from_dict(base, values, f"{path}", registry=REGISTRY), path), sized
    name = values.pop("recipe")
    if not isinstance(name, str):
        raise InputError(f"{path}: recipe: expected a name, got {name!r}")
    return _checked(changed_recipe(recipe(name), values, f"{path}", REGISTRY), path), sized


def _checked(recipe: "Recipe", path: Path) -> "Recipe":
    """A recipe whose name can name the folder of a run."""
    name = recipe.name
    if not name or name.startswith((".", "-")) or Path(name).name != name:
        raise InputError(f"{path}: name: expected the name of a folder, got {name!r}")
    return recipe
