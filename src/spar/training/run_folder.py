"""A run's folder: one recipe, the ends of its stages, the manifest that it started from, and its text tokenizer."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from spar.common.config import Registry, decisive, from_dict, read_json, to_dict, write_json
from spar.common.errors import InputError
from spar.common.files import atomic_directory
from spar.training.checkpoint import discard, remove_states
from spar.training.config import RESERVED, Recipe
from spar.training.distributed import SINGLE_PROCESS, DistributedContext
from spar.training.plan import MODEL_PARTS, PlannedStage, RunPlan

log = logging.getLogger("spar.training")

TEXT_TOKENIZER = "text_tokenizer"  # in a run whose data have none of their own
# What may be there before the recipe is: a study's run has the last two, and a tokenizer, when it takes stages over.
EARLY = ("lock", "trackers", "cache", "origin.json", "metrics.jsonl")
FOREIGN = tuple(name for name in RESERVED if name not in EARLY)
ORIGIN = "origin.json"  # in a run that started from a SPAR folder: that folder's manifest


def open_run(run: Path, recipe: Recipe, *, fresh: bool, main: bool = True) -> None:
    """Make or check the run's folder: it holds one recipe, and another recipe never writes over it.

    Of several processes the main one makes it and the others check.
    """
    check_run(run, recipe, fresh=fresh)
    path = run / "recipe.json"
    if not main:
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_json(path, to_dict(recipe))
    except OSError as error:
        raise InputError(f"cannot write the run folder {run}: {error.strerror}") from error


def check_run(run: Path, recipe: Recipe, *, fresh: bool) -> None:
    """Refuse a folder that holds another run, or any where a run is `fresh`, or no run but what one would write over or
    remove; nothing is written.
    """
    path = run / "recipe.json"
    if fresh and path.exists():
        raise InputError(f"{run} already holds a run; resume it (--resume auto) or give another folder")
    if not path.exists():
        if os.path.lexists(run / "config.json"):
            raise InputError(f"{run} is a model's folder (it has config.json); give another one for the run")
        own = (TEXT_TOKENIZER,) if (run / TEXT_TOKENIZER / "tokenizer_config.json").is_file() else ()
        if foreign := [name for name in FOREIGN if name not in own and os.path.lexists(run / name)]:
            raise InputError(
                f"{run} holds no run, but {', '.join(foreign)}, which a run would write over or remove: give another "
                "folder"
            )
        return
    held, own = (decisive(values, recipe) for values in (_read(path), to_dict(recipe)))
    if held != own:
        raise InputError(
            f"{run} holds a run of another recipe ({_first_difference(held, own)}); give its own flags, or another "
            "folder"
        )


def _first_difference(held: Any, own: Any, where: str = "") -> str:
    """The place and both values of the first difference of two recipes' JSON values."""
    if isinstance(held, dict) and isinstance(own, dict):
        for key in [*held, *(key for key in own if key not in held)]:
            if key not in held or key not in own or held[key] != own[key]:
                return _first_difference(held.get(key), own.get(key), f"{where}.{key}".lstrip("."))
    if isinstance(held, list) and isinstance(own, list) and len(held) == len(own):
        index = next(i for i, (a, b) in enumerate(zip(held, own, strict=True)) if a != b)
        named = held[index].get("name", index) if isinstance(held[index], dict) else index
        return _first_difference(held[index], own[index], f"{where}.{named}")
    texts = str(held), str(own)
    same = len(os.path.commonprefix(texts))  # noqa: RUF071  # of texts, letter by letter
    start = same - 30 if same > 50 else 0  # long texts are shown from shortly before they part
    shown = ["..." * bool(start) + text[start : start + 60] for text in texts]
    return f"{where}: {shown[0]}, now {shown[1]}"


def _read(path: Path) -> dict[str, Any]:
    """The fields of a `recipe.json`, if they are this version's."""
    values = read_json(path)
    if "stages" in values and "kind" not in values:
        raise InputError(f"{path} was written by an earlier version of spar; finish its run with that version")
    return values


def read_recipe(path: Path, registry: Registry) -> Recipe:
    """The recipe of a run's `recipe.json`; `registry` has the kinds that it may name."""
    base: type[Any] = Recipe  # abstract: the registry has the class of its kind
    return from_dict(base, _read(path), str(path), complete=True, registry=registry)


def note_origin(plan: RunPlan, planned: PlannedStage) -> None:
    """Keep the manifest of the SPAR folder that a run's first stage starts from beside its stages."""
    if planned.start.source in ("folder", "random"):
        (plan.run / ORIGIN).unlink(missing_ok=True)
    if planned.start.source == "folder" and (planned.start.folder / "manifest.json").exists():
        manifest = read_json(planned.start.folder / "manifest.json")
        left_out = {"reinitialized": list(planned.reinitialize)} if planned.reinitialize else {}
        write_json(plan.run / ORIGIN, {**manifest, **left_out})


def invalidate_later_stages(run: Path, recipe: Recipe, planned: PlannedStage) -> None:
    """Remove what the training of a stage makes void: its own end, and all that was made from it.

    Its own state stays when it is resumed. What was made last goes first: a removal that is broken off leaves nothing
    that was made from what is gone.
    """
    if planned.invalidates:
        void = ", ".join(planned.invalidates)
        log.warning("the training of stage %s makes void, and removes: %s", planned.config.name, void)
    discard([run / part for part in MODEL_PARTS])
    for later in reversed(recipe.stages[recipe.stages.index(planned.config) :]):
        kept = later == planned.config and planned.start.source == "state"
        discard([run / later.name / "done.old", run / later.name / "done"])
        if not kept:
            remove_states(run / later.name / "state")


def find_text_tokenizer(
    recipe: Recipe, run: Path, init_from: Path | None, parallel: DistributedContext = SINGLE_PROCESS
) -> Any:
    """The text tokenizer of a run: its data's own, or the one that came with the model which it started from.

    Raises:
        InputError: data sets of free words, and no tokenizer that knows them.
    """
    own = recipe.data.text_tokenizer()
    if own is not None:
        return own
    kept, found = run / TEXT_TOKENIZER, text_tokenizer_folder(recipe, run, init_from)
    if parallel.main and not (kept.is_dir() and found.samefile(kept)):
        with atomic_directory(kept) as temporary:
            shutil.copytree(found, temporary, dirs_exist_ok=True)
    parallel.barrier()
    return recipe.load_tokenizer(kept)


def text_tokenizer_folder(recipe: Recipe, run: Path, init_from: Path | None) -> Path:
    """The folder of the text tokenizer that came with a run's first weights, or that the run has kept.

    Raises:
        InputError: there is none.
    """
    given = [run / TEXT_TOKENIZER]
    if init_from is not None:
        home = init_from.absolute().parents[:2][-1]  # of RUN/STAGE/done
        given = [*(place / TEXT_TOKENIZER for place in (init_from, home, home / "model")), *given]
    found = next((path for path in given if path.is_dir()), None)
    if found is None:
        raise InputError(
            f"recipe {recipe.name}: its words want the text tokenizer of a SPAR folder; expected --init-from such a "
            f"folder, or a stage of a run that began with one, got {init_from}"
        )
    return found
