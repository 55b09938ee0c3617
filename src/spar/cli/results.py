"""The verbs that show what a model does: `spar eval`, `spar compare`, `spar report` and `spar demo`."""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar.checkpoints.bundled import local_folder
from spar.cli import loading
from spar.cli.console import (
    INTERRUPTED,
    difference_table,
    new_console,
    progress_bar,
    score_table,
    show_table,
    study_table,
)
from spar.cli.parsing import takes
from spar.cli.result_arguments import (
    OWN_FLAGS,
    CompareArguments,
    DemoArguments,
    EvalArguments,
    JudgeArguments,
    ReportArguments,
    StudyArguments,
)
from spar.common.config import write_json
from spar.common.errors import InputError
from spar.common.files import atomic_directory, atomic_file
from spar.inference.image_files import check_replaceable, check_writable, list_images

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spar.common.process_group import ProcessGroup
    from spar.evaluation.compare import Difference
    from spar.evaluation.options import EvalOptions
    from spar.evaluation.prompt_formats import Named
    from spar.evaluation.results import Result

PROMPTS = (
    "a large red circle", "two blue stars", "a green square to the left of a yellow circle",
    "a small pink ring above a large orange cross",
)  # of the pages of studies and comparisons
DEMO = "spar-demo.json"  # in every demo, and in no run or study, which have a report.html too


@takes(EvalArguments, "spar eval")
def evaluate(args: EvalArguments) -> int:
    """Score a model with the detector of the shapes world."""
    from spar.common.device import choose_device
    from spar.common.process_group import PATIENCE, ProcessGroup
    from spar.evaluation.benchmarks import BENCHMARKS, NEEDS, suits
    from spar.evaluation.options import EvalOptions
    from spar.evaluation.recon import check_pairs
    from spar.evaluation.results import write_result
    from spar.evaluation.sharing import ALONE, SharedPipeline
    from spar.evaluation.unfinished import Unfinished

    given = {item.name: getattr(args, item.name) for item in fields(EvalOptions)}
    options = EvalOptions(**{name: value for name, value in given.items() if value is not None})
    names: list[str] = list(BENCHMARKS) if args.benchmark == "all" else [args.benchmark]
    paths = _result_paths(args, names)
    group = ProcessGroup.meet(choose_device(args.device), patience=PATIENCE)
    several = f"all{_mark(args)}" if args.benchmark == "all" else paths[0].name
    results = dict(zip(names, paths, strict=True))
    unfinished = Unfinished(paths[0].with_name(f"{several}.unfinished"), group, results)
    written = unfinished.written()
    new = [path for name, path in results.items() if name not in written]
    group.main_only(lambda: check_writable(new, overwrite=args.overwrite))
    if args.pairs and args.images:
        pairs, images = args.pairs, args.images
        if not new:
            raise InputError(f"--pairs: {paths[0]} was written before this call, without them; --overwrite begins anew")
        group.main_only(lambda: check_pairs(pairs, images, paths[0], overwrite=args.overwrite))
    pipe = loading.load_pipeline(args, group.device)
    shared: Any = pipe if group.world == 1 else SharedPipeline(pipe, group)
    if args.no_layout:
        pipe.check_settings({"layout": False})
    left = [name for name in names if not suits(name, pipe.tasks)]
    if left == names:
        able = ", ".join(pipe.tasks)
        raise InputError(f"{names[0]} needs a model that can {NEEDS[names[0]]}; {pipe.system} has {able}")
    if left and group.main:
        print(f"spar: note: {pipe.system} does not define what these need: {', '.join(left)}", file=sys.stderr)
    unfinished.begin(_identity(args, options, names, pipe), overwrite=args.overwrite)
    written = unfinished.written()
    # What one process does alone comes last: the others need not wait for it.
    for name, path in sorted(results.items(), key=lambda pair: pair[0] in ALONE):
        alone = name in ALONE
        if name in left or name in written or (alone and not group.main):
            continue
        asked: Any = pipe if alone else unfinished.recorded(name, shared)
        result = _run(args, options, name, asked, group)
        if result is None or not group.main:
            continue
        if kept := 0 if alone else asked.kept:
            result.settings["kept_calls"] = kept  # whose time is not in `seconds`
        write_result(path, result)
        unfinished.finish(name)
        show_table(new_console(), score_table(result))
        print(path)
    if group.main:
        unfinished.end()
    return 0


def _identity(args: EvalArguments, options: "EvalOptions", names: list[str], pipe: Any) -> dict[str, Any]:
    """All that the scores depend on; neither the device nor the size of a batch changes one."""
    from spar.checkpoints.formats.checkpoint_source import name_as_text
    from spar.inference.prompt_files import weights_digest

    own = {name: name_as_text(str(getattr(args, name))) for name in OWN_FLAGS if name != "pairs"}
    return {
        "benchmarks": names,
        "options": own | {name: value for name, value in asdict(options).items() if name != "batch"},
        "model": {name: value for name, value in pipe.run_metadata().items() if name != "device"},
        "weights": weights_digest(pipe.model),
    }


def _run(
    args: EvalArguments, options: "EvalOptions", name: str, pipe: Any, group: "ProcessGroup"
) -> "Result | None":  # fmt: skip
    """One benchmark, with its bar; None where this process only shares the model's work."""
    from spar.evaluation.benchmarks import BENCHMARKS
    from spar.evaluation.features import load_features
    from spar.evaluation.recon import recon
    from spar.evaluation.zero_shot import TEMPLATE, zero_shot

    with progress_bar(name) as advance:
        if args.images is None:
            return BENCHMARKS[name](pipe, options, advance)
        if name == "recon":
            features = load_features(args.features, pipe.device)  # by all: what one refuses, all refuse
            with group.directory(args.pairs) if args.pairs else nullcontext() as pairs:
                return recon(pipe, args.images, options, advance, features=features, pairs=pairs, main=group.main)
        template = TEMPLATE if args.template is None else args.template
        return zero_shot(pipe, args.images, options, advance, template=template, names=args.class_names)


def _mark(args: EvalArguments) -> str:
    return "-held_out" if args.combinations == "held_out" else ""


def _result_paths(args: EvalArguments, names: list[str]) -> list[Path]:
    files = [f"{name}{_mark(args)}.json" for name in names]
    if args.benchmark == "all":
        return [(args.output or Path("results")) / file for file in files]
    if args.output is not None and os.path.isdir(args.output):
        return [args.output / files[0]]
    return [args.output or Path(files[0])]


@takes(JudgeArguments, "spar judge")
def judge(args: JudgeArguments) -> int:
    """Have images judged by a model at an OpenAI-compatible endpoint."""
    from spar.evaluation.judges import RUBRICS, Endpoint, judge, read_template
    from spar.evaluation.prompt_formats import read_imgedit, read_wise
    from spar.evaluation.results import write_result

    path = args.output or Path(f"{args.benchmark}.json")
    check_writable([path], overwrite=args.overwrite)
    rubric = RUBRICS[args.benchmark]
    if args.benchmark == "imgedit":
        given: Named = read_imgedit(args.prompts, args.images or args.prompts.parent)
    else:
        given = read_wise(args.prompts)
    endpoint, template = Endpoint(args.endpoint, args.judge, args.key_variable), read_template(args.template, rubric)
    journal = path.with_suffix(".replies.jsonl")
    with progress_bar("judging") as advance:
        result = judge(
            rubric, given, args.folder, template, endpoint, journal, parallel=args.parallel, advance=advance
        )
    write_result(path, result)
    show_table(new_console(), score_table(result))
    if unread := result.details["unread"]:
        key, reason = next(iter(unread.items()))
        print(f"spar: note: {len(unread)} replies have no scores, first of {key}: {reason}", file=sys.stderr)
    print(path)
    return 1 if unread else 0


@takes(CompareArguments, "spar compare")
def compare(args: CompareArguments) -> int:
    """Compare models' results with the first one's, paired by prompt."""
    from spar.evaluation.compare import Difference, compare, holm_corrected

    if args.html is not None:
        check_writable([args.html], overwrite=args.overwrite)
    named = []
    for path in args.results[1:]:
        differences, reasons = list[Difference](), list[str]()
        for pair in _pairs_of_results(args.first, path):
            try:
                differences += compare(*pair)
            except InputError as error:
                if not path.is_dir():
                    raise
                reasons.append(f"{pair[0].benchmark} is not compared: {error}")
        if reasons and not differences:
            raise InputError(f"{path}: {reasons[0]}")
        for reason in reasons:
            print(f"spar: note: {path}: {reason}", file=sys.stderr)
        named += [(str(path), one) for one in differences]
    corrected = holm_corrected([one for _, one in named])
    found = [(name, one) for (name, _), one in zip(named, corrected, strict=True)]
    if args.html is not None:
        _write_comparison(args.html, args, found)
    if args.json:
        print(json.dumps([{**asdict(one), "verdict": one.verdict, "model": name} for name, one in found], indent=2))
    else:
        show_table(new_console(), difference_table(found))
    if args.html is not None:
        print(args.html, file=sys.stderr if args.json else sys.stdout)
    return 0


def _write_comparison(page: Path, args: CompareArguments, found: "Sequence[tuple[str, Difference]]") -> None:
    """The page of a comparison, with what each model draws."""
    from spar.inference.loading import load_pipeline
    from spar.reporting.comparison import render_comparison

    grids = []
    if args.draw:
        for path, model in zip(args.results, args.draw, strict=True):
            pipe = load_pipeline(model, progress=False)
            grids.append((str(path), pipe.generate(list(PROMPTS), seed=0).images))
    text = render_comparison(str(args.first), found, PROMPTS, grids)
    with atomic_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # a file's name may be no text


def _pairs_of_results(first: Path, second: Path) -> "list[tuple[Result, Result]]":
    """Two results files, or those of two folders that have the same name and outcomes to pair."""
    from spar.evaluation.compare import units
    from spar.evaluation.results import read_result

    if first.is_dir() != second.is_dir():
        raise InputError(f"expected two results files or two folders of them, got {first} and {second}")
    if not first.is_dir():
        return [(read_result(first), read_result(second))]
    names = [{path.name for path in folder.glob("*.json")} for folder in (first, second)]
    found = []
    for name in sorted(names[0] ^ names[1]):
        print(f"spar: note: {name} is not compared: only one folder has it", file=sys.stderr)
    for name in sorted(names[0] & names[1]):
        pair = read_result(first / name), read_result(second / name)
        try:
            for one in pair:
                units(one)
        except InputError as error:
            print(f"spar: note: {name} is not compared: {error}", file=sys.stderr)
            continue
        found.append(pair)
    if not found:
        raise InputError(f"expected results files of the same names in {first} and {second}, found none to compare")
    return found


@takes(StudyArguments, "spar study")
def study(args: StudyArguments) -> int:
    """Train and compare variants of a recipe on several seeds."""
    from spar.evaluation.study import read_study
    from spar.evaluation.study_run import run_study, sample_grids
    from spar.recipes import REGISTRY, recipe
    from spar.reporting.study_report import render_study

    chosen = read_study(args.study)
    folder = args.output or Path("studies") / chosen.name

    def say(line: str) -> None:
        print(f"{chosen.name}: {line}", file=sys.stderr)

    found = run_study(
        chosen, folder, REGISTRY, recipe, device=args.device, first=args.seeds,
        init_from=None if args.init_from is None else local_folder(args.init_from),
        reuse=args.reuse, say=say,
    )  # fmt: skip
    if found is None:
        print("spar: stopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    draws = any(name.startswith(("shapes-gen", "shapes-frechet")) for name in chosen.endpoints)
    prompts = PROMPTS if draws else ()
    grids = list(sample_grids(found, folder, prompts, REGISTRY, args.device)) if prompts else []
    with atomic_file(folder / "report.html") as temporary:
        temporary.write_text(render_study(found, folder, prompts, grids), encoding="utf-8")
    show_table(new_console(), study_table(found))
    print(folder / "report.html")
    return 0


@takes(ReportArguments, "spar report")
def report(args: ReportArguments) -> int:
    """Write a run's training curves and results as one HTML page."""
    path = args.output or args.run / "report.html"
    from spar.reporting.report import write_report
    from spar.reporting.run_report import run_report

    data = run_report(args.run)
    check_writable([path], overwrite=args.overwrite or args.output is None)
    write_report(path, data)
    print(path)
    return 0


@takes(DemoArguments, "spar demo")
def demo(args: DemoArguments) -> int:
    """Write an HTML page with all four tasks and a small sample of the scores."""
    images = list_images(args.images) if args.images else []
    check_replaceable(args.output, DEMO, overwrite=args.overwrite)
    pipe = loading.load_pipeline(args)
    from spar.checkpoints.bundled import DEFAULT_MODEL, bundled_folder
    from spar.checkpoints.hub import model_folder
    from spar.reporting.demo import PAGE, DemoOptions, make_demo

    folder = bundled_folder(DEFAULT_MODEL) if args.model is None else model_folder(args.model)
    options = DemoOptions(images=images, limit=args.limit, curves=_curves(folder))
    with atomic_directory(args.output) as folder, progress_bar("the demo") as advance:
        results = make_demo(pipe, folder, options, lambda _, done, total: advance and advance(done, total))
        write_json(folder / DEMO, pipe.run_metadata())
    for result in results:
        show_table(new_console(), score_table(result))
    print(args.output / PAGE)
    return 0


def _curves(model: Path) -> Path | None:
    """Training metrics of a model, from its folder or from the run around it."""
    return next((path for path in (model / "metrics.jsonl", model.parent / "metrics.jsonl") if path.is_file()), None)
