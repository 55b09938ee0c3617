"""A call with diffusers' arguments, answered by a pipeline's own tasks."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from spar.common.errors import Cancelled, InputError
from spar.common.limits import MAX_SEED
from spar.inference.base import Pipeline
from spar.processing.images import ImageSource

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def draw(
    face: Any, pipe: Pipeline, prompt: str | Sequence[str], image: ImageSource | Sequence[ImageSource] | None = None, *,
    height: int | None = None, width: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None, output_type: str = "pil",
    return_dict: bool = True, callback_on_step_end: Callable[..., Any] | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",), layout: Any = None, **settings: Any,
) -> Any:  # fmt: skip
    """Generate with `pipe`, or edit `image`; `face` is what was called, which the callback gets.

    The arguments and errors are those of `SparDiffusionPipeline.__call__`, and `settings` those of both tasks.
    """
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput  # at its first use: a second of imports

    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    if unknown := [name for name in callback_on_step_end_tensor_inputs or () if name != "latents"]:
        raise InputError(f"callback_on_step_end_tensor_inputs: expected latents, got {', '.join(unknown)}")
    if callback_on_step_end is not None and not callable(callback_on_step_end):
        raise InputError(f"callback_on_step_end: expected a function, got {callback_on_step_end!r}")
    if settings.keys() & {"callback", "seed"}:
        given = ", ".join(sorted(settings.keys() & {"callback", "seed"}))
        raise InputError(f"expected generator and callback_on_step_end, diffusers' names, got {given}")
    face._interrupt, last = False, list[torch.Tensor]()

    def watch(done: int, _steps: int, estimate: torch.Tensor) -> bool:
        last[:] = [estimate]
        if callback_on_step_end is not None:
            callback_on_step_end(face, done - 1, done - 1, {"latents": estimate})
        return not face._interrupt

    settings["seed"] = seeds_of(generator)
    if _is_empty(settings.get("negative_prompt")):
        settings["negative_prompt"] = None
    if callback_on_step_end is not None or output_type == "latent":
        settings["callback"] = watch
    images: Any
    try:
        own = {} if layout is None else {"layout": layout}
        if image is None:
            images = pipe.generate(prompt, height=height, width=width, **own, **settings).images
        else:
            images = pipe.edit(image, prompt, **own, **settings).images
    except Cancelled:  # the callback has set `_interrupt`: the estimate of the last step is the result
        images = pipe.preview(last[0])
    if output_type == "latent":
        images = last[0]
    elif output_type != "pil":
        images = np.stack([np.asarray(one, np.float32) / 255 for one in images])
        images = images if output_type == "np" else torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return ImagePipelineOutput(images=images) if return_dict else (images,)


def _is_empty(negative_prompt: Any) -> bool:
    """Whether a negative prompt asks for nothing: "", or a list of nothing else."""
    texts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
    if not isinstance(texts, list | tuple) or not texts:
        return False
    return all(isinstance(text, str) and not text.strip() for text in texts)


def seeds_of(generator: torch.Generator | Sequence[torch.Generator] | None) -> int | list[int] | None:
    """The seed of a fresh generator, and a new one of each that was used before; they count as used afterwards.

    Raises:
        InputError: no generators.
    """
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        return _seed_of(generator)
    if not isinstance(generator, list | tuple) or not all(isinstance(one, torch.Generator) for one in generator):
        raise InputError(f"generator: expected a torch.Generator, or one for each image, got {generator!r}")
    return [_seed_of(one) for one in generator]


def _seed_of(generator: torch.Generator) -> int:
    """The generator's own seed while nothing has been drawn from it; it draws a number."""
    seed, device = generator.initial_seed(), generator.device
    fresh = 0 <= seed <= MAX_SEED and torch.equal(
        generator.get_state(), torch.Generator(device).manual_seed(seed).get_state()
    )
    drawn = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    return seed if fresh else drawn
