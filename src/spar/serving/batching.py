"""The four tasks as jobs of the worker: which rows share a call or a running batch, and these. The page's drawings are
rows too.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from spar.inference.base import Pipeline
from spar.inference.image_sampling import StepwisePipeline
from spar.inference.layouts import LayoutPipeline
from spar.inference.outputs import GenerateOutput
from spar.serving.jobs import ImageJob, JoiningJob, Step
from spar.serving.schema import SamplingRequest


@dataclass(frozen=True)
class ImageRow:
    """One image to generate, or to edit if there is an `image`. Rows of one call share size, steps and guidance, and
    the `layout` but for its words; rows of a running batch share the size, and all have guidance or none.

    `show` gets `partial` previews on the way; `shown` has the steps of those that it got.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    image: Image.Image | None
    size: tuple[int, int]
    steps: int
    guidance: float
    partial: int = 0
    show: Callable[[Image.Image], None] | None = None
    layout: str | bool | None = None
    shown: set[int] = field(default_factory=set, compare=False)

    def is_shown(self, done: int) -> bool:
        """Whether something of the row is shown after a step."""
        return done in self.shown_steps()

    def shown_steps(self) -> set[int]:
        """The steps after which a preview is shown: `partial` of them, evenly spread before the last."""
        if self.show is None:
            return set()
        count = min(self.partial, self.steps - 1)
        return {round(self.steps * number / (count + 1)) for number in range(1, count + 1)}

    def show_once(self, done: int, preview: Image.Image) -> None:
        """Show the preview of a step, unless an earlier run of the row, which failed later, has shown it."""
        if self.show is not None and done not in self.shown:
            self.shown.add(done)
            self.show(preview)


@dataclass(frozen=True, kw_only=True)
class WatchedRow(ImageRow):
    """An image whose every step `watch` gets, as the callback of a pipeline; its result is an output of its own."""

    watch: Step

    def is_shown(self, done: int) -> bool:
        return True


@dataclass(frozen=True)
class GeneratedImage:
    """An image, the metadata of its PNG, and its seed if it has one."""

    image: Image.Image
    metadata: dict[str, Any]
    seed: int | None = None

    def fields(self) -> dict[str, Any]:
        """What an answer says of the image beside its pixels; `revised_prompt` is OpenAI's name."""
        own = {"seed": self.seed, "revised_prompt": self.metadata.get("layout")}
        return {name: value for name, value in own.items() if value is not None}


def sample_images(pipe: Pipeline, rows: list[ImageRow], callback: Step) -> list[Any]:
    """Generate or edit images; all rows have an image and a negative prompt, or none does."""
    first, prompts = rows[0], [row.prompt for row in rows]
    shared: dict[str, Any] = {
        "negative_prompt": _negatives(rows),
        "num_inference_steps": first.steps, "guidance_scale": first.guidance, "seed": [row.seed for row in rows],
        "callback": _with_previews(pipe, rows, callback),
    }  # fmt: skip
    images = [row.image for row in rows if row.image is not None]  # of all rows, or of none
    if first.layout is not None:
        shared["layout"] = _layout(rows)
    if images:
        out = pipe.edit(images, prompts, **shared)
    else:
        out = pipe.generate(prompts, height=first.size[0], width=first.size[1], **shared)
    return _results(rows, out)


def _results(rows: Sequence[ImageRow], out: GenerateOutput) -> list[Any]:
    """What each row of an output results in."""
    made = [*map(GeneratedImage, out.images, out.metadata, out.seeds)]
    return [
        GenerateOutput([one.image], out.seeds[i : i + 1], out.routing[i : i + 1], [one.metadata])
        if isinstance(row, WatchedRow) else one
        for i, (row, one) in enumerate(zip(rows, made, strict=True))
    ]  # fmt: skip


def _with_previews(pipe: Pipeline, rows: list[ImageRow], callback: Step) -> Step:
    """The callback of a call, with the previews that its rows show."""

    def step(done: int, total: int, state: Any) -> bool:
        goes_on = callback(done, total, state)
        wanted = [number for number, row in enumerate(rows) if row.is_shown(done)]
        if goes_on and wanted:
            _show(pipe, [rows[number] for number in wanted], [done] * len(wanted), state[wanted])
        return goes_on

    return step if any(isinstance(row, WatchedRow) or row.shown_steps() for row in rows) else callback


def _show(pipe: Pipeline, rows: Sequence[ImageRow], done: Sequence[int], state: Any) -> None:
    """Show what each row has after so many steps."""
    plain = [number for number, row in enumerate(rows) if not isinstance(row, WatchedRow)]
    for number, image in zip(plain, pipe.preview(state[plain]) if plain else [], strict=True):
        rows[number].show_once(done[number], image)
    for number, row in enumerate(rows):
        if isinstance(row, WatchedRow):
            row.watch(done[number], row.steps, state[[number]])


class RunningRows:
    """Rows of one size in the sampler of a pipeline, `guided` or not: `SteppedBatch` as the worker drives it."""

    def __init__(self, pipe: StepwisePipeline, size: tuple[int, int], guided: bool) -> None:
        self.pipe, self.batch = pipe, pipe.open_batch(size, guided)
        self.rows: list[ImageRow] = []
        self._state: Any = None  # what previews are made of, a row for each, after a step

    def join(self, rows: list[ImageRow]) -> None:
        """Append rows; of images and negative prompts all have one, or none does, and the layouts are of one kind."""
        images = [row.image for row in rows if row.image is not None]
        self.pipe.join(
            self.batch, [row.prompt for row in rows], image=images or None, negative_prompt=_negatives(rows),
            num_inference_steps=[row.steps for row in rows], guidance_scale=[row.guidance for row in rows],
            seed=[row.seed for row in rows], layout=_layout(rows),
        )  # fmt: skip
        self.rows, self._state = [*self.rows, *rows], None

    def step(self) -> None:
        self._state = self.pipe.step(self.batch)

    def left(self) -> list[int]:
        sampler = self.batch.sampler
        return [steps - done for done, steps in zip(sampler.done, sampler.steps, strict=True)]

    def previews(self) -> list[int]:
        done = self.batch.sampler.done
        return [number for number, row in enumerate(self.rows) if row.is_shown(done[number])]

    def show(self, rows: list[int]) -> None:
        done = self.batch.sampler.done
        _show(self.pipe, [self.rows[row] for row in rows], [done[row] for row in rows], self._state[rows])

    def finished(self) -> list[int]:
        return self.batch.finished

    def finish(self, rows: list[int]) -> list[Any]:
        left = self._without(rows)
        results = _results([self.rows[row] for row in rows], self.pipe.finish(self.batch, rows))
        self.rows, self._state = left
        return results

    def leave(self, rows: list[int]) -> None:
        left = self._without(rows)
        self.batch.leave(rows)
        self.rows, self._state = left

    def _without(self, rows: list[int]) -> tuple[list[ImageRow], Any]:
        """What is left once these rows have gone: taken before they go, since it may find no memory."""
        kept = [number for number in range(len(self.rows)) if number not in rows]
        return [self.rows[number] for number in kept], None if self._state is None else self._state[kept]


def _negatives(rows: list[ImageRow]) -> list[str] | None:
    """The negative prompts, of all rows or of none."""
    return [row.negative_prompt for row in rows if row.negative_prompt is not None] or None


def _layout(rows: list[ImageRow]) -> list[str] | bool | None:
    """The layouts of rows, if they have words; else what all of them ask for."""
    first = rows[0].layout
    return [row.layout for row in rows if isinstance(row.layout, str)] if isinstance(first, str) else first


def reconstruct(pipe: Pipeline, images: list[Image.Image], _: Step) -> list[GeneratedImage]:
    """Encode and decode images."""
    out = pipe.reconstruct(images)
    return list(map(GeneratedImage, out.images, out.metadata))


def sampling_jobs(
    pipe: Pipeline, request: SamplingRequest, size: tuple[int, int], image: Image.Image | None = None,
    model: str | None = None, show: Callable[[Image.Image], None] | None = None,
) -> list[ImageJob]:  # fmt: skip
    """Build a job for each of a request's images; without a seed, they get a random one. `model` as in `ImageJob`,
    `show` as in `ImageRow`.

    Raises:
        InputError: the model cannot encode the prompt.
    """
    prompt, negative = request.prompt, request.negative_prompt
    negative = negative if negative and negative.strip() else None  # an empty one asks for nothing
    pipe.check_text(prompt, "prompt")
    if negative is not None:
        pipe.check_text(negative, "negative_prompt")
    layout = request.layout
    if layout is not None:
        pipe.check_settings({"layout": layout})
    if isinstance(pipe, LayoutPipeline):
        pipe.check_layout(layout, size)
    steps, guidance = request.num_inference_steps, request.guidance_scale
    steps = pipe.default_steps if steps is None else steps
    default = pipe.default_guidance if image is None else pipe.default_edit_guidance
    guidance = default if guidance is None else guidance
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    partial = request.partial_images or 0
    rows = [
        ImageRow(prompt, negative, seed + i, image, size, steps, guidance, partial, show, layout)
        for i in range(request.n or 1)
    ]
    return [_row_job(pipe, row, model) for row in rows]


@dataclass(frozen=True)
class Drawing:
    """A call of a pipeline's `generate` or `edit` that makes one image and whose every step `watch` gets. Where the
    pipeline's images may join a running batch, the image, which is the same, does.

    `arguments` are the image to edit, if it is an edit, and the text; `keywords` those of the page.
    """

    task: Literal["generate", "edit"]
    arguments: Sequence[Any]
    keywords: Mapping[str, Any]
    watch: Step

    def __call__(self, pipe: Pipeline) -> GenerateOutput:
        return getattr(pipe, self.task)(*self.arguments, callback=self.watch, **self.keywords)

    def job(self, pipe: Pipeline, model: str | None) -> ImageJob | None:
        """Its job, `model` as in `ImageJob`; None where images of the pipeline do not join.

        Raises:
            InputError: proportions of the image to edit that are too extreme.
        """
        if not _joins(pipe):
            return None
        *images, prompt = self.arguments
        size = pipe.edited_size(images[0]) if images else pipe.output_size()
        seed, asked = self.keywords["seed"], self.keywords
        row = WatchedRow(
            prompt, asked["negative_prompt"], secrets.randbelow(2**32) if seed is None else seed,
            images[0] if images else None, size, asked["num_inference_steps"], asked["guidance_scale"],
            watch=self.watch,
        )  # fmt: skip
        return _row_job(pipe, row, model)


def _row_job(pipe: Pipeline, row: ImageRow, model: str | None) -> ImageJob:
    """The job of a row, which joins a running batch where it may."""
    size, guided, layout = row.size, row.guidance != 1, row.layout
    kind = str if isinstance(layout, str) else layout
    key = (size, guided, row.negative_prompt is None, row.image is None, kind)
    weight = max(1.0, size[0] * size[1] / pipe.image_size**2)
    if _joins(pipe):
        return JoiningJob(
            sample_images, key, row, weight, model, open=lambda own: RunningRows(own, size, guided),
            batch_key=(size, guided), steps=row.steps,
        )  # fmt: skip
    return ImageJob(sample_images, (*key, row.guidance, row.steps), row, weight, model)


def _joins(pipe: Pipeline) -> bool:
    """Whether images of a pipeline may join a running batch."""
    return isinstance(pipe, StepwisePipeline) and pipe.lets_join
