"""The flags of a recipe: every field, stages by name, and the source of data that `--data.source` chooses."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from tyro.conf import FlagConversionOff, arg

from spar.common.errors import InputError

if TYPE_CHECKING:
    from spar.training.config import Recipe, StageConfig
    from spar.training.data import DataConfig

from spar.cli.arguments import TrainArguments

T = TypeVar("T")


def chosen_source(
    base: "Recipe", argv: Sequence[str], sources: "Mapping[str, type[DataConfig]]"
) -> "type[DataConfig]":
    """The class of the source that `--data.source` names, by default the recipe's; what is no source is tyro's to say.

    Raises:
        InputError: a flag that belongs to another source.
    """
    flags = [word.partition("=") for word in argv if word.startswith("--data.")]
    after = dict(pairwise(argv))
    kind = base.data.kind
    for flag, sign, value in flags:
        if flag == "--data.source":
            kind = value if sign else after.get(flag, kind)
    source = sources.get(kind, type(base.data))
    for flag, _, _ in flags:
        name = flag.removeprefix("--data.").replace("-", "_")
        others = [other for other, cls in sources.items() if name in _field_names(cls)]
        if name not in _field_names(source) and others:
            raise InputError(f"{flag} belongs to --data.source {' or '.join(others)}, got source {source.kind}")
    return source


def _field_names(cls: type) -> set[str]:
    return {item.name for item in dataclasses.fields(cls)}


def recipe_arguments(
    base: "Recipe", kind: type[T], sources: "Mapping[str, type[DataConfig]]", argv: Sequence[str]
) -> type[T]:
    """Extend `kind` by a flag for every field of a recipe, stages by name, and for training those of ParallelismConfig.

    The defaults are the values of `base`; its data's are those of the source that `argv` chooses. Booleans take a value
    (`--model.streams.pixel-stream False`).
    """
    from spar.training.distributed import ParallelismConfig

    source = chosen_source(base, argv, sources)
    stages = _flags(
        "Stages",
        {f"stage_{index}": _stage_flags(replace(stage, data=source.nearest(stage.data)))
         for index, stage in enumerate(base.stages)},
        {f"stage_{index}": stage.name for index, stage in enumerate(base.stages)},
    )
    values = {item.name: getattr(base, item.name) for item in dataclasses.fields(base)}
    hints: dict[str, Any] = {**typing.get_type_hints(type(base)), "stages": type(stages), "data": source}
    annotation: Any = FlagConversionOff
    values["stages"] = stages
    if source is not type(base.data):
        values["data"] = source() if not _required(source) else dataclasses.MISSING
    fields: list[tuple[str, Any, Any]] = [
        (name, annotation[hints[name]], field(default=value) if value is not dataclasses.MISSING else field())
        for name, value in values.items()
    ]
    known: Any = Literal[tuple(sources)]
    fields.append(("data_source", Annotated[known, arg(name="data.source")], field(default=source.kind)))
    if kind is TrainArguments:
        fields.append(("parallelism", FlagConversionOff[ParallelismConfig], field(default=ParallelismConfig())))
    names = {f"stage-{index}": stage.name for index, stage in enumerate(base.stages)}
    return make_dataclass(
        kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True,
        namespace={"__doc__": kind.__doc__, "stage_names": names},
    )  # fmt: skip


def _required(cls: type) -> bool:
    """Whether a dataclass has a field without a default."""
    missing = dataclasses.MISSING
    return any(item.default is missing and item.default_factory is missing for item in dataclasses.fields(cls))


def _stage_flags(stage: "StageConfig") -> Any:
    """A stage as a dataclass whose objective and data have their own classes, not the bases that they extend."""
    hints = typing.get_type_hints(type(stage))
    values = {item.name: getattr(stage, item.name) for item in dataclasses.fields(stage)}
    hints |= {name: type(values[name]) for name in ("objective", "data")}
    fields = [(name, hints[name], field(default=value)) for name, value in values.items()]
    return make_dataclass("Stage", fields, frozen=True, namespace={"__doc__": type(stage).__doc__})()


def _flags(name: str, values: dict[str, Any], names: dict[str, str]) -> Any:
    """An instance of a dataclass of the values, whose flags have the `names`."""
    fields = [
        (key, Annotated[type(value), arg(name=names[key])], field(default=value)) for key, value in values.items()
    ]
    return make_dataclass(name, fields, frozen=True)()


def build_recipe(arguments: Any, base: "Recipe") -> "Recipe":
    """Build the recipe from the parsed flags."""
    values = {item.name: getattr(arguments, item.name) for item in dataclasses.fields(base)}
    stages = values.pop("stages")
    kind = type(base.stages[0])
    built = (kind(**vars(getattr(stages, item.name))) for item in dataclasses.fields(stages))
    return type(base)(stages=tuple(built), **values)
