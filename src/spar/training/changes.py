"""A recipe with some of its fields changed, as files of settings and studies say it."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spar.common.config import Registry, from_dict, to_dict
from spar.common.errors import InputError
from spar.common.settings_files import merged, short
from spar.training.config import Recipe


def changed_recipe(base: Recipe, changes: Mapping[str, Any], where: str, registry: Registry) -> Recipe:
    """A recipe with the fields of `changes` put over its own, stages by name.

    `{"seed": 3, "stages": {"dit": {"steps": 9}}}` changes two fields. Stages get of another source of data what it has
    of theirs.

    Raises:
        InputError: a field that there is not, or a value that it does not take; `where` begins the message.
    """
    own, values = to_dict(base), dict(changes)
    stages, named = values.pop("stages", {}), {stage["name"]: stage for stage in own["stages"]}
    if not isinstance(stages, Mapping) or not stages.keys() <= named.keys():
        raise InputError(f"{where}: stages: expected fields by stage, of {', '.join(named)}, got {short(stages)}")
    configs = {stage.name: stage for stage in base.stages}
    changed = [
        merged(stage, stages.get(key, {}), f"{where}: stages.{key}", configs[key]) for key, stage in named.items()
    ]
    kind: type[Any] = Recipe  # abstract: the registry has the class of its kind
    try:
        chosen = from_dict(kind, {**merged(own, values, where, base), "stages": changed}, where, registry=registry)
    except InputError as error:  # the changes have no list of stages
        keys = [*named]
        message = re.sub(r"\.stages\[(\d+)\]", lambda at: f": stages.{keys[int(at[1])]}", str(error))
        raise InputError(message) from error
    nearest = type(chosen.data).nearest
    return replace(chosen, stages=tuple(replace(stage, data=nearest(stage.data)) for stage in chosen.stages))
