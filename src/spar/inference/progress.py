"""What may watch a sampler: a bar for people at a terminal or a notebook, and a recorder of its steps."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from spar.common.errors import InputError

# Called after each step with (steps done, steps, what `preview` makes images of); returning False, exactly, cancels.
Callback = Callable[[int, int, Tensor], bool | None]

MAX_FRAMES = 32


@contextmanager
def sampling_bar(callback: Callback | None, steps: int, *, shown: bool) -> Iterator[Callback | None]:
    """A callback that moves a bar, where one is `shown` and the caller watches with none of its own.

    The bar is for notebooks and terminals (nothing goes to a file) and vanishes at the end.

    Raises:
        InputError: a callback that cannot be called.
    """
    if callback is not None and not callable(callback):
        raise InputError(f"callback: expected a function of (steps done, steps, state), got {callback!r}")
    if not shown or callback is not None:
        yield callback
        return
    off = False if "ipykernel" in sys.modules else None  # None: where there is no terminal
    with tqdm(total=steps, desc="sampling", leave=False, disable=off) as bar:

        def move(done: int, _total: int, _state: Tensor) -> None:
            bar.update(done - bar.n)

        yield move


class StepRecorder:
    """A callback that keeps images of the sampler's steps, the last one and up to MAX_FRAMES of them evenly.

    Args:
        preview: the pipeline's own, which makes images of what the callback is given.
        then: called after it, with the same; its result is the recorder's.

    Attributes:
        frames: of each step kept its images.
    """

    def __init__(self, preview: Callable[[Tensor], list[Image.Image]], then: Callback | None = None) -> None:
        self.preview, self.then = preview, then
        self.frames: list[list[Image.Image]] = []

    def __call__(self, done: int, total: int, state: Tensor) -> bool | None:
        frames = min(MAX_FRAMES, total)
        if done * frames // total > (done - 1) * frames // total:
            self.frames.append(self.preview(state))
        return self.then(done, total, state) if self.then else None

    def of_image(self, number: int) -> list[Image.Image]:
        """The frames of one image of the batch."""
        return [images[number] for images in self.frames]
