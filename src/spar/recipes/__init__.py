"""Recipes: functions that return a complete configuration. A variant derives from another and changes what differs."""

from collections.abc import Callable

from spar.common.errors import InputError
from spar.recipes.shapes.recipe import shapes
from spar.recipes.spar import spar_1b, spar_3b
from spar.recipes.tiny import tiny
from spar.training.config import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {"shapes": shapes, "tiny": tiny, "spar-1b": spar_1b, "spar-3b": spar_3b}


def recipe(name: str) -> Recipe:
    """The recipe of a name; an unknown name raises and lists the known ones."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()
