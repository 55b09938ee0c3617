"""How images are sampled: what a caller asks for becomes rows of a batch, which advance step by step and are decoded.

    texts, images to edit    `_prompted`, `_instructed`    what images are sampled from: `SamplingInputs`
    inputs, seeds            `_prepare`                    noise, condition: rows that join an `ImageBatch`
    rows                     `step`                        latents, one step further
    clean latents            `finish`                      images, routing, metadata: a `GenerateOutput`

The images of a call, `generate` or `edit`, join at once and run to the end together. A server lets each join when it
comes, and takes it out when it is finished.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spar.common import limits
from spar.common.errors import InputError
from spar.common.generators import cpu_generator
from spar.common.limits import check_int_range, check_range
from spar.common.seeds import list_seeds
from spar.flow.sampler import FlowSampler
from spar.inference.flow_sampling import FlowSampling
from spar.inference.image_batch import BatchRow, ImageBatch, both_branches
from spar.inference.inputs import open_sources
from spar.inference.layouts import Layout, LayoutPipeline, LayoutWriter
from spar.inference.outputs import GenerateOutput
from spar.inference.progress import Callback, sampling_bar
from spar.models.spar import Condition
from spar.processing.images import ImageSource, to_pil, to_size, to_tensor
from spar.processing.prompts import TokenBatch, with_layout


@dataclass(frozen=True)
class SamplingInputs:
    """What images are sampled from.

    `texts` are called `what` in the metadata, which `notes` extend, and become prompts by `encode`. There may be
    `pixels` to edit, one for each text, and what is to `write` a layout of its own for each image.
    """

    what: str
    texts: list[str]
    encode: Callable[[Sequence[str | None]], TokenBatch]
    pixels: Tensor | None = None
    write: LayoutWriter | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


class StepwisePipeline(LayoutPipeline):
    """A pipeline whose images may join and leave between two steps of its sampler.

    Attributes:
        decode_tile: as in `SparPipeline.from_pretrained`, and so the next.
        offload: whether idle parts are in the CPU's memory.
    """

    decode_tile: int | None
    offload: bool

    @property
    def lets_join(self) -> bool:
        """Whether that is worth while with these settings."""
        return not self.offload  # each image that joins would have parts loaded and unloaded

    def open_batch(self, size: tuple[int, int], guided: bool) -> ImageBatch:
        """An empty batch for images of a height and width in pixels; `guided`: all at a scale other than 1."""
        return self._open_batch(size, guided, FlowSampling())

    @torch.inference_mode()
    def join(
        self, batch: ImageBatch, prompt: Sequence[str], *, image: Sequence[ImageSource] | None = None,
        negative_prompt: Sequence[str] | None = None, num_inference_steps: Sequence[int],
        guidance_scale: Sequence[float], seed: Sequence[int], layout: Layout = None,
    ) -> None:  # fmt: skip
        """Append an image of each prompt to a batch, as `generate` or, with images, `edit` begins it.

        Returns when they are prepared. After an error the batch is as it was. Arguments and errors as there;
        `num_inference_steps`, `guidance_scale` and `seed` have a number for each.
        """
        if image is None:
            inputs = self._prompted(prompt, layout, batch.size)
        else:
            inputs = self._instructed(self._edited(image), prompt, layout)
            if inputs.pixels is not None and inputs.pixels.shape[-2:] != batch.size:
                raise ValueError(f"expected images of {batch.size}, got {tuple(inputs.pixels.shape[-2:])}")
        for steps in num_inference_steps:
            check_int_range("num_inference_steps", steps, 1, limits.MAX_STEPS)
        for scale in guidance_scale:
            check_range("guidance_scale", scale, 0, limits.MAX_GUIDANCE)
            if (scale != 1) != batch.guided:
                raise ValueError(f"expected guidance {'other than' if batch.guided else 'of'} 1, got {scale}")
        negatives = self._negatives(negative_prompt, len(inputs.texts), batch.guided)
        seeds = list_seeds(seed, len(inputs.texts))
        with self._compute(len(seeds)):
            prepared = self._prepare(batch, inputs, negatives, [*map(float, guidance_scale)], seeds)
            self._wait()  # before they join: it may raise what went wrong on the device
            batch.join(*prepared, list(num_inference_steps))

    @torch.inference_mode()
    def step(self, batch: ImageBatch) -> Tensor:
        """Advance every image of a batch by one step; returns, when it is done, what `preview` makes images of."""
        with self._compute(len(batch)):
            self._load_to_device("denoiser")
            state = batch.step(self.model)
        self._wait()
        return state

    @torch.inference_mode()
    def finish(self, batch: ImageBatch, rows: Sequence[int]) -> GenerateOutput:
        """Decode images of a batch, which then leave it; after an error they are still there."""
        with self._compute(len(rows)):
            self._load_to_device("decoder")
            images = to_pil(self.model.decode(batch.sampler.latents(rows), self.decode_tile).float())
        made, run = [batch.rows[row] for row in rows], self.run_metadata()
        metadata = [
            {**one.metadata, "steps": batch.sampler.steps[row], "guidance": one.guidance, **batch.flow.metadata(),
             **run, **one.notes}
            for row, one in zip(rows, made, strict=True)
        ]  # fmt: skip
        routing = [one.routing(self.bundle.text_tokenizer, self.model.layers) for one in made]
        out = GenerateOutput(images, [one.seed for one in made], routing, metadata)
        batch.leave(rows)
        return out

    @torch.inference_mode()
    def _sample(
        self, inputs: SamplingInputs, size: tuple[int, int], negative_prompt: str | Sequence[str] | None,
        steps: int | None, guidance: float | None, per_prompt: int, seed: int | Sequence[int] | None,
        callback: Callback | None, flow: FlowSampling,
    ) -> GenerateOutput:
        """A batch that begins and ends together."""
        steps, guidance, per_prompt = self._numbers(steps, guidance, per_prompt, edit=inputs.pixels is not None)
        flow.check_guidance(guidance)
        negatives = self._negatives(negative_prompt, len(inputs.texts), guidance != 1)
        count = len(inputs.texts) * per_prompt
        check_range("images in all", count, 1, limits.MAX_IMAGES)
        batch = self._open_batch(size, guidance != 1, flow)
        with self._compute(count):
            prepared = self._prepare(batch, inputs, negatives, [guidance] * count, list_seeds(seed, count))
            batch.join(*prepared, steps)
            with sampling_bar(callback, steps, shown=self.progress) as watch:
                batch.run(self.model, watch)
            return self.finish(batch, range(count))

    def _prompted(self, prompt: str | Sequence[str], layout: Layout, size: tuple[int, int]) -> SamplingInputs:
        """What `generate` samples from."""
        prompts = self._texts(prompt, "prompt")
        taught = self.bundle.sampling.layout
        write = self._layout_writer(layout, len(prompts), size, taught=taught)
        notes = self._layout_turned_off(layout, taught=taught)
        encode = self.prompts.layout if write else self.prompts.generation
        return SamplingInputs("prompt", prompts, encode, None, write, notes)

    def _instructed(self, pixels: Tensor, instruction: str | Sequence[str], layout: Layout) -> SamplingInputs:
        """What `edit` samples from; `pixels` as of `_edited`."""
        pixels, instructions = self._paired(pixels, self._texts(instruction, "instruction"), "instruction")
        height, width = pixels.shape[-2:]
        taught = self.bundle.sampling.edit_layout
        write = self._layout_writer(layout, len(instructions), (height, width), taught=taught)
        notes = self._layout_turned_off(layout, taught=taught)
        encode = partial(self.prompts.edit, image_tokens=height * width // self.model.config.token_stride**2)
        return SamplingInputs("instruction", instructions, encode, pixels, write, notes)

    def _edited(self, image: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Images to edit in their own proportions, at about the trained number of pixels, `[B, 3, H, W]`."""
        images = open_sources(image, lambda one: to_size(one, *self.edited_size(one)[::-1]), edited=True)
        sizes = {(one.height, one.width) for one in images}
        if len(sizes) > 1:
            shown = ", ".join(f"{width} x {height}" for height, width in sorted(sizes))
            raise InputError(f"expected images of the same proportions in one call, got {shown} pixels")
        return to_tensor(images).to(self.device)

    def write_layouts(
        self, prompt: str | Sequence[str], *, image: ImageSource | Sequence[ImageSource] | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> list[str]:  # fmt: skip
        """With an `image` to edit, the layout that `edit` writes, "" where it goes without one; `prompt` is then the
        instruction. Else as `generate` does.
        """
        if image is None:
            return super().write_layouts(prompt, seed=seed)
        pixels, instructions = self._paired(self._edited(image), self._texts(prompt, "instruction"), "instruction")
        self.check_layout(True, (pixels.shape[-2], pixels.shape[-1]))
        check_range("instructions", len(instructions), 1, limits.MAX_IMAGES)
        with torch.inference_mode(), self._compute(len(instructions)):
            f_v = self._read_references(pixels, alone=True)
            self._load_to_device("streams", "language", "router_and_connector")
            return self._write_layouts(instructions, list_seeds(seed, len(instructions)), f_v)

    def _read_references(self, pixels: Tensor, *, alone: bool) -> Tensor:
        """`f_v` of images to edit; `alone`: as each has it in no batch, since a layout's words may depend on the last
        bit.
        """
        return torch.cat([self._read_images(one) for one in pixels.split(1 if alone else len(pixels))])

    def _numbers(
        self, steps: int | None, guidance: float | None, per_prompt: int, *, edit: bool
    ) -> tuple[int, float, int]:
        """Steps, guidance and images of a prompt, checked; numpy's numbers, which wrap, become plain ones."""
        steps = self.default_steps if steps is None else steps
        default = self.default_edit_guidance if edit else self.default_guidance
        guidance = default if guidance is None else guidance
        check_int_range("num_inference_steps", steps, 1, limits.MAX_STEPS)
        check_range("guidance_scale", guidance, 0, limits.MAX_GUIDANCE)
        check_int_range("num_images_per_prompt", per_prompt, 1, limits.MAX_IMAGES)
        return int(steps), float(guidance), int(per_prompt)

    def _open_batch(self, size: tuple[int, int], guided: bool, flow: FlowSampling) -> ImageBatch:
        defaults = self.bundle.sampling
        sampler = FlowSampler(shift=defaults.shift, method=flow.sampler or defaults.method)
        return ImageBatch(size, guided, flow, sampler)

    def _prepare(
        self, batch: ImageBatch, inputs: SamplingInputs, negatives: Sequence[str | None], guidance: Sequence[float],
        seeds: list[int],
    ) -> tuple[Tensor, Condition, list[BatchRow]]:  # fmt: skip
        """What joins a batch: an image for each seed, so many of each text adjacent; with layouts each has its own
        condition.
        """
        noise, count, texts = self._noise(seeds, batch.size), len(seeds), inputs.texts
        per_prompt = count // len(texts)
        f_v = None if inputs.pixels is None else self._read_references(inputs.pixels, alone=inputs.write is not None)
        references = f_v
        if inputs.write is not None:  # each image is a prompt of its own
            texts = [one for one in texts for _ in range(per_prompt)]
            negatives = [one for one in negatives for _ in range(per_prompt)]
            if references is None:
                self._load_to_device("encoder")
                f_v = self.model.canvas(count)
            else:
                f_v = references = references.repeat_interleave(per_prompt, dim=0)
            per_prompt = 1
        self._load_to_device("streams", "language", "router_and_connector")
        layouts, prompts = None, texts
        if inputs.write is not None:
            layouts = inputs.write(texts, seeds, references)
            prompts = layouts if references is None else list(map(with_layout, texts, layouts))
        tokens = inputs.encode(prompts)
        condition, routed = self._conditions(tokens, inputs.encode(negatives), f_v, batch.size, batch.guided)
        condition = condition.repeat(per_prompt)
        self._load_to_device("denoiser")
        condition = self.model.precompute_key_values(condition)
        rows = []
        for i, seed in enumerate(seeds):
            place, notes = i // per_prompt, dict(inputs.notes)
            layout = {} if layouts is None or not layouts[i] else {"layout": layouts[i]}
            if layouts is not None and not layout:  # the LLM wrote no sound one: so the image is made again
                notes["no_layout"] = True
            asked = {inputs.what: texts[place], "negative_prompt": negatives[place], "seed": seed, **layout}
            prompt = tokens.ids[place], tokens.mask[place], routed.weights[place]
            columns = condition.mask.shape[1]
            rows.append(BatchRow(seed, guidance[i], asked, notes, *prompt, columns=columns))
        return noise, condition, rows

    def _conditions(
        self, tokens: TokenBatch, negatives: TokenBatch, f_v: Tensor | None, size: tuple[int, int], guided: bool
    ) -> tuple[Condition, Condition]:
        """The condition of the sampler (both branches if guidance needs them), and that of the prompts alone."""
        tokens, negatives = tokens.to(self.device), negatives.to(self.device)
        own = self.model.condition(tokens.ids, tokens.mask, f_v, size)
        if not guided:
            return own, own
        return both_branches(own, self.model.condition(negatives.ids, negatives.mask, f_v, size)), own

    def _noise(self, seeds: list[int], size: tuple[int, int]) -> Tensor:
        """Sample each image's noise on the CPU, so that it is the same on every device."""
        stride = self.model.config.token_stride
        shape = (self.model.config.autoencoder.latent_channels, size[0] // stride, size[1] // stride)
        rows = [torch.randn(shape, generator=cpu_generator(seed), dtype=torch.float32) for seed in seeds]
        return torch.stack(rows).to(self.device)

    def _wait(self) -> None:
        """Wait until the device has done its work, so that who measures the time of a piece of it has all of that."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
