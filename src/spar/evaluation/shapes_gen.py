"""Shapes-Gen, modelled on GenEval: six tasks, 100 prompts each, 4 images per prompt, read by the world's detector.

An image is right only if the whole prompt is true of it and it shows nothing else. Every prompt is a caption as in
training and always names colours: the tasks differ in the other attributes and in the number of objects.

Shapes-Gen-Bind has the same form on scenes in which objects share a shape, a colour or both: each attribute must go to
its own object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.matching import fidelity_score
from spar.evaluation.options import (
    EvalOptions,
    PipelineLike,
    ask_known,
    batches,
    draws_layouts,
    image_seed,
    pixels,
    scene_seed,
    seed_block,
)
from spar.evaluation.results import Result, Score, mean_score
from spar.worlds.shapes.captions import Claim, caption, parse
from spar.worlds.shapes.detector import PARTS, Detection, detect, satisfies
from spar.worlds.shapes.scene import Scene, make_scene

PROMPTS = 100  # per task
_NEW_TEXT_TRIES = 1000  # scenes searched for unused texts, before texts may repeat


@dataclass(frozen=True)
class GenTask:
    """One task: the kind of scene, whether size and background are named (random if None), and different colours.

    `single_object` and `two_object` are like captions; `colors` names an object's colour and the background's;
    `color_attribution` names two different colours and nothing else.
    """

    name: str
    kind: str
    size: bool | None = None
    background: bool | None = None
    two_colors: bool = False


TASKS = (
    GenTask("single_object", "single"),
    GenTask("two_object", "two"),
    GenTask("counting", "count"),
    GenTask("colors", "single", size=False, background=True),
    GenTask("position", "position"),
    GenTask("color_attribution", "two", size=False, background=False, two_colors=True),
)
BIND_TASKS = (
    GenTask("shared", "shared", size=False),
    GenTask("shared_sizes", "shared", size=True),
    GenTask("twins", "twins", size=True),
)
_TASKS = {"shapes-gen": TASKS, "shapes-gen-bind": BIND_TASKS}


@dataclass(frozen=True)
class GenPrompt:
    """One prompt, its claim, and a scene of which it is true."""

    task: str
    index: int
    block: int
    text: str
    claim: Claim
    scene: Scene


def gen_prompts(options: EvalOptions, benchmark: str = "shapes-gen") -> list[GenPrompt]:
    """The prompts of all tasks, in order: always the same for the same combinations; a limit takes the first."""
    count = options.limit or PROMPTS
    return [
        prompt
        for part in range(len(_TASKS[benchmark]))
        for prompt in _task_prompts(benchmark, part, count, options.combinations)
    ]


def _task_prompts(benchmark: str, part: int, count: int, combinations: str) -> list[GenPrompt]:
    task, number = _TASKS[benchmark][part], seed_block(benchmark, part, combinations)
    prompts: list[GenPrompt] = []
    used: set[str] = set()
    index = 0
    while len(prompts) < count:
        seed = scene_seed(number, index)
        index += 1
        scene = make_scene(seed, kind=task.kind, combinations=combinations)
        if task.two_colors and len({item.color for item in scene.objects}) < len(scene.objects):
            continue
        text = caption(scene, np.random.default_rng((seed, 1)), size=task.size, background=task.background)
        if text in used and index < _NEW_TEXT_TRIES:
            continue
        used.add(text)
        prompts.append(GenPrompt(task.name, len(prompts), number, text, parse(text), scene))
    return prompts


def shapes_gen(pipe: PipelineLike, options: EvalOptions | None = None, progress: Advance | None = None) -> Result:
    """Run Shapes-Gen on `pipe.generate`.

    Scores: "overall" (mean of the tasks), one per task (mean over images; the interval resamples prompts),
    "part.<name>": the share of images in which that part of the prompt is right, over prompts that have it, and
    "part.fidelity": the mean overlap of what was drawn with the best of the world's shapes (`DetectedObject.overlap`).
    """
    return _run("shapes-gen", pipe, options or EvalOptions(), progress)


def shapes_gen_bind(
    pipe: PipelineLike, options: EvalOptions | None = None, progress: Advance | None = None
) -> Result:
    """Run Shapes-Gen-Bind on `pipe.generate`; scores as in `shapes_gen`."""
    return _run("shapes-gen-bind", pipe, options or EvalOptions(), progress)


def draw_prompts(
    pipe: PipelineLike,
    prompts: Sequence[GenPrompt],
    texts: Sequence[str],
    options: EvalOptions,
    each: int,
    progress: Advance | None = None,
) -> list[Detection | None]:
    """What is seen in `each` images of every prompt, drawn from the text at its place; None where that is refused."""
    jobs = [
        (text, image_seed(options.seed, prompt.block, prompt.index, image))
        for prompt, text in zip(prompts, texts, strict=True)
        for image in range(each)
    ]

    def draw(known: Sequence[tuple[str, int]]) -> list[Detection]:
        asked, seeds = [text for text, _ in known], [seed for _, seed in known]
        own = {} if options.layout is None else {"layout": options.layout}
        images = pipe.generate(asked, seed=seeds, num_images_per_prompt=1, **options.sampling(), **own).images
        return [detect(pixels(image)) for image in images]

    drawn: list[Detection | None] = []
    for chunk in batches(jobs, options.batch, progress):
        drawn += ask_known(pipe, chunk, lambda job: job[0], draw)
    return drawn


def _run(benchmark: str, pipe: PipelineLike, options: EvalOptions, progress: Advance | None) -> Result:
    clock = Timer()
    prompts, each = gen_prompts(options, benchmark), options.images_per_prompt
    drawn = draw_prompts(pipe, prompts, [prompt.text for prompt in prompts], options, each, progress)
    verdicts = [
        (False, dict.fromkeys(PARTS, False)) if detection is None else satisfies(detection, prompts[at // each].claim)
        for at, detection in enumerate(drawn)
    ]
    seen = [detection for detection in drawn if detection is not None]
    right = np.array([verdict for verdict, _ in verdicts], dtype=np.float64).reshape(len(prompts), each)
    records = [
        {"task": prompt.task, "prompt": prompt.text, "right": row.astype(int).tolist()}
        for prompt, row in zip(prompts, right, strict=True)
    ]
    scores = (
        *_task_scores(prompts, right, options.seed),
        *_part_scores(prompts, verdicts, each, options.seed),
        *([fidelity_score(seen, options.seed)] if seen else []),
    )
    settings = run_settings(
        pipe, options, clock, sampled=True, images_per_prompt=each, prompts=len(prompts),
        layout=draws_layouts(pipe, options),
    )  # fmt: skip
    return Result(benchmark, scores, settings, {"prompts": records})


def _task_scores(prompts: Sequence[GenPrompt], right: np.ndarray, seed: int) -> tuple[Score, ...]:
    tasks = np.array([prompt.task for prompt in prompts])
    groups = {name: right[tasks == name].mean(1) for name in dict.fromkeys(prompt.task for prompt in prompts)}
    return (
        mean_score("overall", *groups.values(), seed=seed),
        *(mean_score(name, group, seed=seed) for name, group in groups.items()),
    )


def _part_scores(
    prompts: Sequence[GenPrompt], verdicts: Sequence[tuple[bool, dict[str, bool]]], each: int, seed: int
) -> tuple[Score, ...]:
    scores = []
    for part in PARTS:
        correct = np.array([parts[part] for _, parts in verdicts], dtype=np.float64).reshape(len(prompts), each).mean(1)
        used = np.array([says(prompt.claim, part) for prompt in prompts])
        if used.any():
            scores.append(mean_score(f"part.{part}", correct[used], seed=seed))
    return tuple(scores)


def says(claim: Claim, part: str) -> bool:
    """Whether a claim has a part (a key of the detector's PARTS); all claims have shapes and counts."""
    return {
        "background": claim.background is not None,
        "size": any(group.size is not None for group in claim.groups),
        "color": any(group.color is not None for group in claim.groups),
        "position": claim.relation is not None,
    }.get(part, True)
