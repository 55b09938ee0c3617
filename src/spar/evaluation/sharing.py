"""A model's outputs shared out over processes: each computes a part of every call, and gets the outputs of all.

Images and answers depend on their own inputs and seeds alone, so that they are those of one process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from spar.common.process_group import ProcessGroup
from spar.processing.images import ImageSource

# Benchmarks whose calls depend on the one before (a conversation), hand on more than images and words (codes), or may
# fail on one process alone.
ALONE = ("shapes-chat", "shapes-codes", "shapes-agreement", "shapes-robust")


@dataclass(frozen=True)
class SharedOutput:
    """What a call gave, in the order of its inputs: `images`, or `texts`."""

    images: Sequence[Image.Image] = ()
    texts: Sequence[str] = ()


class SharedPipeline:
    """A pipeline whose calls with several inputs are shared out over a group of processes.

    All processes make the same calls. What is not below is the pipeline's own.
    """

    def __init__(self, pipe: Any, group: ProcessGroup) -> None:
        self.pipe, self.group = pipe, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    @property
    def processes(self) -> int:
        return self.group.world

    def _shared(self, compute: Callable[..., Sequence[Any]], *columns: Sequence[Any]) -> list[Any]:
        """The outputs for rows of inputs, each computed by one process."""
        rows = self.group.share(list(zip(*columns, strict=True)))
        own = compute(*map(list, zip(*rows, strict=True))) if rows else ()
        return self.group.gather_shares(own)

    def generate(
        self, prompt: Sequence[str], *, seed: Sequence[int], num_images_per_prompt: int = 1, **settings: Any
    ) -> SharedOutput:
        """As the pipeline's, of one prompt and one seed for each image."""
        prompts = [text for text in prompt for _ in range(num_images_per_prompt)]
        draw = self.pipe.generate
        images = self._shared(lambda texts, seeds: draw(texts, seed=seeds, **settings).images, prompts, seed)
        return SharedOutput(images=images)

    def edit(
        self, image: Sequence[ImageSource], instruction: Sequence[str], *, seed: Sequence[int], **settings: Any
    ) -> SharedOutput:
        """As the pipeline's, of one image, instruction and seed for each result."""
        edit = self.pipe.edit
        return SharedOutput(
            images=self._shared(
                lambda images, texts, seeds: edit(images, texts, seed=seeds, **settings).images,
                image, instruction, seed,
            )
        )  # fmt: skip

    def understand(self, image: Sequence[ImageSource], question: Sequence[str], **settings: Any) -> SharedOutput:
        """As the pipeline's, of one image for each question."""
        ask = self.pipe.understand
        texts = self._shared(lambda images, questions: ask(images, questions, **settings).texts, image, question)
        return SharedOutput(texts=texts)

    def reconstruct(self, image: Sequence[ImageSource]) -> SharedOutput:
        """As the pipeline's."""
        return SharedOutput(images=self._shared(lambda images: self.pipe.reconstruct(images).images, image))

    def classify(self, image: Sequence[ImageSource], labels: Sequence[str], **settings: Any) -> list[Any]:
        """As the pipeline's."""
        return self._shared(lambda images: self.pipe.classify(images, labels, **settings), image)
