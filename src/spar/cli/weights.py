"""The verbs of published weights: `spar build`, `spar convert` and `spar push`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spar.cli.console import printable, progress_bar
from spar.common.errors import InputError
from spar.inference.image_files import check_replaceable


def build(argv: list[str]) -> int:
    """Build a model from InternVL3, DC-AE and SANA."""
    from spar.cli.arguments import BuildArguments
    from spar.cli.parsing import parse

    def make(_: Any, **shared: Any) -> Any:
        from spar.checkpoints.from_published import build_from_published

        return build_from_published(**shared)

    return _make_model(parse(BuildArguments, argv, "spar build"), "building", make)


def convert(argv: list[str]) -> int:
    """Convert a public checkpoint of UniLIP to a model."""
    from spar.cli.arguments import ConvertArguments
    from spar.cli.parsing import parse

    def make(args: Any, **shared: Any) -> Any:
        from spar.checkpoints.from_unilip import convert_unilip

        return convert_unilip(args.path, **shared, router=args.router, factor=args.factor)

    return _make_model(parse(ConvertArguments, argv, "spar convert"), "converting", make)


def push(argv: list[str]) -> int:
    """Upload a folder of weights to the Hub."""
    from spar.cli.arguments import PushArguments
    from spar.cli.parsing import parse

    args = parse(PushArguments, argv, "spar push")
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


def _make_model(args: Any, title: str, make: Callable[..., Any]) -> int:
    """Write the model that `make` builds from the arguments of both verbs, and print the origin of its parts."""
    check_replaceable(args.output, "config.json", overwrite=args.overwrite)
    with progress_bar(title):
        from spar.checkpoints.from_published import SOURCES
        from spar.checkpoints.spar_format import save_model
        from spar.recipes import recipe
        from spar.training.bundle import sampling_config
        from spar.training.systems.spar import SparRecipe

        base, sources = recipe(args.recipe), {part: getattr(args, part) for part in SOURCES}
        if not isinstance(base, SparRecipe):
            raise InputError(f"expected a recipe of spar, got {args.recipe}, which is one of {base.kind}")
        bundle = make(
            args, config=base.model, sampling=sampling_config(base), sources=sources, revisions=args.revisions(),
            seed=args.seed, recipe=base.name,
        )  # fmt: skip
        save_model(bundle, args.output)
    _print_origins(args.output, bundle.manifest)
    return 0


def _print_origins(folder: Path, manifest: dict[str, Any]) -> None:
    """Print the origin of each part of a new model, and what differs from the expected."""
    for part, origin in manifest["parts"].items():
        print(f"{part}: {origin}")
    for line in manifest["differences"]:
        print(f"spar: note: {line}", file=sys.stderr)
    print(folder)
