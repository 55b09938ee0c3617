"""Shapes-Chat: conversations of three turns about one image; the third answer must be right.

The three questions are of different kinds, what is said before does not give the third answer away, and the model reads
its own earlier answers. "part.alone" is the share of the third questions that are answered rightly when they are asked
alone: what a conversation costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from spar.common.errors import InputError
from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.options import EvalOptions, PipelineLike, is_understood, scene_seed, seed_block
from spar.evaluation.results import Result, mean_score
from spar.evaluation.shapes_vqa import answer, is_right
from spar.worlds.shapes.questions import BINDING_QUESTION_KINDS, QUESTION_KINDS, Question, questions
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import ALL_KINDS, make_scene
from spar.worlds.shapes.tokenizer import split_words

CONVERSATIONS = 150
TURNS = 3
KINDS = tuple(dict.fromkeys((*QUESTION_KINDS, *BINDING_QUESTION_KINDS)))


@dataclass(frozen=True)
class ChatItem:
    """An image and the questions about it, in order."""

    image: np.ndarray
    questions: tuple[Question, ...]


def chat_items(options: EvalOptions) -> list[ChatItem]:
    """The conversations, scenes of all kinds in turn: always the same for the same combinations."""
    number = seed_block("shapes-chat", 0, options.combinations)
    items: list[ChatItem] = []
    index = 0
    while len(items) < (options.limit or CONVERSATIONS):
        seed = scene_seed(number, index)
        scene = make_scene(seed, kind=ALL_KINDS[index % len(ALL_KINDS)], combinations=options.combinations)
        rng = np.random.default_rng((seed, 1))
        asked = questions(scene, rng, rng.permutation(KINDS).tolist())[:TURNS]
        if len(asked) == TURNS and not gives_away(asked[:-1], asked[-1]):
            items.append(ChatItem(render(scene), tuple(asked)))
        index += 1
    return items


def gives_away(earlier: Sequence[Question], question: Question) -> bool:
    """Whether the turns before a question tell its answer: by a word that they say, or an object that they name."""
    said = " ".join(f"{turn.text} {turn.answer}" for turn in earlier)
    if question.kind == "exists":
        return question.text.removeprefix("is there ").removesuffix("?").partition(" ")[2] in said
    return question.answer not in ("yes", "no") and question.answer in split_words(said)


def shapes_chat(pipe: PipelineLike, options: EvalOptions | None = None, progress: Advance | None = None) -> Result:
    """Run Shapes-Chat on `pipe.chat`.

    Scores: "overall" (the third turn), "turn_1", "turn_2", and "part.alone" (the third question asked alone).
    """
    options, clock = options or EvalOptions(), Timer()
    items = chat_items(options)
    answers = []
    for done, item in enumerate(items, start=1):
        answers.append(converse(pipe, item))
        if progress is not None:
            progress(done, len(items))
    right = np.array([
        [is_right(given, question.answer) for given, question in zip(said, item.questions, strict=True)]
        for said, item in zip(answers, items, strict=True)
    ], dtype=np.float64)  # fmt: skip
    alone = answer(pipe, [(Image.fromarray(item.image), item.questions[-1].text) for item in items], options)
    scores = (
        mean_score("overall", right[:, -1], seed=options.seed),
        *(mean_score(f"turn_{turn + 1}", right[:, turn], seed=options.seed) for turn in range(TURNS - 1)),
        mean_score("part.alone", _right(alone, items), seed=options.seed),
    )
    records = [
        {"questions": [q.text for q in item.questions], "expected": [q.answer for q in item.questions], "answers": said}
        for item, said in zip(items, answers, strict=True)
    ]
    settings = run_settings(pipe, options, clock, sampled=False, conversations=len(items))
    return Result("shapes-chat", scores, settings, {"conversations": records})


def converse(pipe: PipelineLike, item: ChatItem) -> list[str]:
    """The model's answers, each given with the turns before in view; that to a refused question is empty.

    So are the answers after one that was so long that no further turn fits.
    """
    messages: list[dict[str, Any]] = []
    answers: list[str] = []
    for question in item.questions:
        image = [] if messages else [{"type": "image", "image": Image.fromarray(item.image)}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question.text}]})
        try:
            said = pipe.chat(messages) if is_understood(pipe, question.text) else None
        except InputError:
            if not answers:
                raise
            said = None
        if said is None:  # a conversation that breaks off
            return answers + [""] * (len(item.questions) - len(answers))
        answers.append("".join(said))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def _right(answers: Sequence[str], items: Sequence[ChatItem]) -> list[float]:
    return [float(is_right(given, item.questions[-1].answer)) for given, item in zip(answers, items, strict=True)]
