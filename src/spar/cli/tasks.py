"""The verbs of the four tasks, and `spar info`."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar.cli import loading
from spar.cli.console import (
    is_one_of_several,
    model_facts,
    model_table,
    model_values,
    new_console,
    printable,
    progress_bar,
    show_table,
)
from spar.cli.notes import print_notes
from spar.cli.outputs import OutputFiles
from spar.cli.parsing import takes
from spar.cli.task_arguments import (
    EditArguments,
    GenerateArguments,
    InfoArguments,
    PromptFileArguments,
    ReconstructArguments,
    UnderstandArguments,
)
from spar.common.errors import InputError
from spar.inference.image_files import (
    check_folder,
    check_writable,
    list_images,
    output_paths,
    read_metadata,
    save_images,
    source_metadata,
)

if TYPE_CHECKING:
    from spar.inference.prompt_files import PromptSet

RECONSTRUCT_BATCH = 64
BATCH = 16  # images drawn together
SHOWN_FAULTS = 20


@takes(GenerateArguments, "spar generate")
def generate(args: GenerateArguments) -> int:
    """Generate images from prompts."""
    if args.prompts is not None:
        from spar.evaluation.prompt_formats import FORMATS

        return _draw_file(args, FORMATS[args.format](args.prompts))
    if is_one_of_several():
        raise InputError("expected --prompts FILE, whose images several processes share, got PROMPT")
    files = OutputFiles.of(args)
    pipe, keywords = loading.load_pipeline(args), args.keywords()
    pipe.check_settings(keywords)
    files.draw(pipe, pipe.generate, args.prompt, batch=args.batch or BATCH, **keywords)
    print_notes(pipe, args.prompt)
    warn_if_unquoted(args.prompt, "prompt")
    return 0


def _draw_file(args: PromptFileArguments, given: "PromptSet") -> int:
    """Draw the images of a file of prompts, or check them."""
    folder = args.output or Path("out")
    check_folder(folder)
    from spar.common.device import choose_device
    from spar.common.process_group import PATIENCE, ProcessGroup
    from spar.inference.prompt_files import begin, check, draw

    if args.check:
        wrong = check(folder, given)
        for line in wrong[:SHOWN_FAULTS]:
            print(line)
        print(f"{folder}: {len(wrong)} faults" if wrong else f"{folder} is complete")
        return 1 if wrong else 0
    group = ProcessGroup.meet(choose_device(args.device), patience=PATIENCE)
    pipe = loading.load_pipeline(args, group.device)
    keywords = args.keywords()
    if given.sources and "edit" not in pipe.tasks:
        raise InputError(f"editing: {pipe.system} does not define it")
    if not given.sources:
        pipe.check_settings(keywords)
    each = keywords.pop("num_images_per_prompt")
    seeds = begin(folder, pipe, given, group, seed=args.seed, each=each, settings=keywords)
    with progress_bar("generating") as advance:
        drawn = draw(
            folder, pipe, given, seeds, group, batch=args.batch or BATCH, settings=keywords, advance=advance
        )
    new = f"{drawn} new" if group.world == 1 else f"{drawn} new by this process of {group.world}"
    if group.main:
        print(f"{folder}  ({len(seeds)} images of {len(given.prompts)} prompts from seed {seeds[0]} on; {new})")
    return 0


@takes(EditArguments, "spar edit")
def edit(args: EditArguments) -> int:
    """Edit an image by instruction."""
    if args.prompts is not None:
        from spar.evaluation.prompt_formats import EDIT_FORMATS

        return _draw_file(args, EDIT_FORMATS[args.format](args.prompts, args.images or args.prompts.parent))
    if is_one_of_several():
        raise InputError("expected --prompts FILE, whose images several processes share, got IMAGE")
    files = OutputFiles.of(args)
    pipe, keywords = loading.load_pipeline(args), args.keywords()
    if "edit" not in pipe.tasks:
        pipe.edit(args.source, list(args.instruction))  # refuses, whatever the keywords
    make = partial(pipe.edit, args.source)
    files.draw(pipe, make, args.instruction, batch=args.batch or BATCH, source=args.source, **keywords)
    print_notes(pipe, args.instruction, [args.source])
    warn_if_unquoted(args.instruction, "instruction")
    return 0


@takes(UnderstandArguments, "spar understand")
def understand(args: UnderstandArguments) -> int:
    """Answer questions about an image."""
    pipe = loading.load_pipeline(args)
    out = pipe.understand(
        args.image, list(args.question), max_new_tokens=args.max_new_tokens, temperature=args.temperature,
        top_p=args.top_p, seed=args.seed, max_tiles=args.max_tiles,
    )
    for text in out.texts:
        print(text)
    print_notes(pipe, images=[args.image])
    warn_if_unquoted(args.question, "question")
    return 0


@takes(ReconstructArguments, "spar reconstruct")
def reconstruct(args: ReconstructArguments) -> int:
    """Encode and decode images with the unified tokenizer."""
    sources = [file for path in args.image for file in (list_images(path) if os.path.isdir(path) else [path])]
    folders = any(os.path.isdir(path) for path in args.image)
    output = Path("out") if folders and args.output is None else args.output
    paths = output_paths(output, _file_names(sources))
    check_writable(paths, overwrite=args.overwrite)
    pipe = loading.load_pipeline(args)
    from spar.evaluation.options import batches

    done = 0
    try:
        with progress_bar("reconstructing") as advance:
            for batch in batches(sources, RECONSTRUCT_BATCH, advance):
                out, then = pipe.reconstruct(list(batch)), done + len(batch)
                pairs = zip(batch, out.metadata, strict=True)
                metadata = [{**source_metadata(source), **values} for source, values in pairs]
                save_images(out.images, paths[done:then], metadata)
                done = then
    finally:  # also of what was written before a bad file
        for path in paths[:done]:
            print(path)
    print_notes(pipe, images=sources)
    return 0


def _file_names(sources: Sequence[Path]) -> list[str]:
    """Names of the outputs of files: the files' own, made unique."""
    stems = [source.stem for source in sources]
    whole = [stem if stems.count(stem) == 1 else source.name for stem, source in zip(stems, sources, strict=True)]
    return [name if whole.count(name) == 1 else f"{name}-{index}" for index, name in enumerate(whole)]


def warn_if_unquoted(texts: Sequence[str], what: str) -> None:
    """Print a note where the words of one text came as several arguments."""
    if len(texts) > 1 and not any(" " in text for text in texts):
        print(f"spar: note: {len(texts)} {what}s of one word each; one of several words needs quotes", file=sys.stderr)


@takes(InfoArguments, "spar info")
def info(args: InfoArguments) -> int:
    """Show how an image was made, or what a folder of weights contains."""
    from spar.checkpoints.bundled import local_folder

    folder = local_folder(args.path)
    if os.path.isdir(folder):
        from spar.checkpoints.inspect import inspect

        with progress_bar("inspecting"):
            found = inspect(folder)
        if args.json:
            print(json.dumps(model_values(found), indent=2))
        else:
            show_table(new_console(), model_table(found, args.path.resolve().name))
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
        print(printable(f"{key:<{width}}{value}"))
