"""The command line: one table from verb to function, and the only module that prints.

A user's error is one line on stderr and exit status 2, Ctrl-C a short line and 130. Libraries other than Python's own
are imported inside the verbs, so that help and errors are immediate and `main` handles Ctrl-C.
"""

import gc
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar import __version__
from spar.cli.console import (
    check_table,
    data_table,
    epochs_table,
    estimate_table,
    model_facts,
    model_table,
    model_values,
    new_console,
    plan_table,
    progress_bar,
    sampling_callback,
    score_table,
    training_display,
)
from spar.common.errors import InputError
from spar.common.files import atomic_directory
from spar.common.threads import limit_spinning
from spar.inference.image_files import (
    check_folder,
    check_replaceable,
    check_writable,
    list_images,
    output_paths,
    read_metadata,
    save_images,
    source_metadata,
)

if TYPE_CHECKING:
    import socket
    from concurrent.futures import Executor

    from spar.cli.arguments import EvalArguments, ListenArguments, ModelArguments, SamplingArguments, TrainArguments
    from spar.inference.pipeline import SparPipeline
    from spar.training.estimate import HardwareConfig, StageEstimate
    from spar.training.files_data import FilesData
    from spar.training.plan import RunPlan

WRONG_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
RECONSTRUCT_BATCH = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    limit_spinning()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = dispatch(argv)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 0
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("spar: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe; the flush at exit must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:  # the disk is full, a folder has vanished
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")


def _fail(message: str) -> int:
    """Print one line on stderr."""
    print("spar: error: " + _printable(" ".join(message.split())), file=sys.stderr)
    return WRONG_INPUT


def _printable(text: str) -> str:
    """Replace the control characters of an untrusted text."""
    return "".join(c if c.isprintable() else "?" for c in text)


def dispatch(argv: list[str]) -> int:
    """Call the verb with its arguments."""
    if not argv:
        raise InputError(f"expected a verb, one of {', '.join(VERBS)} (see spar --help), got nothing")
    verb, rest = argv[0], argv[1:]
    if verb in ("-h", "--help"):
        print(overview())
    elif verb in ("-V", "--version"):
        print(f"spar {__version__}")
    elif verb in VERBS:
        return VERBS[verb](rest)
    else:
        near = get_close_matches(verb, VERBS, 1)
        hint = f"; perhaps you meant {near[0]}" if near else ""
        raise InputError(f"expected a verb, one of {', '.join(VERBS)}, got {verb!r}{hint}")
    return 0


def overview() -> str:
    """Text of `spar --help`: every verb with its docstring."""
    lines = [f"  {verb:<13}{function.__doc__}" for verb, function in VERBS.items()]
    head = ["usage: spar VERB ...", "", "SPAR: one model that understands, generates, edits and reconstructs images."]
    tail = ["spar VERB --help lists a verb's arguments; spar --version prints the version."]
    return "\n".join([*head, "", *lines, "", *tail])


# ---- the four tasks -------------------------------------------------------------------------------------------------


def generate(argv: list[str]) -> int:
    """Generate images from prompts."""
    from spar.cli.arguments import GenerateArguments, parse

    args = parse(GenerateArguments, argv, "spar generate")
    paths = _image_paths(args, len(args.prompt))
    pipe = _load(args)
    with progress_bar("sampling") as advance:
        out = pipe.generate(
            list(args.prompt), height=args.height, width=args.width, callback=sampling_callback(advance),
            **args.keywords(),
        )
    _save(out, paths)
    warn_if_unquoted(args.prompt, "prompt")
    return 0


def edit(argv: list[str]) -> int:
    """Edit an image by instruction."""
    from spar.cli.arguments import EditArguments, parse

    args = parse(EditArguments, argv, "spar edit")
    paths = _image_paths(args, len(args.instruction))
    pipe = _load(args)
    with progress_bar("sampling") as advance:
        out = pipe.edit(args.image, list(args.instruction), callback=sampling_callback(advance), **args.keywords())
    _save(out, paths, args.image)
    warn_if_unquoted(args.instruction, "instruction")
    return 0


def understand(argv: list[str]) -> int:
    """Answer questions about an image."""
    from spar.cli.arguments import UnderstandArguments, parse

    args = parse(UnderstandArguments, argv, "spar understand")
    out = _load(args).understand(args.image, list(args.question), max_new_tokens=args.max_new_tokens)
    for text in out.texts:
        print(text)
    warn_if_unquoted(args.question, "question")
    return 0


def reconstruct(argv: list[str]) -> int:
    """Encode and decode images with the unified tokenizer."""
    from spar.cli.arguments import ReconstructArguments, parse

    args = parse(ReconstructArguments, argv, "spar reconstruct")
    sources = [file for path in args.image for file in (list_images(path) if os.path.isdir(path) else [path])]
    folders = any(os.path.isdir(path) for path in args.image)
    output = Path("out") if folders and args.output is None else args.output
    paths = output_paths(output, _file_names(sources))
    check_writable(paths, overwrite=args.overwrite)
    pipe = _load(args)
    images: list[Any] = []
    metadata: list[dict[str, Any]] = []
    with progress_bar("reconstructing") as advance:
        for start in range(0, len(sources), RECONSTRUCT_BATCH):
            out = pipe.reconstruct(list(sources[start : start + RECONSTRUCT_BATCH]))
            images += out.images
            metadata += out.metadata
            if advance:
                advance(len(images), len(sources))
    pairs = zip(sources, metadata, strict=True)
    save_images(images, paths, [{**source_metadata(source), **values} for source, values in pairs])
    for path in paths:
        print(path)
    return 0


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable garbage collection: imports create a million permanent objects, and scanning them repeatedly takes a
    quarter of the time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()


def _load(args: "ModelArguments") -> "SparPipeline":
    with progress_bar("loading the model"), gc_disabled():
        import torch

        from spar.inference.pipeline import SparPipeline

        dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
        return SparPipeline.from_pretrained(
            args.model, dtype=dtype, device=args.device, adapter=args.adapter, decode_tile=args.decode_tile,
            weights=args.weights, offload=args.offload, compile=args.compile,
        )


def _image_paths(args: "SamplingArguments", texts: int) -> list[Path]:
    """Paths of the output images, checked before the work begins."""
    count = texts * args.num_images_per_prompt
    paths = output_paths(args.output, [f"{index:0{len(str(count - 1))}}" for index in range(count)])
    check_writable(paths, overwrite=args.overwrite)
    return paths


def _file_names(sources: Sequence[Path]) -> list[str]:
    """Names of the outputs of files: the files' own, made unique."""
    stems = [source.stem for source in sources]
    whole = [stem if stems.count(stem) == 1 else source.name for stem, source in zip(stems, sources, strict=True)]
    return [name if whole.count(name) == 1 else f"{name}-{index}" for index, name in enumerate(whole)]


def _save(out: Any, paths: list[Path], source: Path | None = None) -> None:
    """Write images with the metadata that reproduces them, and print their paths."""
    origin = source_metadata(source) if source else {}
    save_images(out.images, paths, [values | origin for values in out.metadata])
    for path, seed in zip(paths, out.seeds, strict=True):
        print(f"{path}  (seed {seed})")


def warn_if_unquoted(texts: Sequence[str], what: str) -> None:
    """Print a note where the words of one text came as several arguments."""
    if len(texts) > 1 and not any(" " in text for text in texts):
        print(f"spar: note: {len(texts)} {what}s of one word each; one of several words needs quotes", file=sys.stderr)


def info(argv: list[str]) -> int:
    """Show how an image was made, or what a folder of weights contains."""
    from spar.cli.arguments import InfoArguments, parse

    args = parse(InfoArguments, argv, "spar info")
    if os.path.isdir(args.path):
        from spar.checkpoints.inspect import inspect

        with progress_bar("inspecting"):
            found = inspect(args.path)
        if args.json:
            print(json.dumps(model_values(found), indent=2))
        else:
            new_console().print(model_table(found, args.path.resolve().name))
            _print_facts(model_facts(found))
        return 0
    image = read_metadata(args.path)
    command = image.reproduce_command()
    if args.json:
        size = {"width": image.width, "height": image.height}
        print(json.dumps({"kind": "image", **size, "metadata": image.values, "reproduce": command}, indent=2))
        return 0
    _print_facts({"size": f"{image.width} x {image.height}", **image.values, "reproduce": shlex.join(command)})
    return 0


def _print_facts(facts: dict[str, Any]) -> None:
    width = max(map(len, facts)) + 2
    for key, value in facts.items():
        print(_printable(f"{key:<{width}}{value}"))


# ---- training -------------------------------------------------------------------------------------------------------


def train(argv: list[str]) -> int:
    """Train a recipe."""
    from spar.cli.arguments import TrainArguments

    args, chosen = _recipe(argv, TrainArguments, "spar train", "spar train tiny --run runs/tiny")
    from spar.common.device import check_device
    from spar.training.estimate import HardwareConfig, check_sizes, estimate
    from spar.training.plan import read_run, resolve

    run, resume = _run_folder(args, chosen.name)
    check_sizes(chosen, tuple(chosen.stage(name) for name in args.stage) or chosen.stages)
    check_device(args.device)
    run_plan = resolve(
        chosen, read_run(chosen, run, args.init_from), stages=args.stage, resume=resume,
        from_scratch=args.from_scratch, teacher=args.teacher, only_shown=args.dry_run,
    )  # fmt: skip
    if args.dry_run:
        hardware = HardwareConfig.of_this_machine(args.device, args.parallelism)
        _print_plan(run_plan, hardware, estimate(chosen, hardware, args.stage))
        return 0
    check_folder(run)
    command = shlex.join(["spar", "train", *argv, *(["--resume", "auto"] if args.resume == "never" else [])])
    return _train(args, run_plan, resume_command=command)


def _recipe(argv: list[str], kind: type[Any], prog: str, example: str) -> tuple[Any, Any]:
    """Parse the arguments of a verb whose first word is a recipe, and build that recipe from its flags."""
    from spar.cli.arguments import build_recipe, parse, recipe_arguments

    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            parse(kind, ["--help"], prog)
        raise InputError(f"expected the recipe's name first, as in: {example}")
    from spar.recipes import REGISTRY, recipe
    from spar.training.data import DataConfig

    base = recipe(argv[0])
    args = parse(recipe_arguments(base, kind, REGISTRY[DataConfig], argv), argv, prog, none=True)
    return args, _sized(build_recipe(args, base), base, getattr(args, "init_from", None))


def _sized(chosen: Any, base: Any, start: Path | None) -> Any:
    """A recipe of published parts with the sizes of the SPAR folder that it starts from, unless a flag sets them.

    Those sizes are the checkpoints' own, which may differ from the recipe's.
    """
    if not chosen.published or start is None or not (start / "config.json").is_file():
        return chosen
    from spar.checkpoints.spar_format import read_config
    from spar.common.config import merge_overrides

    return replace(chosen, model=merge_overrides(read_config(start), base.model, chosen.model))


def plan(argv: list[str]) -> int:
    """Estimate the cost of a recipe on given GPUs."""
    from spar.cli.arguments import PlanArguments

    args, chosen = _recipe(argv, PlanArguments, "spar plan", "spar plan spar-1b --gpus 64 --gpu h200")
    from spar.training.estimate import HardwareConfig, estimate
    from spar.training.plan import RunStatus, resolve

    hardware = HardwareConfig(
        args.gpus, args.gpu, args.mfu, sharded=args.strategy == "fsdp", grad_accum_steps=args.grad_accum_steps,
        activation_checkpointing=args.activation_checkpointing,
    )
    whole = resolve(chosen, RunStatus(Path("runs") / chosen.name), only_shown=True)
    wanted = [chosen.stage(name) for name in args.stage] or chosen.stages
    run_plan = replace(whole, stages=tuple(one for one in whole.stages if one.config in wanted))
    names = tuple(one.config.name for one in run_plan.stages)
    _print_plan(run_plan, hardware, estimate(chosen, hardware, names))
    return 0


def _print_plan(plan: "RunPlan", hardware: "HardwareConfig", estimates: "Sequence[StageEstimate]") -> None:
    """Print what each stage of a run does, what it costs on the hardware, and what would not work."""
    from spar.training.files_data import FilesData

    console = new_console()
    console.print(plan_table(plan))
    console.print(estimate_table(_left(plan, estimates), hardware))
    if isinstance(plan.recipe.data, FilesData):
        console.print(epochs_table(_epochs(plan.recipe.data, [one.config for one in plan.stages])))
    for one in estimates:
        for warning in one.warnings:
            print(f"spar: note: {one.stage.name}: {warning}", file=sys.stderr)


def _left(plan: "RunPlan", estimates: "Sequence[StageEstimate]") -> "list[StageEstimate]":
    """The stages that are still to be trained, with the time of the steps that are left."""
    pairs = [(one, cost) for one, cost in zip(plan.stages, estimates, strict=True) if not one.skipped]
    shares = [1 - one.start.step / one.config.steps for one, _ in pairs]
    return [replace(cost, seconds=cost.seconds * share) for share, (_, cost) in zip(shares, pairs, strict=True)]


def _epochs(data: "FilesData", stages: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Epochs of each data set in each stage."""
    from spar.training.files_data import epochs_per_source, open_sources, weighted_sets

    with progress_bar("indexing the data"):
        sources = open_sources(data)
    weights = [weight for weight, _ in weighted_sets(data.sets)]
    return {stage.name: epochs_per_source(stage, sources, weights) for stage in stages}


def cache(argv: list[str]) -> int:
    """Compute the frozen features of a recipe's data sets."""
    from spar.cli.arguments import CacheArguments

    example = "spar cache RECIPE --init-from MODEL --data.source files --data.sets DATA -o features"
    args, chosen = _recipe(argv, CacheArguments, "spar cache", example)
    import torch

    from spar.checkpoints.spar_format import load_model
    from spar.common.device import check_device
    from spar.training.feature_cache import write_cache
    from spar.training.files_data import FilesData, open_sources

    if not isinstance(chosen.data, FilesData):
        raise InputError(f"expected data sets (--data.source files --data.sets DATA), got source {chosen.data.kind}")
    check_device(args.device)
    sources = open_sources(chosen.data)
    tokenizer = load_model(args.init_from).model.tokenizer.to(args.device)
    precision = torch.bfloat16 if args.precision == "bf16" else torch.float32
    with progress_bar("features") as advance:
        bad = write_cache(
            tokenizer, sources, args.output, side=chosen.model.image_size, batch=args.batch,
            workers=chosen.data.workers, precision=precision, advance=advance,
        )
    total = sum(len(source) for source in sources)
    print(f"features of {total - bad} samples, {bad} bad ones left out; read them with --data.cache {args.output}")
    return 0


def _train(args: Any, plan: "RunPlan", *, resume_command: str) -> int:
    """Train with a bar; print the model's folder at the end, or the command that resumes."""
    from spar.training.distributed import PeerFailure
    from spar.training.loop import NonFiniteLoss
    from spar.training.trainer import execute

    run = plan.run
    quiet = os.environ.get("RANK", "0") != "0"  # only the first of several processes prints
    try:
        with nullcontext((None, None)) if quiet else training_display() as (announce, report):
            model = execute(
                plan, device=args.device, parallelism=args.parallelism, report=report, announce=announce
            )
    except PeerFailure as error:
        _fail(str(error))
        return 1
    except NonFiniteLoss as error:
        _fail(f"{error}; resume from the last saved state: {resume_command}")
        return 1
    except KeyboardInterrupt:
        model = None
    if model is None:
        if not quiet:
            print(f"spar: stopped; resume with: {resume_command}", file=sys.stderr)
        return INTERRUPTED
    if quiet:
        return 0
    if (run / "model" / "config.json").is_file():
        print(f'the model is in {run / "model"}; try: spar generate "a red circle" --model {run / "model"}')
    else:
        print(f"done; the weights at the end of each stage are in {run}/STAGE/done")
    return 0


def _run_folder(args: "TrainArguments", name: str) -> tuple[Path, bool]:
    """The run's folder, and whether to resume it."""
    if args.resume in ("never", "auto"):
        return args.run or Path("runs") / name, args.resume == "auto"
    run = Path(args.resume)
    if not (run / "recipe.json").is_file():
        raise InputError(f"--resume: expected never, auto or the folder of a run, got {args.resume!r}")
    if args.run not in (None, run):
        raise InputError(f"--run and --resume: expected one folder, got {str(args.run)!r} and {args.resume!r}")
    return run, True


# ---- published weights -----------------------------------------------------------------------------------------------


def build(argv: list[str]) -> int:
    """Build a model from InternVL3, DC-AE and SANA."""
    from spar.cli.arguments import BuildArguments, parse

    def make(_: Any, **shared: Any) -> Any:
        from spar.checkpoints.from_published import build_from_published

        return build_from_published(**shared)

    return _make_model(parse(BuildArguments, argv, "spar build"), "building", make)


def convert(argv: list[str]) -> int:
    """Convert a public checkpoint of UniLIP to a model."""
    from spar.cli.arguments import ConvertArguments, parse

    def make(args: Any, **shared: Any) -> Any:
        from spar.checkpoints.from_unilip import convert_unilip

        return convert_unilip(args.path, **shared, router=args.router, factor=args.factor)

    return _make_model(parse(ConvertArguments, argv, "spar convert"), "converting", make)


def push(argv: list[str]) -> int:
    """Upload a folder of weights to the Hub."""
    from spar.cli.arguments import PushArguments, parse

    args = parse(PushArguments, argv, "spar push")
    with progress_bar("checking"):
        from spar.checkpoints.hub import check_repository, plan_upload, push

        check_repository(args.repository)
        planned = plan_upload(args.folder)
    for name, size in planned.files.items():
        print(f"{size:>15,}  {_printable(name)}")
    where = f"{args.repository}, {'public' if args.public else 'private'}"
    go = "would go" if args.dry_run else "go"
    print(f"{sum(planned.files.values()):>15,}  bytes in {len(planned.files)} files {go} to {where}")
    if planned.ignored:
        left = _printable(", ".join(planned.ignored))
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
        made = make(
            args, config=base.model, sampling=sampling_config(base), sources=sources, revisions=args.revisions(),
            seed=args.seed, recipe=base.name,
        )  # fmt: skip
        save_model(made.bundle, args.output)
    _print_origins(args.output, made.bundle.manifest)
    return 0


def _print_origins(folder: Path, manifest: dict[str, Any]) -> None:
    """Print the origin of each part of a new model, and what differs from the expected."""
    for part, origin in manifest["parts"].items():
        print(f"{part}: {origin}")
    for line in manifest["differences"]:
        print(f"spar: note: {line}", file=sys.stderr)
    print(folder)


# ---- scores, reports, demo, data, doctor ----------------------------------------------------------------------------


def evaluate(argv: list[str]) -> int:
    """Score a model with the detector of the shapes world."""
    from spar.cli.arguments import EvalArguments, parse

    args = parse(EvalArguments, argv, "spar eval")
    from spar.evaluation.benchmarks import BENCHMARKS
    from spar.evaluation.options import EvalOptions
    from spar.evaluation.results import write_result

    options = EvalOptions(**args.keywords())
    names: list[str] = list(BENCHMARKS) if args.benchmark == "all" else [args.benchmark]
    paths = _result_paths(args, names)
    check_writable(paths, overwrite=args.overwrite)
    pipe = _load(args)
    for name, path in zip(names, paths, strict=True):
        with progress_bar(name) as advance:
            result = BENCHMARKS[name](pipe, options, advance)
        write_result(path, result)
        new_console().print(score_table(result))
        print(path)
    return 0


def _result_paths(args: "EvalArguments", names: list[str]) -> list[Path]:
    mark = "-held_out" if args.combinations == "held_out" else ""
    files = [f"{name}{mark}.json" for name in names]
    if args.benchmark == "all":
        return [(args.output or Path("results")) / file for file in files]
    if args.output is not None and os.path.isdir(args.output):
        return [args.output / files[0]]
    return [args.output or Path(files[0])]


def report(argv: list[str]) -> int:
    """Write a run's training curves and results as one HTML page."""
    from spar.cli.arguments import ReportArguments, parse

    args = parse(ReportArguments, argv, "spar report")
    path = args.output or args.run / "report.html"
    from spar.reporting.report import write_report
    from spar.reporting.run_report import run_report

    data = run_report(args.run)
    check_writable([path], overwrite=args.overwrite or args.output is None)
    write_report(path, data)
    print(path)
    return 0


def demo(argv: list[str]) -> int:
    """Write an HTML page with all four tasks and a small sample of the scores."""
    from spar.cli.arguments import DemoArguments, parse

    args = parse(DemoArguments, argv, "spar demo")
    images = list_images(args.images) if args.images else []
    check_replaceable(args.output, "report.html", overwrite=args.overwrite)
    pipe = _load(args)
    from spar.inference.pipeline import BUNDLED
    from spar.reporting.demo import PAGE, DemoOptions, make_demo

    options = DemoOptions(images=images, limit=args.limit, curves=_curves(args.model or BUNDLED))
    with atomic_directory(args.output) as folder, progress_bar("the demo") as advance:
        results = make_demo(pipe, folder, options, lambda _, done, total: advance and advance(done, total))
    for result in results:
        new_console().print(score_table(result))
    print(args.output / PAGE)
    return 0


def _curves(model: Path) -> Path | None:
    """Training metrics of a model, from its folder or from the run around it."""
    return next((path for path in (model / "metrics.jsonl", model.parent / "metrics.jsonl") if path.is_file()), None)


def serve(argv: list[str]) -> int:
    """Serve the four tasks over HTTP, in the format of OpenAI's API."""
    from spar.cli.arguments import ServeArguments, parse

    args = parse(ServeArguments, argv, "spar serve")
    from tempfile import TemporaryDirectory

    listener, token, thread, pipe = _listen_and_load(args, *(["serve", "ui"] if args.ui else ["serve"]))
    with TemporaryDirectory(prefix="spar-") if args.ui else nullcontext() as cache:
        with gc_disabled():
            from spar.serving.limits import PAGE_PATH
            from spar.serving.server import build_server

            build_page = None
            if cache:
                from spar.ui.mount import page_app

                build_page = partial(page_app, pipe, args.host, PAGE_PATH, token=token, cache=Path(cache))
            server = build_server(
                pipe, token=token, host=args.host, max_batch=args.max_batch, max_queue=args.max_queue,
                timeout=args.timeout, build_page=build_page, thread=thread,
            )  # fmt: skip
        _log_to_stderr(logging.INFO)
        page = f", the page is {_address(listener)}{PAGE_PATH}" if args.ui else ""
        if args.ui:
            _clear_at_sigterm()
        print(f"serving on {_address(listener)}{page}", flush=True)
        server.run(sockets=[listener])
    return 0


def _listen_and_load(
    args: "ListenArguments", *extras: str
) -> tuple["socket.socket", str | None, "Executor", "SparPipeline"]:
    """Check the arguments first, then load the model on the thread that will run it (for the reason see `Worker`)."""
    from concurrent.futures import ThreadPoolExecutor

    from spar.serving.auth import check_access, listen, read_token

    token = read_token(args.token_file)
    for extra in extras:
        check_access(args.host, token, extra)
    listener, thread = listen(args.host, args.port), ThreadPoolExecutor(1)
    return listener, token, thread, thread.submit(_load, args).result()


def _clear_at_sigterm() -> None:
    """Handle SIGTERM like Ctrl-C, so that the page's images are deleted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def ui(argv: list[str]) -> int:
    """Serve the web page."""
    from spar.cli.arguments import UiArguments, parse

    args = parse(UiArguments, argv, "spar ui")
    listener, token, thread, pipe = _listen_and_load(args, "ui")
    with progress_bar("loading the page"), gc_disabled():
        from spar.ui.mount import serve_page
    _log_to_stderr(logging.WARNING)
    _clear_at_sigterm()
    print(f"the page is {_address(listener)} (Ctrl-C ends it)", flush=True)
    serve_page(pipe, listener, token=token, call=lambda function: thread.submit(function, pipe))
    return 0


def _log_to_stderr(level: int) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("spar", "uvicorn"):
        logging.getLogger(name).setLevel(level)


def _address(listener: "socket.socket") -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


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


def check_data(argv: list[str]) -> int:
    """Read and decode every sample, and report what is wrong."""
    from spar.cli.arguments import DataCheckArguments, parse

    args = parse(DataCheckArguments, argv, "spar data check")
    from spar.data.sources import open_source
    from spar.data.validate import validate

    reports = []
    for path in args.path:
        with progress_bar(f"checking {path}") as advance:
            source = open_source(path, args.format, cache=args.cache, workers=args.workers)
            reports.append(
                validate(
                    source, limit=args.limit, max_characters=args.max_characters, workers=args.workers,
                    progress=advance,
                )
            )
        if not args.json:
            new_console().print(data_table(reports[-1]))
    if args.json:
        print(json.dumps([asdict(report) | {"wrong": report.wrong} for report in reports], indent=2))
    return 1 if any(report.wrong for report in reports) else 0


def convert_data(argv: list[str]) -> int:
    """Write a data set in any format as webdataset shards."""
    from spar.cli.arguments import DataConvertArguments, parse

    args = parse(DataConvertArguments, argv, "spar data convert")
    from spar.data.convert import MANIFEST, convert
    from spar.data.sources import open_source

    check_replaceable(args.output, MANIFEST, overwrite=args.overwrite)
    sources = [open_source(path, args.format, cache=args.cache, workers=args.workers) for path in args.path]
    with (
        atomic_directory(args.output) as folder,
        progress_bar("converting") as advance,
    ):
        done = convert(sources, folder, shard=args.shard_size, bad_share=args.bad_share, progress=advance)
    print(f"{args.output}  ({done.samples} samples in {done.shards} shards, {done.dropped} left out)")
    return 0


DATA_VERBS: dict[str, Callable[[list[str]], int]] = {"check": check_data, "convert": convert_data}


def doctor(argv: list[str]) -> int:
    """Check the installation: what is wrong, and how to fix it."""
    from spar.cli.arguments import DoctorArguments, parse

    parse(DoctorArguments, argv, "spar doctor")
    from spar.cli.doctor import run_checks

    with progress_bar("checking"):
        checks = run_checks()
    new_console().print(check_table(checks))
    return 1 if any(check.ok is False for check in checks) else 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "plan": plan,
    "cache": cache,
    "build": build,
    "convert": convert,
    "push": push,
    "generate": generate,
    "edit": edit,
    "understand": understand,
    "reconstruct": reconstruct,
    "info": info,
    "eval": evaluate,
    "report": report,
    "demo": demo,
    "serve": serve,
    "ui": ui,
    "data": data,
    "doctor": doctor,
}
