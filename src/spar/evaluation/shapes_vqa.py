"""Shapes-VQA: one-word answers to six kinds of questions, 200 each, with two baselines for every score.

"blind": the most common answer for the question's text alone, learnt from validation scenes, never from the benchmark's
questions. "gray": the model itself with a plain gray image instead of the right one.

Shapes-VQA-Bind has the same form: seven kinds of questions about scenes in which objects share a shape, a colour or
both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.options import EvalOptions, PipelineLike, ask_known, batches, scene_kind, scene_seed, seed_block
from spar.evaluation.results import Result, Score, mean_score
from spar.worlds.shapes.captions import QUESTION_KINDS, Question, questions, split_words
from spar.worlds.shapes.dataset import seed_at
from spar.worlds.shapes.questions import BINDING_QUESTION_KINDS
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import COLORS, SHAPES, SIDE, Scene, make_scene
from spar.worlds.shapes.tokenizer import SINGULARS

QUESTIONS = 200  # per kind
GRAY = 128
_KINDS = {"shapes-vqa": QUESTION_KINDS, "shapes-vqa-bind": BINDING_QUESTION_KINDS}
BLIND_SAMPLE = 2000  # validation scenes for each kind of question
BLIND_LEAST = 20  # a text (or pattern) with fewer samples is replaced by the next more general one
_VALIDATION_OFFSET = 10**8  # far from training's own validation


@dataclass(frozen=True)
class VqaItem:
    """A question about a scene's image."""

    scene: Scene
    image: np.ndarray
    question: Question


def vqa_items(options: EvalOptions, benchmark: str = "shapes-vqa") -> list[VqaItem]:
    """The questions of all kinds, in order, one per scene: always the same for the same combinations."""
    count = options.limit or QUESTIONS
    return [
        item
        for part in range(len(_KINDS[benchmark]))
        for item in _kind_items(benchmark, part, count, options.combinations)
    ]


def _kind_items(benchmark: str, part: int, count: int, combinations: str) -> list[VqaItem]:
    number, kind = seed_block(benchmark, part, combinations), _KINDS[benchmark][part]
    items: list[VqaItem] = []
    index = 0
    while len(items) < count:
        seed = scene_seed(number, index)
        index += 1
        scene = make_scene(seed, kind=scene_kind(benchmark, index), combinations=combinations)
        for question in questions(scene, np.random.default_rng((seed, 1)), [kind]):
            items.append(VqaItem(scene, render(scene), question))
    return items


def shapes_vqa(pipe: PipelineLike, options: EvalOptions | None = None, progress: Advance | None = None) -> Result:
    """Run Shapes-VQA on `pipe.understand(images, questions)`; an answer is right if it is the word, in any case.

    Scores: "overall" (mean of the kinds) and one per kind, each also with the prefixes "blind." and "gray.".
    """
    return _run("shapes-vqa", pipe, options or EvalOptions(), progress)


def shapes_vqa_bind(
    pipe: PipelineLike, options: EvalOptions | None = None, progress: Advance | None = None
) -> Result:
    """Run Shapes-VQA-Bind on `pipe.understand`; scores as in `shapes_vqa`."""
    return _run("shapes-vqa-bind", pipe, options or EvalOptions(), progress)


def answer(
    pipe: PipelineLike, jobs: Sequence[tuple[Any, str]], options: EvalOptions, progress: Advance | None = None
) -> list[str]:
    """The answers to (image, question); that to a question which is refused is empty."""

    def understand(known: Sequence[tuple[Any, str]]) -> list[str]:
        return pipe.understand([image for image, _ in known], [text for _, text in known]).texts

    answers: list[str | None] = []
    for chunk in batches(jobs, options.batch, progress):
        answers += ask_known(pipe, chunk, lambda job: job[1], understand)
    return [given or "" for given in answers]


def _run(benchmark: str, pipe: PipelineLike, options: EvalOptions, progress: Advance | None) -> Result:
    from PIL import Image

    clock = Timer()
    items = vqa_items(options, benchmark)
    plain = Image.fromarray(np.full((SIDE, SIDE, 3), GRAY, dtype=np.uint8))
    jobs = [(Image.fromarray(item.image), item.question.text) for item in items]
    jobs += [(plain, item.question.text) for item in items]
    answers = answer(pipe, jobs, options, progress)
    blind = BlindBaseline.learn(options.combinations, benchmark)
    given = {
        "": answers[: len(items)],
        "blind.": [blind.answer(item.question) for item in items],
        "gray.": answers[len(items) :],
    }
    records = [
        {"kind": item.question.kind, "question": item.question.text, "expected": item.question.answer, "answer": answer}
        for item, answer in zip(items, answers[: len(items)], strict=True)
    ]
    scores = [score for prefix, texts in given.items() for score in _scores(prefix, items, texts, options.seed)]
    settings = run_settings(
        pipe, options, clock, sampled=False, questions=len(items),
        baselines=f"blind: majority answer over {BLIND_SAMPLE} validation scenes a kind; gray: a plain gray image",
    )
    return Result(benchmark, tuple(scores), settings, {"questions": records})


def _scores(prefix: str, items: Sequence[VqaItem], answers: Sequence[str], seed: int) -> list[Score]:
    groups: dict[str, list[float]] = {item.question.kind: [] for item in items}
    for item, answer in zip(items, answers, strict=True):
        groups[item.question.kind].append(float(is_right(answer, item.question.answer)))
    overall = mean_score(f"{prefix}overall", *groups.values(), seed=seed)
    return [overall, *(mean_score(f"{prefix}{kind}", group, seed=seed) for kind, group in groups.items())]


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected word; case, surrounding spaces and a final full stop are ignored."""
    return answer.strip().removesuffix(".").strip().lower() == expected


# ---- the blind baseline ----------------------------------------------------------------------------------------------


def pattern(text: str) -> str:
    """A question with placeholders for colours and shapes: "is there a <color> <shape> ?"."""
    words = ["a" if word == "an" else word for word in split_words(text)]
    opened = ["<color>" if word in COLORS else "<shape>" if SINGULARS.get(word, word) in SHAPES else word
              for word in words]
    return " ".join(opened)


@dataclass(frozen=True)
class BlindBaseline:
    """The most common answer for a question's text, else for its pattern, else for its kind."""

    by_words: dict[str, str]
    by_kind: dict[str, str]

    def answer(self, question: Question) -> str:
        for words in (question.text, pattern(question.text)):
            if words in self.by_words:
                return self.by_words[words]
        return self.by_kind[question.kind]

    @classmethod
    def learn(cls, combinations: str = "seen", benchmark: str = "shapes-vqa") -> BlindBaseline:
        """Learn from validation scenes of the same kinds and combinations (cached; about a second)."""
        return _learn(combinations, benchmark)


@cache
def _learn(combinations: str, benchmark: str) -> BlindBaseline:
    counts: dict[str, Counter[str]] = {}
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind in _KINDS[benchmark]}
    for index in range(BLIND_SAMPLE):
        seed = seed_at("validation", _VALIDATION_OFFSET + index)
        scene = make_scene(seed, kind=scene_kind(benchmark, index), combinations=combinations)
        for question in questions(scene, np.random.default_rng((seed, 2)), _KINDS[benchmark]):
            kinds[question.kind][question.answer] += 1
            for words in {question.text, pattern(question.text)}:
                counts.setdefault(words, Counter())[question.answer] += 1
    common = {words: _most(answers) for words, answers in counts.items() if answers.total() >= BLIND_LEAST}
    return BlindBaseline(common, {kind: _most(answers) for kind, answers in kinds.items()})


def _most(answers: Counter[str]) -> str:
    """The most common answer; of several, the alphabetically first, so that the order of questions is irrelevant."""
    return min(answers, key=lambda answer: (-answers[answer], answer))
