"""The flags of a recipe: every field, stages by name, and the source of data that `--data.source` chooses."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from tyro.conf import FlagConversionOff, arg

from spar.cli.train_arguments import TrainArguments
from spar.common.errors import InputError

if TYPE_CHECKING:
    from spar.training.config import Recipe
    from spar.training.data import DataConfig

T = TypeVar("T")


def flag_value(flag: str, argv: Sequence[str]) -> str | None:
    """The value of a flag among words that nothing has parsed yet, the last one; None if it is not there.

    As for tyro, `--init_from` is `--init-from`.
    """
    given = [""]
    for word, after in pairwise([*argv, ""]):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            given.append(value if equals else after)
    return given[-1] or None


def chosen_source(
    base: "Recipe", argv: Sequence[str], sources: "Mapping[str, type[DataConfig]]"
) -> "type[DataConfig]":
    """The class of the source that `--data.source` names, by default the recipe's; what is no source is tyro's to say.

    Raises:
        InputError: a flag that belongs to another source.
    """
    source = sources.get(flag_value("--data.source", argv) or base.data.kind, type(base.data))
    for flag in (word.partition("=")[0] for word in argv if word.startswith("--data.")):
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
    from spar.training.config import StageConfig
    from spar.training.distributed import ParallelismConfig

    source = chosen_source(base, argv, sources)
    stages = {stage.name: replace(stage, data=source.nearest(stage.data)) for stage in base.stages}
    hints: dict[str, Any] = typing.get_type_hints(type(base))
    own = {item.name: (hints[item.name], field(default=getattr(base, item.name))) for item in dataclasses.fields(base)}
    own["stages"] = dict[str, StageConfig], field(default_factory=lambda: stages)
    own["data"] = source, field(default=base.data) if source is type(base.data) else field()
    if kind is TrainArguments:
        own["parallelism"] = ParallelismConfig, field(default=ParallelismConfig())
    annotation: Any = FlagConversionOff
    fields = [(name, annotation[hint], default) for name, (hint, default) in own.items()]
    known: Any = Literal[tuple(sources)]
    fields.append(("data_source", Annotated[known, arg(name="data.source")], field(default=source.kind)))
    return make_dataclass(
        kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True, namespace={"__doc__": kind.__doc__}
    )


def build_recipe(arguments: Any, base: "Recipe") -> "Recipe":
    """Build the recipe from the parsed flags."""
    values = {item.name: getattr(arguments, item.name) for item in dataclasses.fields(base)}
    return type(base)(**{**values, "stages": tuple(values["stages"].values())})
