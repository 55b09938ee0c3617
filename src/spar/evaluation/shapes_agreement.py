"""Shapes-Agreement: what a model says of the images that it has just drawn, from their own codes, against the prompts.

The prompts and seeds are those of Shapes-Gen, one image each; the question is about what the prompt fixes. No image is
encoded: the model reads the codes of both vocabularies as it drew them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spar.common.errors import InputError
from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.options import EvalOptions, ask_known, batches, image_seed, pixels
from spar.evaluation.results import Result, Score, mean_score
from spar.evaluation.shapes_gen import GenPrompt, gen_prompts
from spar.evaluation.shapes_vqa import is_right
from spar.worlds.shapes.detector import detect, satisfies
from spar.worlds.shapes.questions import Question, questions

# What is asked of each task's images; "exists" where the scene does not allow it.
ASKED = {
    "single_object": "shape", "two_object": "exists", "counting": "count", "colors": "color", "position": "position",
    "color_attribution": "color",
}  # fmt: skip


def prompt_question(prompt: GenPrompt) -> Question:
    """The question about a prompt's images, the same in every run."""
    rng = np.random.default_rng((prompt.block, prompt.index))
    return questions(prompt.scene, rng, (ASKED[prompt.task], "exists"))[0]


def shapes_agreement(pipe: Any, options: EvalOptions | None = None, progress: Advance | None = None) -> Result:
    """Run Shapes-Agreement on `pipe.generate`, whose output has `codes`, and `pipe.understand_codes`.

    Scores: "overall" (mean of the tasks), one per task, "part.drawn": the share of these images that the detector finds
    right, and "part.of_drawn": the agreement over those alone, if there are any.

    Raises:
        InputError: a model whose system has no codes.
    """
    if not hasattr(pipe, "understand_codes"):
        raise InputError("shapes-agreement needs a model with visual vocabularies: expected one of DualToken")
    options, clock = options or EvalOptions(), Timer()
    jobs = [(prompt, prompt_question(prompt)) for prompt in gen_prompts(options)]

    def ask(known: Sequence[tuple[GenPrompt, Question]]) -> list[tuple[str, bool]]:
        prompts, asked = [prompt for prompt, _ in known], [question for _, question in known]
        seeds = [image_seed(options.seed, prompt.block, prompt.index) for prompt in prompts]
        drawn = pipe.generate([prompt.text for prompt in prompts], seed=seeds, **options.sampling())
        answers = pipe.understand_codes(drawn.codes, [question.text for question in asked]).texts
        seen = [
            satisfies(detect(pixels(image)), prompt.claim)[0]
            for image, prompt in zip(drawn.images, prompts, strict=True)
        ]
        return list(zip(answers, seen, strict=True))

    found: list[tuple[str, bool] | None] = []
    for chunk in batches(jobs, options.batch, progress):
        found += ask_known(pipe, chunk, lambda job: job[0].text, ask)
    records = []
    for (prompt, question), one in zip(jobs, found, strict=True):
        answer, drawn = one or ("", False)
        records.append({
            "task": prompt.task, "prompt": prompt.text, "question": question.text, "expected": question.answer,
            "answer": answer, "drawn": drawn,
        })  # fmt: skip
    settings = run_settings(pipe, options, clock, sampled=True, prompts=len(jobs))
    return Result("shapes-agreement", _scores(records, options.seed), settings, {"prompts": records})


def _scores(records: Sequence[dict[str, Any]], seed: int) -> tuple[Score, ...]:
    tasks: dict[str, list[float]] = {}
    for one in records:
        tasks.setdefault(one["task"], []).append(float(is_right(one["answer"], one["expected"])))
    agreeing = [is_right(one["answer"], one["expected"]) for one in records if one["drawn"]]
    return (
        mean_score("overall", *tasks.values(), seed=seed),
        *(mean_score(name, values, seed=seed) for name, values in tasks.items()),
        mean_score("part.drawn", [float(one["drawn"]) for one in records], seed=seed),
        *([mean_score("part.of_drawn", [float(one) for one in agreeing], seed=seed)] if agreeing else []),
    )
