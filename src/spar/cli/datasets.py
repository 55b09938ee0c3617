"""The verb of data sets: `spar data check` and `spar data convert`."""

import json
from dataclasses import asdict

from spar.cli.console import data_table, new_console, progress_bar, show_table
from spar.cli.data_arguments import DataCheckArguments, DataConvertArguments
from spar.cli.parsing import Verb, takes
from spar.common.errors import InputError
from spar.inference.image_files import check_replaceable


def data(argv: list[str]) -> int:
    """Check a data set (check), or write it as webdataset shards (convert)."""
    if argv and argv[0] in DATA_VERBS:
        return DATA_VERBS[argv[0]](argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        lines = [f"  {verb:<13}{function.__doc__}" for verb, function in DATA_VERBS.items()]
        tail = "spar data VERB --help lists a verb's arguments."
        print("\n".join(["usage: spar data VERB ...", "", *lines, "", tail]))
        return 0
    got = repr(argv[0]) if argv else "nothing"
    raise InputError(f"data: expected one of {', '.join(DATA_VERBS)}, got {got}")


@takes(DataCheckArguments, "spar data check")
def check_data(args: DataCheckArguments) -> int:
    """Read and decode every sample, and report what is wrong."""
    from spar.data.sources import open_source
    from spar.data.validate import validate

    reports = []
    for path in args.path:
        with progress_bar(f"checking {path}") as advance:
            source = open_source(path, args.format, cache=args.cache, workers=args.workers)
            found = validate(
                source, limit=args.limit, max_characters=args.max_characters, workers=args.workers, progress=advance
            )
        reports.append(found)
        if not args.json:
            show_table(new_console(), data_table(found))
    if args.json:
        print(json.dumps([asdict(report) | {"wrong": report.wrong} for report in reports], indent=2))
    return 1 if any(report.wrong for report in reports) else 0


@takes(DataConvertArguments, "spar data convert")
def convert_data(args: DataConvertArguments) -> int:
    """Write a data set in any format as webdataset shards."""
    from spar.common.process_group import PATIENCE, ProcessGroup
    from spar.data.convert import MANIFEST, convert
    from spar.data.sources import open_source

    check_replaceable(args.output, MANIFEST, overwrite=args.overwrite)
    group = ProcessGroup.meet("cpu", patience=PATIENCE)
    with group.main_first():  # it indexes what lies far away, and the others find the index
        sources = [open_source(path, args.format, cache=args.cache, workers=args.workers) for path in args.path]
    with group.directory(args.output) as folder, progress_bar("converting") as advance:
        done = convert(sources, folder, shard=args.shard_size, bad_share=args.bad_share, progress=advance, group=group)
    if group.main:
        print(f"{args.output}  ({done.samples} samples in {done.shards} shards, {done.dropped} left out)")
    return 0


DATA_VERBS: dict[str, Verb] = {"check": check_data, "convert": convert_data}
