"""The verbs that train: `spar train`, `spar plan` and `spar cache`."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar.checkpoints.bundled import local_folder
from spar.cli.console import (
    BROKEN_PIPE,
    INTERRUPTED,
    epochs_table,
    estimate_table,
    is_first_process,
    new_console,
    plan_table,
    progress_bar,
    show_table,
    training_display,
)
from spar.cli.continuation import Continuation
from spar.cli.failures import Failure, explain
from spar.cli.parsing import parse, read_path
from spar.cli.recipe_flags import build_recipe, flag_value, recipe_arguments
from spar.cli.train_arguments import CacheArguments, PlanArguments, TrainArguments
from spar.common.errors import InputError
from spar.common.files import home_expanded
from spar.inference.image_files import check_folder

if TYPE_CHECKING:
    import torch

    from spar.training.estimate import HardwareConfig, StageEstimate
    from spar.training.plan import RunPlan


def train(argv: list[str]) -> int:
    """Train a recipe."""
    args, chosen = _recipe(argv, TrainArguments, "spar train", "spar train tiny --run runs/tiny")
    from spar.common.device import choose_device, device_name, dtype_name
    from spar.training.estimate import HardwareConfig, check_sizes, estimate
    from spar.training.plan import read_run, resolve
    from spar.training.run_folder import check_run
    from spar.training.trackers import check_trackers
    from spar.training.trainer import check_patterns

    run, resume = _run_folder(args.run, args.resume, chosen.name)
    init_from = None if args.init_from is None else local_folder(args.init_from)
    modules = check_sizes(chosen, tuple(chosen.stage(name) for name in args.stage) or chosen.stages)
    device = choose_device(args.device)
    run_plan = resolve(
        chosen, read_run(chosen, run, init_from), stages=args.stage, resume=resume,
        from_scratch=args.from_scratch, teacher=args.teacher, reinitialize=args.reinitialize,
        only_shown=args.dry_run,
    )  # fmt: skip
    check_trackers(args.track)
    if args.dry_run:
        check_run(run, chosen, fresh=run_plan.fresh)
        check_patterns(modules, run_plan)
        hardware = HardwareConfig.of_this_machine(str(device), args.parallelism)
        _print_plan(run_plan, hardware, estimate(chosen, hardware, args.stage))
        _check_words(run_plan)
        return 0
    check_folder(run)
    check_run(run, chosen, fresh=run_plan.fresh)  # before minutes of building, and before trackers are told
    if is_first_process():
        dtype = dtype_name(args.parallelism.dtype(device))
        print(f"training on {device_name(device)} in {dtype}", flush=True)
    return _train(args, run_plan, device, Continuation(run_plan, argv, resume=resume))


def _recipe(argv: list[str], kind: type[Any], prog: str, example: str) -> tuple[Any, Any]:
    """Parse the arguments of a verb whose first word is a recipe, or which has a recipe's file, and build that recipe
    from its flags.
    """
    file = flag_value("--config", argv)
    if file is not None and not argv[0].startswith("-"):
        raise InputError(f"expected a recipe's name or --config, got {argv[0]} and {file}")
    if file is None and (not argv or argv[0].startswith("-")):
        if {"-h", "--help"} & set(argv):
            parse(kind, ["--help"], prog)
        raise InputError(f"expected the recipe's name first, as in: {example}")
    from spar.recipes import REGISTRY, recipe
    from spar.training.data import DataConfig

    if file is not None:
        from spar.cli.recipe_files import read_recipe_file

        own, sized = read_recipe_file(read_path(file))
        argv = [own.name, *argv]
    else:
        own, sized = recipe(argv[0]), False
    base = own if sized else _sized(own, argv)
    args = parse(recipe_arguments(base, kind, REGISTRY[DataConfig], argv), argv, prog, none=True)
    chosen = build_recipe(args, base)
    return args, chosen if base is own else _with_words(chosen, base, own)


def _sized(base: Any, argv: Sequence[str]) -> Any:
    """A recipe with the sizes and forms of the SPAR folder that it starts from, as the flags' defaults.

    They are the weights' own, which may differ from the recipe's: it may be of published parts, or a later one. Where
    the folder has gone, or its files have, a run that is resumed has them.
    """
    from spar.checkpoints.spar_format import read_config
    from spar.training.checkpoint import META, existing_checkpoint
    from spar.training.systems.spar import SparRecipe

    named = flag_value("--init-from", argv)
    if named is None or not isinstance(base, SparRecipe):
        return base
    start = local_folder(read_path(named))
    if (start / "config.json").is_file():
        return replace(base, model=read_config(start))
    ended = (existing_checkpoint(start) / META).is_file()  # of a stage: the sizes are the recipe's
    return base if ended else _sized_as_begun(base, argv)


def _sized_as_begun(base: Any, argv: Sequence[str]) -> Any:
    """A recipe with the sizes and forms of the run that is to be resumed, where there is one of its kind."""
    from spar.recipes import REGISTRY
    from spar.training.run_folder import read_recipe

    named, asked = flag_value("--run", argv), flag_value("--resume", argv) or "never"
    run, resume = _run_folder(read_path(named) if named else None, asked, flag_value("--name", argv) or base.name)
    if not (resume and (run / "recipe.json").is_file()):
        return base
    held: Any = read_recipe(run / "recipe.json", REGISTRY)
    return replace(base, model=held.model) if type(held) is type(base) else base


def _with_words(chosen: Any, base: Any, own: Any) -> Any:
    """The recipe with its own vocabulary's size where its data have more words than the folder that it starts from, and
    no flag says the size.
    """
    words, size = chosen.data.text_tokenizer(), chosen.model.text.vocab_size  # no words: the folder's
    if words is None or len(words) <= size or size != base.model.text.vocab_size:
        return chosen
    text = replace(chosen.model.text, vocab_size=own.model.text.vocab_size)
    return replace(chosen, model=replace(chosen.model, text=text))


def plan(argv: list[str]) -> int:
    """Estimate the cost of a recipe on given GPUs."""
    args, chosen = _recipe(argv, PlanArguments, "spar plan", "spar plan spar-1b --gpus 64 --gpu h200")
    from spar.training.estimate import HardwareConfig, estimate
    from spar.training.plan import RunStatus, resolve

    hardware = HardwareConfig(
        args.gpus, args.gpu, args.mfu, sharded=args.strategy == "fsdp", grad_accum_steps=args.grad_accum_steps,
        activation_checkpointing=args.activation_checkpointing,
    )
    first = chosen.stages.index(chosen.stage(args.stage[0])) if args.stage else 0
    earlier = {stage.name: stage.steps for stage in chosen.stages[:first]}  # as if they had been trained
    status = RunStatus(Path("runs") / chosen.name, done=earlier)
    run_plan = resolve(chosen, status, stages=args.stage, only_shown=True)
    _print_plan(run_plan, hardware, estimate(chosen, hardware, args.stage))
    return 0


def _print_plan(plan: "RunPlan", hardware: "HardwareConfig", estimates: "Sequence[StageEstimate]") -> None:
    """Print what each stage of a run does, what it costs on the hardware, and what would not work."""
    from spar.training.files_data import FilesData, epochs_per_source, open_sources, weighted_sets

    if not is_first_process():
        return
    console = new_console()
    show_table(console, plan_table(plan))
    show_table(console, estimate_table(_left(plan, estimates), hardware))
    data = plan.recipe.data
    if isinstance(data, FilesData):
        with progress_bar("indexing the data"):
            sources = open_sources(data)
        weights = [weight for weight, _ in weighted_sets(data.sets)]
        stages = [one.config for one in plan.stages]
        show_table(console, epochs_table({one.name: epochs_per_source(one, sources, weights) for one in stages}))
    if fault := plan.status.init_fault:
        print(f"spar: note: the run has begun and goes on without what it started from: {fault}", file=sys.stderr)
    published = ", ".join(plan.recipe.published)
    if published and plan.stages[0].start.source == "random":
        print(f"spar: note: {published} start from random weights unless --init-from gives them", file=sys.stderr)
    for one in estimates:
        for warning in one.warnings:
            print(f"spar: note: {one.stage.name}: {warning}", file=sys.stderr)


def _check_words(plan: "RunPlan") -> None:
    """Refuse, as the training would, captions that the text tokenizer of a run's first weights cannot read."""
    from spar.training.files_data import FilesData, check_captions, open_sources
    from spar.training.run_folder import text_tokenizer_folder

    recipe, stages = plan.recipe, [one.config for one in plan.stages if not one.skipped]
    if not isinstance(recipe.data, FilesData):
        return
    tokenizer = recipe.load_tokenizer(text_tokenizer_folder(recipe, plan.run, plan.init_from))
    with progress_bar("reading captions"):
        check_captions(recipe.data, stages, open_sources(recipe.data), recipe.prompts(tokenizer))


def _left(plan: "RunPlan", estimates: "Sequence[StageEstimate]") -> "list[StageEstimate]":
    """The stages that are still to be trained, with the time of the steps that are left."""
    return [
        replace(cost, seconds=cost.seconds * (1 - one.start.step / one.config.steps))
        for one, cost in zip(plan.stages, estimates, strict=True) if not one.skipped
    ]


def cache(argv: list[str]) -> int:
    """Compute the frozen features of a recipe's data sets."""
    example = "spar cache RECIPE --init-from MODEL --data.source files --data.sets DATA -o features"
    args, chosen = _recipe(argv, CacheArguments, "spar cache", example)
    from spar.checkpoints.spar_format import load_model
    from spar.common.device import choose_device, device_name
    from spar.common.process_group import PATIENCE, ProcessGroup
    from spar.training.distributed import ParallelismConfig
    from spar.training.feature_cache import write_cache
    from spar.training.files_data import FilesData, open_sources

    if not isinstance(chosen.data, FilesData):
        raise InputError(f"expected data sets (--data.source files --data.sets DATA), got source {chosen.data.kind}")
    group = ProcessGroup.meet(choose_device(args.device), patience=PATIENCE)
    if group.main:
        print(f"computing on {device_name(group.device)}", flush=True)
    with group.main_first():  # it indexes what lies far away, and the others find the index
        sources = open_sources(chosen.data)
    tokenizer = load_model(local_folder(args.init_from)).model.tokenizer.to(group.device)
    precision = ParallelismConfig(precision=args.precision).dtype(group.device)
    with progress_bar("features") as advance:
        bad = write_cache(
            tokenizer, sources, args.output, side=chosen.image_size, batch=args.batch,
            workers=chosen.data.workers, precision=precision, profiles=chosen.data.color_profiles, advance=advance,
            group=group,
        )
    total = sum(len(source) for source in sources)
    if group.main:
        print(f"features of {total - bad} samples, {bad} bad ones left out; read them with --data.cache {args.output}")
    return 0


def _train(args: Any, plan: "RunPlan", device: "torch.device", going_on: Continuation) -> int:
    """Train with a bar; print the model's folder at the end, or what is left and the command that goes on.

    Raises:
        InputError: what went wrong, in a stage with how to go on once that is mended.
        Failure: of the machine or of another process, or numbers that are not finite.
    """
    from spar.training.interruption import listening
    from spar.training.loop import NonFiniteLoss
    from spar.training.trackers import tracked
    from spar.training.trainer import execute

    run = plan.run
    quiet = not is_first_process()  # what has begun is announced to the first one alone
    try:
        shown = nullcontext((None, None)) if quiet else training_display()
        trackers = () if quiet else args.track
        with shown as (announce, report), tracked(trackers, plan.recipe, run, report) as told:
            noted = announce and going_on.noted(announce)
            if execute(plan, device=device, parallelism=args.parallelism, report=told, announce=noted) is None:
                raise KeyboardInterrupt  # a signal has stopped it, which trackers are told
    except KeyboardInterrupt:
        if not quiet:
            print(f"spar: stopped; {going_on}", file=sys.stderr)
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:  # Python's own, and what Rich makes of it
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        if not quiet:
            print(f"spar: stopped by a closed pipe; {going_on}", file=sys.stderr)
        return BROKEN_PIPE
    except InputError as error:
        if going_on.begun is None:  # what was given is refused, or this process is not the first
            raise
        raise InputError(f"{error}; {going_on}") from error
    except Exception as error:
        with listening():  # a launcher stops those that another process has left, before they have said so
            more = "" if quiet else f"; {going_on}"
        line = str(error) if isinstance(error, NonFiniteLoss) else explain(error, "train")
        if line is None:
            error.add_note(f"spar: the training has failed{more}")
            raise
        raise Failure(f"{line}{more}") from error
    if quiet:
        return 0
    if (run / "model" / "config.json").is_file():
        model_words = shlex.join(["--model", str(run / "model")])
        print(f'the model is in {run / "model"}; try: spar generate "a red circle" {model_words}')
    else:
        print(f"done; the weights at the end of each stage are in {run}/STAGE/done")
    return 0


def _run_folder(named: Path | None, resume: str, name: str) -> tuple[Path, bool]:
    """The run's folder, and whether to resume it, by --run, --resume and the recipe's name."""
    if resume in ("never", "auto"):
        return named or Path("runs") / name, resume == "auto"
    run = Path(home_expanded(resume))
    if not resume or not (run / "recipe.json").is_file():
        raise InputError(f"--resume: expected never, auto or the folder of a run, got {resume!r}")
    if named not in (None, run):
        raise InputError(f"--run and --resume: expected one folder, got {str(named)!r} and {resume!r}")
    return run, True
