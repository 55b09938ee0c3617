"""How a benchmark is run: its options, and the seeds of its scenes and of the images it asks for.

Which prompts a benchmark asks is fixed for good (a function of the task and the position in it), so that results stay
comparable; the option `seed` moves only what the model draws and what the bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from spar.common.errors import InputError
from spar.worlds.shapes.scene import SEED_RANGES, SIDE

T = TypeVar("T")
Progress = Callable[[int, int], None]

BENCHMARK_NAMES = ("shapes-gen", "shapes-edit", "shapes-vqa", "shapes-recon")
BEFORE_SWAP = "original encoder"  # the label of an understanding result with the encoder as it was before the swap
_BLOCK = 10**6  # seeds a task may use; the benchmark range holds a thousand such blocks


class PipelineLike(Protocol):
    """What the benchmarks ask of a model: `SparPipeline` has it, and so may anything else."""

    def generate(self, prompt: Sequence[str], *, seed: Sequence[int], **keywords: Any) -> Any: ...

    def edit(
        self, image: Sequence[Image.Image], instruction: Sequence[str], *, seed: Sequence[int], **keywords: Any
    ) -> Any: ...

    def understand(self, image: Sequence[Image.Image], question: Sequence[str]) -> Any: ...

    def reconstruct(self, image: Sequence[Image.Image]) -> Any: ...


@dataclass(frozen=True)
class EvalOptions:
    """Options of a benchmark.

    `limit`: prompts a task (questions a kind, scenes), None for the benchmark's full number; a smaller one takes the
    first of the same prompts. `num_inference_steps`, `guidance_scale`: the model's own when None. `images_per_prompt`
    is Shapes-Gen's. `batch`: outputs asked for at once; it changes the time, never the scores. `combinations`: "seen"
    or "held_out". `label` is noted in the result, to tell two models apart.
    """

    limit: int | None = None
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    images_per_prompt: int = 4
    batch: int = 64
    combinations: str = "seen"
    label: str = ""

    def __post_init__(self) -> None:
        for name in ("limit", "images_per_prompt", "batch"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{name}: expected a whole number from 1, got {value!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise InputError(f"seed: expected a whole number from 0, got {self.seed!r}")
        if self.combinations not in ("seen", "held_out"):
            raise InputError(f"combinations: expected 'seen' or 'held_out', got {self.combinations!r}")

    def sampling(self) -> dict[str, Any]:
        """The keywords that the pipe's sampling tasks are called with."""
        given = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {name: value for name, value in given.items() if value is not None}


def seed_block(benchmark: str, part: int, combinations: str = "seen") -> int:
    """The number of a task's own block of seeds: no two tasks, and no two sets of combinations, share a scene."""
    return 100 * BENCHMARK_NAMES.index(benchmark) + 50 * (combinations == "held_out") + part


def scene_seed(number: int, index: int) -> int:
    """The seed of scene `index` of a block, within the benchmark's range of seeds."""
    if not 0 <= index < _BLOCK:
        raise ValueError(f"index must be in [0, {_BLOCK}), got {index}")
    return SEED_RANGES["benchmark"][0] + number * _BLOCK + index


def image_seed(seed: int, number: int, prompt: int, image: int = 0) -> int:
    """The seed of one image: a function of the run's seed, the task's block, the prompt and the image alone."""
    return int(np.random.SeedSequence((seed, number, prompt, image)).generate_state(1)[0])


def batches(items: Sequence[T], size: int, progress: Progress | None = None) -> Iterator[Sequence[T]]:
    """Runs of at most `size` items; `progress(done, total)` is called behind each."""
    for start in range(0, len(items), size):
        chunk = items[start : start + size]
        yield chunk
        if progress is not None:
            progress(start + len(chunk), len(items))


def pixels(image: Image.Image) -> np.ndarray:
    """An image of the pipe as the detector reads it: uint8 [64, 64, 3].

    Raises:
        InputError: an image of another size: the world and its detector are 64 x 64.
    """
    if image.size != (SIDE, SIDE):
        raise InputError(f"the shapes benchmarks need a model of {SIDE} x {SIDE} images, got {image.size}")
    return np.asarray(image.convert("RGB"))
