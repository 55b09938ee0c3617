"""The verbs of published weights: `spar build`, `spar convert`, `spar export` and `spar push`."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spar.checkpoints.bundled import local_folder
from spar.cli.console import printable, progress_bar
from spar.cli.parsing import takes
from spar.cli.weights_arguments import BuildArguments, ConvertArguments, ExportArguments, PushArguments
from spar.common.errors import InputError
from spar.inference.image_files import check_replaceable

if TYPE_CHECKING:
    from spar.checkpoints.dualtoken_format import DualTokenBundle
    from spar.checkpoints.spar_format import ModelBundle
    from spar.training.systems.dualtoken import DualTokenRecipe
    from spar.training.systems.spar import SparRecipe

FORMATS = {"unilip": "spar-1b", "dualtoken": "dualtoken-3b"}  # of public checkpoints, and the recipe of each


@takes(BuildArguments, "spar build")
def build(args: BuildArguments) -> int:
    """Build a model from published parts."""
    return _make_model(args, "building")


@takes(ConvertArguments, "spar convert")
def convert(args: ConvertArguments) -> int:
    """Convert a public checkpoint to a model."""
    return _make_model(args, "converting")


@takes(ExportArguments, "spar export")
def export(args: ExportArguments) -> int:
    """Write a part of a model in another program's format."""
    with progress_bar("exporting"):
        import torch

        from spar.checkpoints.hub import model_folder
        from spar.checkpoints.spar_format import load_model
        from spar.checkpoints.to_internvl import MARK, export_internvl

        check_replaceable(args.output, MARK, overwrite=args.overwrite)
        export_internvl(load_model(model_folder(args.model)), args.output, getattr(torch, args.dtype))
    print(args.output)
    return 0


@takes(PushArguments, "spar push")
def push(args: PushArguments) -> int:
    """Upload a folder of weights to the Hub."""
    with progress_bar("checking"):
        from spar.checkpoints.hub import check_repository, plan_upload, push

        check_repository(args.repository)
        planned = plan_upload(local_folder(args.folder))
    for name, size in planned.files.items():
        print(f"{size:>15,}  {printable(name)}")
    where = f"{args.repository}, {'public' if args.public else 'private'}"
    go = "would go" if args.dry_run else "go"
    print(f"{sum(planned.files.values()):>15,}  bytes in {len(planned.files)} files {go} to {where}")
    if planned.ignored:
        left = printable(", ".join(planned.ignored))
        print(f"spar: note: not uploaded, since spar reads no such files: {left}", file=sys.stderr)
    if not args.dry_run:
        print(push(planned, args.repository, private=not args.public, message=args.message))
    return 0


def _make_model(args: BuildArguments | ConvertArguments, title: str) -> int:
    """Write the model that the arguments describe, and print the origin of its parts."""
    check_replaceable(args.output, "config.json", overwrite=args.overwrite)
    with progress_bar(title):
        from spar.recipes import recipe
        from spar.training.systems.dualtoken import DualTokenRecipe
        from spar.training.systems.spar import SparRecipe

        makers: dict[type, Callable[[Any, Any], Any]] = {SparRecipe: _make_spar, DualTokenRecipe: _make_dualtoken}
        base = recipe(args.recipe or FORMATS[args.format] if isinstance(args, ConvertArguments) else args.recipe)
        wanted = type(recipe(FORMATS[args.format])) if isinstance(args, ConvertArguments) else type(base)
        if type(base) is not wanted:
            raise InputError(f"expected a recipe of {wanted.kind}, got {base.name}, which is one of {base.kind}")
        bundle = makers[type(base)](args, base)
    for part, origin in bundle.manifest["parts"].items():
        print(f"{part}: {origin}")
    for line in bundle.manifest["differences"]:
        print(f"spar: note: {line}", file=sys.stderr)
    print(args.output)
    return 0


def _make_spar(args: BuildArguments | ConvertArguments, base: "SparRecipe") -> "ModelBundle":
    from spar.checkpoints import model_header
    from spar.checkpoints.from_published import SOURCES, build_from_published
    from spar.checkpoints.from_unilip import convert_unilip
    from spar.checkpoints.spar_format import FORMAT, save_model
    from spar.training.bundle import sampling_config

    model_header.check_replaceable(args.output, FORMAT)
    _refuse(args, "vision", "llm", "settings")
    shared: dict[str, Any] = {
        "config": base.model, "sampling": sampling_config(base), "recipe": base.name, "seed": args.seed,
        "sources": {part: getattr(args, part) for part in SOURCES}, "revisions": args.revisions(),
    }  # fmt: skip
    if isinstance(args, ConvertArguments):
        bundle = convert_unilip(args.path, **shared, router=args.router or "dtr", factor=args.factor)
    else:
        _require(args, *SOURCES)
        bundle = build_from_published(**shared)
    save_model(bundle, args.output)
    return bundle


def _make_dualtoken(args: BuildArguments | ConvertArguments, base: "DualTokenRecipe") -> "DualTokenBundle":
    from spar.checkpoints import model_header
    from spar.checkpoints.dualtoken_format import FORMAT, save_dualtoken
    from spar.checkpoints.from_dualtoken import SOURCES, build_dualtoken, convert_dualtoken

    model_header.check_replaceable(args.output, FORMAT)
    _refuse(args, "mllm", "autoencoder", "dit", "factor", "router")
    _require(args, *SOURCES)
    shared: dict[str, Any] = {
        "config": base.model, "sampling": base.sampling, "recipe": base.name, "seed": args.seed,
        "sources": {part: getattr(args, part) for part in SOURCES}, "revisions": args.revisions(),
        "max_prompt_tokens": base.max_prompt_tokens,
    }  # fmt: skip
    if isinstance(args, ConvertArguments):
        bundle = convert_dualtoken(args.path, **shared, settings=args.settings)
    else:
        bundle = build_dualtoken(**shared)
    save_dualtoken(bundle, args.output)
    return bundle


def _require(args: object, *names: str) -> None:
    """Refuse a missing source of the system that is made."""
    missing = [f"--{name}" for name in names if getattr(args, name) is None]
    if missing:
        raise InputError(f"expected {', '.join(missing)}, a folder or Hub id each, got none")


def _refuse(args: object, *names: str) -> None:
    """Refuse what belongs to another system."""
    strange = [f"--{name}" for name in names if getattr(args, name, None) is not None]
    if strange:
        raise InputError(f"{', '.join(strange)}: not for this system")
