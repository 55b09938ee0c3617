"""Shapes-Robust: 300 fixed prompts of strangers: other words, long texts, contradictions, misspellings and attacks.

What a prompt means is known where it means anything in the shapes world. A prompt may be refused, in words; one that
ends in any other error has failed, and the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from spar.common.errors import InputError
from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.options import EvalOptions, PipelineLike, batches, draws_layouts, image_seed, pixels
from spar.evaluation.results import Result, mean_score
from spar.worlds.shapes.captions import parse
from spar.worlds.shapes.detector import detect, satisfies
from spar.worlds.shapes.scope import prompt_notes

PROMPTS = Path(__file__).with_name("robustness.jsonl")
KINDS = ("diverse", "long", "misspelt", "contradictory", "hostile")
MEANT = KINDS[:3]  # the kinds of which each prompt has one meaning
REFUSED, FAILED, DRAWN, RIGHT = "refused", "failed", "drawn", "right"
BLOCK = 1000  # of the images' seeds, beyond those of the benchmarks that draw scenes
SHOWN = 80  # characters of a prompt or an error in the record


@dataclass(frozen=True)
class RobustPrompt:
    """A prompt, its kind, its place in the whole set, and a caption of what it means; "" if it means nothing."""

    kind: str
    index: int
    text: str
    means: str


def robust_prompts(limit: int | None = None) -> list[RobustPrompt]:
    """The prompts, in order; a limit takes the first of each kind."""
    lines = PROMPTS.read_text(encoding="ascii").splitlines()
    found: dict[str, list[RobustPrompt]] = {kind: [] for kind in KINDS}
    for index, line in enumerate(lines):
        row = json.loads(line)
        text = row["text"] * row.get("times", 1)
        found[row["kind"]].append(RobustPrompt(row["kind"], index, text, row.get("means", "")))
    return [prompt for prompts in found.values() for prompt in prompts[:limit]]


def shapes_robust(pipe: PipelineLike, options: EvalOptions | None = None, progress: Advance | None = None) -> Result:
    """Run Shapes-Robust on `pipe.generate`, one image a prompt.

    Scores: "overall" (mean of the kinds that mean something) and one for each of these: the share drawn right;
    "part.wrong", the share of the prompts that mean something of which another image was drawn; "part.<kind>_refused"
    of all kinds; "part.named", of the misspelt prompts refused, those whose message suggests a word that was meant;
    "part.noted", of the contradictory prompts drawn, those with a note to the user (`prompt_notes`); and
    "part.handled", the share of all prompts that were drawn or refused in words, not failed.
    The prompts are the same for all `combinations`, which change the seeds alone.

    Raises:
        InputError: a setting that the model refuses.
    """
    options, clock = options or EvalOptions(), Timer()
    prompts = robust_prompts(options.limit)
    ended: list[tuple[str, str]] = []
    for chunk in batches(prompts, options.batch, progress):
        ended += _draw(pipe, chunk, options)
    by_kind = {
        kind: [one for prompt, one in zip(prompts, ended, strict=True) if prompt.kind == kind] for kind in KINDS
    }
    right = {kind: [float(outcome == RIGHT) for outcome, _ in by_kind[kind]] for kind in MEANT}
    named = [
        float(any(f"(perhaps {word})" in said for word in _missing(prompt)))
        for prompt, (outcome, said) in zip(prompts, ended, strict=True)
        if prompt.kind == "misspelt" and outcome == REFUSED
    ]
    noted = [
        float(bool(prompt_notes(prompt.text)))
        for prompt, (outcome, _) in zip(prompts, ended, strict=True)
        if prompt.kind == "contradictory" and outcome == DRAWN
    ]
    wrong = [float(outcome == DRAWN) for kind in MEANT for outcome, _ in by_kind[kind]]
    scores = (
        mean_score("overall", *right.values(), seed=options.seed),
        *(mean_score(kind, values, seed=options.seed) for kind, values in right.items()),
        *(
            mean_score(f"part.{kind}_refused", [float(one == REFUSED) for one, _ in values], seed=options.seed)
            for kind, values in by_kind.items()
        ),
        mean_score("part.wrong", wrong, seed=options.seed),
        *(
            mean_score(name, values, seed=options.seed)
            for name, values in (("part.named", named), ("part.noted", noted)) if values
        ),
        mean_score("part.handled", [float(outcome != FAILED) for outcome, _ in ended], seed=options.seed),
    )
    records: dict[str, list[dict[str, object]]] = {"prompts": [], "others": []}
    for prompt, (outcome, said) in zip(prompts, ended, strict=True):
        record: dict[str, object] = {
            "kind": prompt.kind, "prompt": _shown(prompt.text), "outcome": outcome, "said": _shown(said)
        }  # fmt: skip
        if prompt.kind in MEANT:
            records["prompts"].append({**record, "right": int(outcome == RIGHT)})
        else:
            records["others"].append(record)
    settings = run_settings(
        pipe, options, clock, sampled=True, prompts=len(prompts), layout=draws_layouts(pipe, options)
    )
    return Result("shapes-robust", scores, settings, records)


def _draw(pipe: PipelineLike, prompts: Sequence[RobustPrompt], options: EvalOptions) -> list[tuple[str, str]]:
    """How each prompt of a batch ended, and what was said of it."""
    block = BLOCK + 50 * (options.combinations == "held_out")
    own = {} if options.layout is None else {"layout": options.layout}

    def check(prompt: RobustPrompt) -> tuple[str, str] | None:
        try:
            pipe.check_text(prompt.text, "prompt")
        except InputError as error:
            return REFUSED, str(error)
        except Exception as error:
            return _failed(error)
        return None

    def draw(some: Sequence[RobustPrompt]) -> list[tuple[str, str]]:
        """Together, or one by one where that fails."""
        texts, seeds = [one.text for one in some], [image_seed(options.seed, block, one.index) for one in some]
        try:
            images = pipe.generate(texts, seed=seeds, num_images_per_prompt=1, **options.sampling(), **own).images
        except InputError:  # of the settings: the prompts were checked
            raise
        except Exception as error:
            return [_failed(error)] if len(some) == 1 else [end for prompt in some for end in draw([prompt])]
        return [(_verdict(prompt, image), "") for prompt, image in zip(some, images, strict=True)]

    refused = {prompt.index: end for prompt in prompts if (end := check(prompt))}
    taken = [prompt for prompt in prompts if prompt.index not in refused]
    drawn = dict(zip([prompt.index for prompt in taken], draw(taken) if taken else [], strict=True))
    return [(refused | drawn)[prompt.index] for prompt in prompts]


def _failed(error: Exception) -> tuple[str, str]:
    """An error that no user should see."""
    return FAILED, f"{type(error).__name__}: {error}"


def _verdict(prompt: RobustPrompt, image: Image.Image) -> str:
    right = bool(prompt.means) and satisfies(detect(pixels(image)), parse(prompt.means))[0]
    return RIGHT if right else DRAWN


def _missing(prompt: RobustPrompt) -> set[str]:
    """Words of a misspelt prompt's meaning that its text has not."""
    return {*prompt.means.split()} - {*prompt.text.split()}


def _shown(text: str) -> str:
    """The start of a text in printable ASCII."""
    return text[:SHOWN].encode("ascii", "backslashreplace").decode("ascii").replace("\0", "\\0")
