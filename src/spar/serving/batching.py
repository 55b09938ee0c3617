"""The four tasks as jobs of the worker: which rows share a call, and that call."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from spar.inference.pipeline import SparPipeline
from spar.serving.schema import SamplingRequest
from spar.serving.worker import ImageJob, Step


@dataclass(frozen=True)
class BatchKey:
    """Settings that all rows of one call share."""

    size: tuple[int, int]
    steps: int
    guidance: float
    has_negatives: bool


@dataclass(frozen=True)
class ImageRow:
    """One image to generate: its prompt, its seed, and the image to edit."""

    prompt: str
    negative_prompt: str | None
    seed: int
    batch_key: BatchKey
    image: Image.Image | None = None


@dataclass(frozen=True)
class GeneratedImage:
    """An image, the metadata of its PNG, and its seed if it has one."""

    image: Image.Image
    metadata: dict[str, Any]
    seed: int | None = None


def sample_images(pipe: SparPipeline, rows: list[ImageRow], callback: Step) -> list[GeneratedImage]:
    """Generate or edit images; all rows have the same BatchKey."""
    key = rows[0].batch_key
    prompts, seeds = [row.prompt for row in rows], [row.seed for row in rows]
    negatives = [row.negative_prompt or "" for row in rows] if key.has_negatives else None
    images = [row.image for row in rows if row.image is not None]  # of all rows, or of none
    if not images:
        out = pipe.generate(
            prompts, negative_prompt=negatives, height=key.size[0], width=key.size[1], num_inference_steps=key.steps,
            guidance_scale=key.guidance, seed=seeds, callback=callback,
        )  # fmt: skip
    else:
        out = pipe.edit(
            images, prompts, negative_prompt=negatives, num_inference_steps=key.steps, guidance_scale=key.guidance,
            seed=seeds, callback=callback,
        )  # fmt: skip
    return list(map(GeneratedImage, out.images, out.metadata, out.seeds))


def reconstruct(pipe: SparPipeline, images: list[Image.Image], _: Step) -> list[GeneratedImage]:
    """Encode and decode images."""
    out = pipe.reconstruct(images)
    return list(map(GeneratedImage, out.images, out.metadata))


def sampling_jobs(
    pipe: SparPipeline, request: SamplingRequest, seed: int, size: tuple[int, int], image: Image.Image | None = None
) -> list[ImageJob]:
    """Build a job for each of a request's images.

    Raises:
        InputError: the model cannot encode the prompt.
    """
    pipe.check_text(request.prompt, "prompt")
    if request.negative_prompt is not None:
        pipe.check_text(request.negative_prompt, "negative_prompt")
    defaults, steps, guidance = pipe.bundle.sampling, request.num_inference_steps, request.guidance_scale
    key = BatchKey(
        size, defaults.steps if steps is None else steps, defaults.guidance if guidance is None else float(guidance),
        request.negative_prompt is not None,
    )  # fmt: skip
    weight = max(1.0, size[0] * size[1] / pipe.image_size**2)
    rows = [ImageRow(request.prompt, request.negative_prompt, seed + i, key, image) for i in range(request.n or 1)]
    return [ImageJob(sample_images, (key, image is None), row, weight) for row in rows]


def reconstruction_job(image: Image.Image) -> ImageJob:
    """A job that reconstructs one image."""
    return ImageJob(reconstruct, None, image)


def begin_chat(pipe: SparPipeline, messages: list[dict[str, Any]], max_new_tokens: int | None) -> Iterator[str]:
    """Iterator over the pieces of an answer, with `prompt_tokens`, `completion_tokens` and `finish_reason`."""
    return pipe.chat(messages, max_new_tokens=max_new_tokens)
