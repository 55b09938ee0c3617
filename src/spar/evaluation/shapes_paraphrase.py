"""Shapes-Paraphrase: the first prompts, edits and questions of version 1's benchmarks, in forms that no training has.

A score is a share of the canonical one: right in other words, over right in the words of the benchmark, with the same
seeds. A text that is refused, for a word that the model does not know, is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings, used_guidance
from spar.evaluation.options import EvalOptions, PipelineLike, draws_layouts, seed_block
from spar.evaluation.results import Result, mean_score, ratio_score
from spar.evaluation.shapes_edit import edit_items, run_edits
from spar.evaluation.shapes_gen import GenPrompt, draw_prompts, gen_prompts
from spar.evaluation.shapes_vqa import VqaItem, answer, is_right, vqa_items
from spar.worlds.shapes.detector import satisfies
from spar.worlds.shapes.forms import paraphrase

PROMPTS, INSTRUCTIONS, QUESTIONS = 25, 30, 25  # per task or kind, so that each of the three parts has 150


def reword(texts: Sequence[str], combinations: str = "seen") -> list[str]:
    """Each text in a test form: always the same for the same text and place."""
    block = seed_block("shapes-paraphrase", 0, combinations)
    return [paraphrase(text, np.random.default_rng((block, i)), test=True) for i, text in enumerate(texts)]


def shapes_paraphrase(
    pipe: PipelineLike, options: EvalOptions | None = None, progress: Advance | None = None
) -> Result:
    """Run Shapes-Paraphrase on `pipe.generate`, `pipe.edit` and `pipe.understand`.

    Scores: "overall" (over all texts) and one for each of "generate", "edit" and "understand", shares of the canonical
    score (0 where that is 0), and "part.<task>_canonical" and "part.<task>" (the scores themselves).
    """
    options, clock = options or EvalOptions(), Timer()
    prompts = gen_prompts(replace(options, limit=options.limit or PROMPTS))
    edits = edit_items(replace(options, limit=options.limit or INSTRUCTIONS))
    asked = vqa_items(replace(options, limit=options.limit or QUESTIONS))
    canonical = {
        "generate": [prompt.text for prompt in prompts],
        "edit": [item.edit.instruction for item in edits],
        "understand": [item.question.text for item in asked],
    }
    reworded = {task: reword(texts, options.combinations) for task, texts in canonical.items()}
    ask: dict[str, Callable[[Sequence[str]], list[float]]] = {
        "generate": lambda texts: _generate(pipe, prompts, texts, options),
        "edit": lambda texts: [float(v.right) for v in run_edits(pipe, edits, texts, options)],
        "understand": lambda texts: _understand(pipe, asked, texts, options),
    }
    right: dict[str, dict[str, list[float]]] = {"canonical": {}, "reworded": {}}
    jobs = [(form, task, texts[task]) for form, texts in zip(right, (canonical, reworded), strict=True) for task in ask]
    for done, (form, task, texts) in enumerate(jobs, start=1):
        right[form][task] = ask[task](texts)
        if progress is not None:
            progress(done, len(jobs))
    pooled = {name: [value for values in groups.values() for value in values] for name, groups in right.items()}
    scores = [ratio_score("overall", pooled["reworded"], pooled["canonical"], seed=options.seed)]
    for task in canonical:
        scores.append(ratio_score(task, right["reworded"][task], right["canonical"][task], seed=options.seed))
    for task in canonical:
        scores.append(mean_score(f"part.{task}_canonical", right["canonical"][task], seed=options.seed))
        scores.append(mean_score(f"part.{task}", right["reworded"][task], seed=options.seed))
    records = [
        {"task": task, "canonical": text, "text": other, "right": [was, now]}
        for task, texts in canonical.items()
        for text, other, was, now in zip(
            texts, reworded[task], right["canonical"][task], right["reworded"][task], strict=True
        )
    ]
    settings = run_settings(
        pipe, options, clock, sampled=True, texts=len(records), layout=draws_layouts(pipe, options),
        edit_layout=draws_layouts(pipe, options, edits=True),
        edit_guidance=used_guidance(pipe, options, edits=True),
    )
    return Result("shapes-paraphrase", tuple(scores), settings, {"texts": records})


def _generate(
    pipe: PipelineLike, prompts: Sequence[GenPrompt], texts: Sequence[str], options: EvalOptions
) -> list[float]:
    """Whether the one image of each text is right."""
    drawn = draw_prompts(pipe, prompts, texts, options, each=1)
    return [
        float(seen is not None and satisfies(seen, prompt.claim)[0])
        for seen, prompt in zip(drawn, prompts, strict=True)
    ]


def _understand(
    pipe: PipelineLike, items: Sequence[VqaItem], texts: Sequence[str], options: EvalOptions
) -> list[float]:
    jobs = [(Image.fromarray(item.image), text) for item, text in zip(items, texts, strict=True)]
    return [
        float(is_right(given, item.question.answer))
        for given, item in zip(answer(pipe, jobs, options), items, strict=True)
    ]
