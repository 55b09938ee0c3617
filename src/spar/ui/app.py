"""The web page: four tabs for the four tasks, with previews and the LLM layers that each token reads."""

import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup
from PIL import Image

from spar.common.errors import Cancelled, InputError
from spar.common.limits import MAX_SEED
from spar.inference.base import Pipeline
from spar.inference.image_files import save_images, source_metadata
from spar.inference.notes import knows_shapes, world_notes
from spar.inference.outputs import GenerateOutput, ReconstructOutput
from spar.processing.images import open_image, to_size, to_square
from spar.reporting.routing import routing_view
from spar.serving.errors import ApiError
from spar.serving.gate import Lease, MemoryBudget
from spar.serving.image_body import reserve_images
from spar.serving.image_io import decode_image
from spar.serving.jobs import forget_frames
from spar.serving.worker import Call, Unavailable
from spar.ui import components, examples
from spar.ui.preview_stream import PreviewStep, PreviewStream, Task

MAX_STEPS, MAX_GUIDANCE = 100, 15  # of the sliders; the pipeline's own limits are wider
MAX_WAITING = 8  # accepted requests; each occupies a thread until it is finished
KEPT_SECONDS = 3600  # of an image in the cache

log = logging.getLogger(__name__)


def build_page(
    pipe: Pipeline, call: Call | None = None, others: Mapping[str, Pipeline] | None = None,
    budget: MemoryBudget | None = None,
) -> gr.Blocks:  # fmt: skip
    """Build the page of a model, which needs `components.CSS`.

    Args:
        pipe: runs one job at a time.
        call: as in `PreviewStream`; with `others` it takes the name of one of them too.
        others: further models by name, among which the page lets the visitor choose.
        budget: of the memory of visitors' images; by default one of the page's own.
    """
    cleaning, budget = (KEPT_SECONDS // 4, KEPT_SECONDS), budget or MemoryBudget()
    with gr.Blocks(title="SPAR", analytics_enabled=False, delete_cache=cleaning) as blocks:
        if not others:
            Page(blocks, pipe, call, budget)
        else:
            _build_choice(blocks, pipe, call, others, budget)
    blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=MAX_WAITING, api_open=False)
    return blocks


def _build_choice(
    blocks: gr.Blocks, pipe: Pipeline, call: Callable[..., Any] | None, others: Mapping[str, Pipeline],
    budget: MemoryBudget,
) -> None:  # fmt: skip
    """A choice of models, and below it the tabs of the chosen one."""
    first = pipe.origin.get("model") or pipe.system
    models = {first: pipe, **others}
    systems = [one.system for one in models.values()]
    titles = systems if len(set(systems)) == len(systems) else [*models]
    choice = gr.Radio([*zip(titles, models, strict=True)], value=first, label="Model", elem_classes="spar-model")
    columns = []
    for name, one in models.items():
        with gr.Column(visible=one is pipe) as column:
            Page(blocks, one, call if one is pipe or call is None else partial(call, model=name), budget)
        columns.append(column)

    def show(chosen: str) -> list[Any]:
        return [gr.update(visible=name == chosen) for name in models]

    choice.change(show, choice, columns, **components.HIDDEN)


class Page:
    """The tabs, and the methods of their buttons, which return new values of the output components."""

    def __init__(self, blocks: gr.Blocks, pipe: Pipeline, call: Call | None, budget: MemoryBudget) -> None:
        """Add the tabs of a model to open blocks."""
        self.blocks, self.pipe, self.stream, self.budget = blocks, pipe, PreviewStream(pipe, call), budget
        self.shapes = knows_shapes(pipe)
        self.scenes = self._scene_files()
        edits = "edit" in pipe.tasks
        gr.HTML(components.head(pipe.system, pipe.image_size, shapes=self.shapes, edits=edits))
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Generate", id="generate"):
                prompts = examples.PROMPTS_OF.get(pipe.origin.get("model") or "", examples.PROMPTS)
                self._sampling_tab("generate", "What to draw", "Draw", [[text] for text in prompts])
            if edits:
                with gr.Tab("Edit", id="edit"):
                    self._sampling_tab("edit", "What to change", "Change it", self._scene_rows(examples.EDITS))
            with gr.Tab("Understand", id="understand"):
                self._understand_tab(self._scene_rows(examples.QUESTIONS))
            with gr.Tab("Reconstruct", id="reconstruct"):
                self._reconstruct_tab()
        blocks.unload(self.leave)

    # ---- tabs

    def _sampling_tab(self, task: Task, label: str, title: str, rows: list[list[str]]) -> None:
        """A tab with sampling settings and a routing view. `rows` are its examples: a text, after the image to edit."""
        with gr.Row():
            with gr.Column(min_width=320):
                source = [self._source()] if task == "edit" else []
                text = self._text_box(label, rows)
                with gr.Row():
                    run, stop = components.button(title), gr.Button("Stop", scale=1, min_width=90)
                seed, settings = self._settings(task)
            with gr.Column(min_width=320):
                result = (components.slider if task == "edit" else components.image)(self.pipe.image_size)
                status, file = components.download_button()
        self._examples([*source, text], rows, seed)
        view = components.routing_panel(visible=self.pipe.has_routing)

        def sample(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
            yield from self.sample(task, request.session_hash, *values)

        def stop_sampling(request: gr.Request) -> None:
            self.stream.stop(request.session_hash, task)

        self._on(run, text, sample, [text, seed, *settings, *source], [result, status, file, view])
        stop.click(stop_sampling, **components.HIDDEN)

    def _understand_tab(self, rows: list[list[str]]) -> None:
        with gr.Row():
            with gr.Column(min_width=320):
                source, question = self._source(), self._text_box("Your question", rows)
                run = components.button("Ask")
            with gr.Column(min_width=320):
                answer = gr.Textbox(label="Answer", lines=2, interactive=False, elem_classes="spar-answer")
                status = components.status()
        self._examples([source, question], rows)
        self._on(run, question, self.understand, [source, question], [answer, status])

    def _reconstruct_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=320):
                source = self._source()
                run = components.button("Rebuild")
            with gr.Column(min_width=320):
                slider = components.slider(self.pipe.image_size)
                status, file = components.download_button()
        self._examples([source], [[scene] for scene in self.scenes])
        self._on(run, None, self.reconstruct, [source], [slider, status, file])

    def _text_box(self, label: str, rows: list[list[str]]) -> gr.Textbox:
        """A box with the first example that grows with its text, of one line at first: Enter submits only then."""
        return gr.Textbox(label=label, lines=1, max_lines=4, value=rows[0][-1] if self.shapes else "")

    def _source(self) -> gr.Image:
        return components.source(self.pipe.image_size, self.scenes[0] if self.shapes else None)

    def _settings(self, task: Task) -> tuple[gr.Textbox, list[gr.components.Component]]:
        """The seed, and the rarer settings: steps, guidance, negative prompt."""
        (fewest, most), steps = self.pipe.steps_range, self.pipe.default_steps
        guidance = self.pipe.default_edit_guidance if task == "edit" else self.pipe.default_guidance
        with gr.Row(elem_classes="spar-seed"):
            seed = components.seed(str(examples.SEED))
            new = gr.Button("New seed", size="md", scale=1, min_width=110)
            new.click(lambda: str(secrets.randbelow(2**32)), None, seed, **components.HIDDEN)
        with gr.Accordion("More settings", open=False):
            steps_slider = gr.State(steps) if fewest == most else gr.Slider(
                fewest, min(most, max(MAX_STEPS, steps)), steps, step=1, precision=0, label="Steps",
                info="More steps take longer and give finer images.",
            )  # fmt: skip
            guidance_slider = gr.Slider(
                1, max(MAX_GUIDANCE, guidance), guidance, step=0.1, label="Guidance",
                info="How strictly the image follows the prompt; 1 switches it off.",
            )  # fmt: skip
            negative = gr.Textbox(label="Steer away from", info="What the image should not show; may be empty.")
        return seed, [steps_slider, guidance_slider, negative]

    def _examples(self, shown: list[Any], rows: list[list[str]], seed: gr.Textbox | None = None) -> None:
        """Examples that a click puts into `shown` (image, text or both), with their seed; none for another world."""
        if not self.shapes:
            return
        dataset = gr.Dataset(
            label="Try one of these", components=shown, samples=rows, type="index", elem_classes="spar-examples"
        )
        targets, constants = (shown, []) if seed is None else ([*shown, seed], [str(examples.SEED)])

        def choose(index: int) -> Any:
            values = [*rows[index], *constants]
            return values if len(values) > 1 else values[0]

        dataset.click(choose, dataset, targets, **components.HIDDEN)

    def _scene_files(self) -> list[str]:
        """Write the scenes of the examples to the cache, and return their paths."""
        images = examples.scene_images()
        files = [Path(self.blocks.GRADIO_CACHE) / "scenes" / f"scene-{index}.png" for index in range(len(images))]
        save_images(images, files)
        return [str(file) for file in files]

    def _scene_rows(self, pairs: Sequence[tuple[int, str]]) -> list[list[str]]:
        return [[self.scenes[index], text] for index, text in pairs]

    def _on(
        self, run: gr.Button, text: gr.Textbox | None, work: Callable[..., Any], inputs: list[Any], outputs: list[Any]
    ) -> None:
        """Run `work` at the button or at Enter, at most once at a time; `PreviewStream` queues it.

        Gradio's own cancellation is not used: an unfinished step would overwrite its message.
        """
        gr.on(
            [run.click, *([text.submit] if text else [])], work, inputs, outputs, concurrency_id="pipeline",
            trigger_mode="once", show_progress="minimal", show_progress_on=outputs[1], api_visibility="private",
        )  # fmt: skip

    # ---- event handlers

    def sample(
        self, task: Task, session: str | None, text: str, seed: str, steps: int, guidance: float, negative: str,
        source: str | None = None,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Values of image (of an edit: slider), status, file, routing."""
        with _error_messages() as errors, self.budget.lease() as lease:
            image = _open(source, lease) if task == "edit" else None
            text, keywords, began = _text(text), _keywords(seed, steps, guidance, negative), time.monotonic()
            size = self.pipe.edited_size(image) if image else self.pipe.output_size()
            # The image, a preview that is shown and the next one, and what the model sees; Gradio shows them as WEBP.
            reserve_images(lease, 4 if image else 3, size, "webp")
            before = to_size(image, *size[::-1]) if image else None
            yield gr.skip(), components.status_message("One moment."), gr.skip(), gr.skip()
            for item in self.stream.run(session, task, *([image] if image else []), text, **keywords):
                if isinstance(item, PreviewStep):
                    preview = (before, item.image) if before else item.image
                    yield preview if item.image else gr.skip(), components.progress(item), gr.skip(), gr.skip()
                    continue
                file = self._save(item, f"spar-seed-{item.seeds[0]}.png", source)
                done = f"Seed {item.seeds[0]} · {steps} steps · guidance {guidance:g}"
                done += f" · {time.monotonic() - began:.2g} s"
                if layout := item.metadata[0].get("layout"):
                    done += f" · {layout}"
                status = components.done_message(done, world_notes(self.pipe, [text], [image] if image else []))
                view = components.routing_html(routing_view(item.routing[0], before)) if item.routing else gr.skip()
                yield (before, item.images[0]) if before else file, status, components.file(file), view
        if errors:
            yield gr.skip(), errors[0], gr.skip(), gr.skip()

    def understand(self, source: str | None, question: str) -> tuple[Any, ...]:
        """Values of answer, status."""
        with _error_messages() as errors, self.budget.lease() as lease:
            image, question, began = _open(source, lease), _text(question), time.monotonic()
            answer = self.stream.call(lambda pipe: pipe.understand(image, question)).result().texts[0]
            status = f"Answered in {time.monotonic() - began:.2g} seconds."
            return answer, components.done_message(status, world_notes(self.pipe, images=[image]))
        return "", errors[0]

    def reconstruct(self, source: str | None) -> Iterator[tuple[Any, ...]]:
        """Values of slider, status, file; yielded, so that they are counted until Gradio has written them."""
        with _error_messages() as errors, self.budget.lease() as lease:
            side, began = self.pipe.image_size, time.monotonic()
            given = _open(source, lease)
            reserve_images(lease, 2, (side, side), "webp")
            image = to_square(given, side)
            out = self.stream.call(lambda pipe: pipe.reconstruct(image)).result()
            done = f"Rebuilt at {side} × {side} pixels in {time.monotonic() - began:.2g} seconds."
            status = components.done_message(done, world_notes(self.pipe, images=[given]))
            yield (image, out.images[0]), status, components.file(self._save(out, "spar-rebuilt.png", source))
        if errors:
            yield gr.skip(), errors[0], gr.skip()

    def leave(self, request: gr.Request) -> None:
        self.stream.stop(request.session_hash, "generate", "edit")

    def _save(self, out: GenerateOutput | ReconstructOutput, name: str, source: str | None = None) -> str:
        """Write an image as the command line does, with its metadata, into Gradio's cache, which empties regularly."""
        path = Path(tempfile.mkdtemp(dir=self.blocks.GRADIO_CACHE)) / name
        origin = source_metadata(Path(source)) if source else {}
        save_images(out.images, [path], [origin | out.metadata[0]])
        return str(path)


# ---- user input and error messages -----------------------------------------------------------------------------------


def _text(text: str | None) -> str:
    if not text or not text.strip():
        raise InputError("please write some text first")
    return text.strip()


def _open(source: str | None, lease: Lease) -> Image.Image:
    """Open a dropped image with the pipeline's own checks, whose messages then contain no path."""
    if source is None:
        raise InputError("please drop an image first, or choose an example")
    try:
        size = Path(source).stat().st_size
        lease.reserve(size)
        data = Path(source).read_bytes()
    except OSError:
        raise InputError("the image is no longer here; please drop it again") from None
    image = decode_image(data, open_image, lease)
    lease.release(size)
    return image


def _keywords(seed: str | None, steps: int, guidance: float, negative: str | None) -> dict[str, Any]:
    """The pipeline's keywords; an empty seed is random. A seed is text since a browser's numbers end at 2^53."""
    digits = (seed or "").strip()
    if digits and not (digits.isascii() and digits.isdigit() and len(digits) <= len(str(MAX_SEED))):
        raise InputError(f"seed: expected a whole number from 0 to {MAX_SEED}, or nothing, got {digits[:40]!r}")
    return {
        "seed": int(digits) if digits else None, "num_inference_steps": steps, "guidance_scale": guidance,
        "negative_prompt": (negative or "").strip() or None,
    }  # fmt: skip


@contextmanager
def _error_messages() -> Iterator[list[Markup]]:
    """Convert an exception of the block to one message, appended to the yielded list."""
    errors: list[Markup] = []
    try:
        yield errors
    except Exception as error:
        errors.append(_message_of(error))
        forget_frames(error)  # through which its job's future holds itself


def _message_of(error: Exception) -> Markup:
    match error:
        case InputError():
            return components.error_message(str(error))
        case ApiError(status=413):
            return components.error_message("opening this image takes too much memory; please make it smaller first")
        case Unavailable() | ApiError():
            return components.error_message("spar is busy; please try again in a moment")
        case Cancelled() | CancelledError():
            return components.status_message("Stopped.")
    log.error("a request of the page failed", exc_info=error)
    return components.error_message("something went wrong here; spar's log has the details")
