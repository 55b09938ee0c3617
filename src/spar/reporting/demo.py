"""The demonstration: every task, a small sample of every score, and one page with all of it.

DEMO/report.html            the page, self-contained
DEMO/gallery/ edits/ reconstructions/      the images
DEMO/results/               the results files of the sample
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar.evaluation.benchmarks import BENCHMARKS
from spar.evaluation.environment import machine_info, version_info
from spar.evaluation.options import VERSION_1, EvalOptions, pixels
from spar.evaluation.pixel_metrics import psnr
from spar.evaluation.results import Result, write_result
from spar.evaluation.shapes_edit import check_edit, edit_items
from spar.evaluation.shapes_recon import recon_scenes
from spar.evaluation.shapes_vqa import vqa_items
from spar.inference.image_files import save_images
from spar.processing.images import open_image, to_square
from spar.reporting.curves import read_metrics
from spar.reporting.report import (
    ReportAnswer,
    ReportData,
    ReportEdit,
    ReportImage,
    ReportReconstruction,
    ReportRouting,
    write_report,
)
from spar.reporting.routing_summary import collect_routing
from spar.reporting.run_report import visible_manifest
from spar.worlds.shapes.captions import parse
from spar.worlds.shapes.detector import detect, satisfies
from spar.worlds.shapes.render import render

PAGE = "report.html"
PROMPTS = (
    "a large red circle to the left of a small blue star",
    "a small yellow triangle on a navy background",
    "three large purple triangles",
    "a large purple ring and a small orange cross on a white background",
    "a small pink star above a large cyan circle",
    "two small red stars on a beige background",
    "a large blue triangle below a small green ring on a gray background",
    "a large yellow cross, a small purple square and a small cyan ring on a black background",
    "four small orange circles on a brown background",
    "a red square to the right of a yellow circle",
    "a small green cross and a large pink triangle on a gray background",
    "a large orange ring on a navy background",
)
EDITS_A_KIND, ANSWERS_A_KIND, RECONSTRUCTIONS = 2, 2, 10
ROUTED = 2  # prompts (and edits) whose routing is drawn in full
RECON_FACTOR = 8  # a score of reconstructions is cheap: this many times the limit

Step = Callable[[str, int, int], None]  # (name of the part, done, total)


@dataclass(frozen=True)
class DemoOptions:
    """`images`: images to reconstruct (the world's own if empty); `limit`: prompts of each benchmark task;
    `curves`: metrics.jsonl of the weights' training; `seed`: of all samples.
    """

    images: Sequence[Path] = ()
    limit: int = 4
    curves: Path | None = None
    seed: int = 0


@dataclass
class ReportSection:
    """One task's section of the page: its figures, its image files by name, and the routing of its prompts."""

    figures: list[Any] = field(default_factory=list)
    images: dict[str, Image.Image] = field(default_factory=dict)
    routing: list[ReportRouting] = field(default_factory=list)


def show_gallery(pipe: Any, options: DemoOptions) -> ReportSection:
    """Generate images from PROMPTS, each with the detector's verdict."""
    out = pipe.generate(list(PROMPTS), seed=options.seed)
    shown = ReportSection()
    for number, (prompt, image, routing) in enumerate(zip(PROMPTS, out.images, out.routing, strict=True)):
        right, _ = satisfies(detect(pixels(image)), parse(prompt))
        shown.figures.append(ReportImage(image, prompt, right))
        shown.images[_name(number, prompt)] = image
        shown.routing.append(ReportRouting(prompt, routing))
    return shown


def show_edits(pipe: Any, options: DemoOptions) -> ReportSection:
    """Edits of every kind, each with the detector's verdict."""
    items = edit_items(EvalOptions(limit=EDITS_A_KIND))
    before = [Image.fromarray(item.image) for item in items]
    out = pipe.edit(before, [item.edit.instruction for item in items], seed=options.seed)
    shown = ReportSection()
    for number, (item, source, image, routing) in enumerate(zip(items, before, out.images, out.routing, strict=True)):
        instruction = item.edit.instruction
        shown.figures.append(ReportEdit(source, instruction, image, check_edit(item, pixels(image)).right))
        shown.images |= _before_and_after(_name(number, instruction), source, image)
        shown.routing.append(ReportRouting(instruction, routing, source))
    return shown


def show_answers(pipe: Any, _: DemoOptions) -> ReportSection:
    """Questions of every kind, with the model's and the true answers."""
    items = vqa_items(EvalOptions(limit=ANSWERS_A_KIND))
    images = [Image.fromarray(item.image) for item in items]
    texts = pipe.understand(images, [item.question.text for item in items]).texts
    return ReportSection(
        figures=[
            ReportAnswer(image, item.question.text, text, item.question.answer)
            for image, item, text in zip(images, items, texts, strict=True)
        ]
    )


def show_reconstructions(pipe: Any, options: DemoOptions) -> ReportSection:
    """Reconstruct the given images, or some of the world's."""
    if options.images:
        names = [path.name for path in options.images]
        before = [to_square(open_image(path), pipe.image_size) for path in options.images]
    else:
        scenes = recon_scenes(EvalOptions(limit=RECONSTRUCTIONS))
        names = [f"{scene.kind} scene" for scene in scenes]
        before = [Image.fromarray(render(scene)) for scene in scenes]
    after = pipe.reconstruct(before).images
    shown = ReportSection()
    for number, (name, source, image) in enumerate(zip(names, before, after, strict=True)):
        decibels = psnr(np.asarray(image), np.asarray(source))
        shown.figures.append(ReportReconstruction(source, image, f"{name}, {decibels:.1f} dB"))
        shown.images |= _before_and_after(_name(number, name), source, image)
    return shown


def _name(number: int, text: str) -> str:
    """A file name from a number and the first words of a text."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return f"{number:02d}-{words[:60].rstrip('-')}"


def _before_and_after(name: str, before: Image.Image, after: Image.Image) -> dict[str, Image.Image]:
    return {f"{name}-before": before, f"{name}-after": after}


TASKS: dict[str, Callable[[Any, DemoOptions], ReportSection]] = {
    "gallery": show_gallery,
    "edits": show_edits,
    "answers": show_answers,
    "reconstructions": show_reconstructions,
}


def make_demo(pipe: Any, folder: Path, options: DemoOptions, step: Step = lambda *_: None) -> list[Result]:
    """Run the demonstration into an empty folder.

    Args:
        pipe: a `SparPipeline` of the shapes world.
        folder: output folder of the page and the images.
        options: contents of the page.
        step: called before each part.

    Returns:
        The results of the sample, one per benchmark of version 1 of the world.

    Raises:
        InputError: an image cannot be read, or the model is of another world.
    """
    began = time.monotonic()
    total = len(TASKS) + len(VERSION_1)
    shown: dict[str, ReportSection] = {}
    for done, (name, task) in enumerate(TASKS.items()):
        step(name, done, total)
        shown[name] = task(pipe, options)
        if images := shown[name].images:
            save_images(list(images.values()), [folder / name / f"{file}.png" for file in images])
    results = []
    for done, name in enumerate(VERSION_1, start=len(TASKS)):
        step(name, done, total)
        limit = options.limit * (RECON_FACTOR if name == "shapes-recon" else 1)
        sample = EvalOptions(limit=limit, seed=options.seed, images_per_prompt=1)
        results.append(BENCHMARKS[name](pipe, sample, None))
        write_result(folder / "results" / f"{name}.json", results[-1])
    routed = [shown["gallery"].routing, shown["edits"].routing]
    page = ReportData(
        title="SPAR on the shapes world",
        lead="Images, edits, answers and reconstructions of the model. Each image has the detector's verdict; the "
        f"scores are of a small sample, {options.limit} prompts per task, hence their wide intervals.",
        manifest=visible_manifest(pipe.manifest),
        facts={"seconds": round(time.monotonic() - began, 1), **machine_info(), **version_info()},
        gallery=shown["gallery"].figures,
        edits=shown["edits"].figures,
        answers=shown["answers"].figures,
        reconstructions=shown["reconstructions"].figures,
        routing=[one for routings in routed for one in routings[:ROUTED]],
        routing_summary=collect_routing(one.routing for routings in routed for one in routings),
        curves=read_metrics(options.curves) if options.curves else {},
        results=results,
    )
    write_report(folder / PAGE, page)
    return results
