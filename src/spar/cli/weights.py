"""The verbs of published weights: `spar build`, `spar convert` and `spar push`."""

import sys
from typing import Any

from spar.cli.arguments import BuildArguments, ConvertArguments, PushArguments
from spar.cli.console import printable, progress_bar
from spar.cli.parsing import takes
from spar.common.errors import InputError
from spar.inference.image_files import check_replaceable


@takes(BuildArguments, "spar build")
def build(args: BuildArguments) -> int:
    """Build a model from InternVL3, DC-AE and SANA."""
    return _make_model(args, "building")


@takes(ConvertArguments, "spar convert")
def convert(args: ConvertArguments) -> int:
    """Convert a public checkpoint of UniLIP to a model."""
    return _make_model(args, "converting")


@takes(PushArguments, "spar push")
def push(args: PushArguments) -> int:
    """Upload a folder of weights to the Hub."""
    with progress_bar("checking"):
        from spar.checkpoints.hub import check_repository, plan_upload, push

        check_repository(args.repository)
        planned = plan_upload(args.folder)
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
        from spar.checkpoints.from_published import SOURCES, build_from_published
        from spar.checkpoints.from_unilip import convert_unilip
        from spar.checkpoints.spar_format import save_model
        from spar.recipes import recipe
        from spar.training.bundle import sampling_config
        from spar.training.systems.spar import SparRecipe

        base = recipe(args.recipe)
        if not isinstance(base, SparRecipe):
            raise InputError(f"expected a recipe of spar, got {args.recipe}, which is one of {base.kind}")
        shared: dict[str, Any] = {
            "config": base.model, "sampling": sampling_config(base), "recipe": base.name, "seed": args.seed,
            "sources": {part: getattr(args, part) for part in SOURCES}, "revisions": args.revisions(),
        }  # fmt: skip
        if isinstance(args, ConvertArguments):
            bundle = convert_unilip(args.path, **shared, router=args.router, factor=args.factor)
        else:
            bundle = build_from_published(**shared)
        save_model(bundle, args.output)
    for part, origin in bundle.manifest["parts"].items():
        print(f"{part}: {origin}")
    for line in bundle.manifest["differences"]:
        print(f"spar: note: {line}", file=sys.stderr)
    print(args.output)
    return 0
