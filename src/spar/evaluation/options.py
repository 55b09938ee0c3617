"""Options of a benchmark, and the seeds of its scenes and of its generated images.

The prompts of a benchmark are fixed (a function of the task and the position in it), so that results stay comparable;
the option `seed` changes only the model's samples and the bootstrap's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from spar.common.errors import InputError
from spar.common.progress import Advance
from spar.worlds.shapes.scene import BINDING_KINDS, SEED_RANGES, SIDE

R = TypeVar("R")
T = TypeVar("T")

VERSION_1 = ("shapes-gen", "shapes-edit", "shapes-vqa", "shapes-recon")
BENCHMARK_NAMES = (
    *VERSION_1, "shapes-gen-bind", "shapes-edit-bind", "shapes-vqa-bind", "shapes-paraphrase", "shapes-chat",
    "shapes-zero-shot",
)  # fmt: skip
BEFORE_SWAP = "original encoder"  # label of an understanding result with the encoder before the swap
_BLOCK = 10**6  # seeds of a task; the benchmark range has a thousand such blocks


class PipelineLike(Protocol):
    """Methods of a model that the benchmarks call, as `SparPipeline` has them."""

    def generate(
        self, prompt: Sequence[str], *, seed: Sequence[int], num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None, guidance_scale: float | None = None,
    ) -> Any: ...  # fmt: skip

    def edit(
        self, image: Sequence[Image.Image], instruction: Sequence[str], *, seed: Sequence[int],
        num_inference_steps: int | None = None, guidance_scale: float | None = None,
    ) -> Any: ...  # fmt: skip

    def understand(self, image: Sequence[Image.Image], question: Sequence[str]) -> Any: ...

    def reconstruct(self, image: Sequence[Image.Image]) -> Any: ...

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Any: ...

    def check_text(self, text: str, what: str) -> None: ...


@dataclass(frozen=True)
class EvalOptions:
    """Options of a benchmark.

    `limit`: prompts per task (questions per kind, scenes), None for the benchmark's full number; a smaller one takes
    the first of the same prompts. `num_inference_steps`, `guidance_scale`: the model's own if None. `images_per_prompt`
    is Shapes-Gen's and Shapes-Gen-Bind's; `layout`: whether images are drawn of layouts, by default as the model does.
    `batch`: outputs per call; it changes the time, never the scores.
    `combinations`: "seen" or "held_out". `label` is recorded in the result, to distinguish two models.
    """

    limit: int | None = None
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    images_per_prompt: int = 4
    batch: int = 64
    combinations: str = "seen"
    label: str = ""
    layout: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("images_per_prompt", 1), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "limit" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name}: expected a whole number from {least}, got {value!r}")
        if self.combinations not in ("seen", "held_out"):
            raise InputError(f"combinations: expected 'seen' or 'held_out', got {self.combinations!r}")

    def sampling(self) -> dict[str, Any]:
        """Keywords of the pipe's sampling tasks."""
        given = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {name: value for name, value in given.items() if value is not None}


def draws_layouts(pipe: PipelineLike, options: EvalOptions, *, edits: bool = False) -> bool:
    """Whether images of prompts, or of edits, are drawn of layouts."""
    if options.layout is not None:
        return options.layout
    sampling = getattr(getattr(pipe, "bundle", None), "sampling", None)
    return bool(getattr(sampling, "edit_layout" if edits else "layout", False))


def seed_block(benchmark: str, part: int, combinations: str = "seen") -> int:
    """Number of a task's own block of seeds: no two tasks, and no two sets of combinations, share a scene."""
    return 100 * BENCHMARK_NAMES.index(benchmark) + 50 * (combinations == "held_out") + part


def scene_seed(number: int, index: int) -> int:
    """Seed of scene `index` of a block, within the benchmark's range of seeds."""
    if not 0 <= index < _BLOCK:
        raise ValueError(f"index must be in [0, {_BLOCK}), got {index}")
    return SEED_RANGES["benchmark"][0] + number * _BLOCK + index


def image_seed(seed: int, number: int, prompt: int, image: int = 0) -> int:
    """Seed of one image: a function only of the run's seed, the task's block, the prompt and the image."""
    return int(np.random.SeedSequence((seed, number, prompt, image)).generate_state(1)[0])


def scene_kind(benchmark: str, index: int) -> str | None:
    """The kind of a benchmark's scene: those that need binding, in turn; None in version 1, whose seeds draw one."""
    return BINDING_KINDS[index % len(BINDING_KINDS)] if benchmark.endswith("-bind") else None


def ask_known(
    pipe: PipelineLike, jobs: Sequence[T], text: Callable[[T], str], run: Callable[[list[T]], Sequence[R]]
) -> list[R | None]:
    """What `run` makes of the jobs whose text a model takes, and None for the refused ones, which it never sees."""
    known = [is_understood(pipe, text(job)) for job in jobs]
    asked = [job for job, is_known in zip(jobs, known, strict=True) if is_known]
    made = iter(run(asked) if asked else ())
    return [next(made) if is_known else None for is_known in known]


def is_understood(pipe: PipelineLike, text: str) -> bool:
    """Whether a model takes a text; one that is refused (unknown words) is not asked, and counts as wrong."""
    try:
        pipe.check_text(text, "text")
    except InputError:
        return False
    return True


def batches(items: Sequence[T], size: int, progress: Advance | None = None) -> Iterator[Sequence[T]]:
    """Split into batches of at most `size` items; `progress(done, total)` is called after each."""
    for start in range(0, len(items), size):
        chunk = items[start : start + size]
        yield chunk
        if progress is not None:
            progress(start + len(chunk), len(items))


def pixels(image: Image.Image) -> np.ndarray:
    """Convert an image of the pipe to the detector's input: uint8 [64, 64, 3].

    Raises:
        InputError: the image has another size than the world's 64 x 64.
    """
    if image.size != (SIDE, SIDE):
        raise InputError(f"the shapes benchmarks need a model of {SIDE} x {SIDE} images, got {image.size}")
    return np.asarray(image.convert("RGB"))
