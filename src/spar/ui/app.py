"""The web page: four tabs for the four tasks, with previews and the LLM layers that each token reads."""

from __future__ import annotations

import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from markupsafe import Markup

from spar.common.errors import InputError
from spar.common.limits import MAX_SEED
from spar.flow.sampler import Cancelled
from spar.inference.image_files import save_images, source_metadata
from spar.processing.images import open_image, to_size, to_square
from spar.reporting.routing import routing_view
from spar.serving.worker import Unavailable
from spar.ui import components, examples
from spar.ui.preview_stream import PreviewStep, PreviewStream

if TYPE_CHECKING:
    from PIL import Image

    from spar.inference.outputs import GenerateOutput, ReconstructOutput
    from spar.inference.pipeline import SparPipeline
    from spar.ui.preview_stream import Call


MAX_STEPS, MAX_GUIDANCE = 100, 15  # of the sliders; the pipeline's own limits are wider
MAX_WAITING = 8  # accepted requests; each occupies a thread until it is finished
KEPT_SECONDS = 3600  # of an image in the cache

log = logging.getLogger(__name__)


def build_page(pipe: SparPipeline, call: Call | None = None) -> gr.Blocks:
    """Build the page of a model, which needs `components.CSS`.

    Args:
        pipe: runs one job at a time.
        call: as in `PreviewStream`.
    """
    return Page(pipe, call).blocks


class Page:
    """The tabs, and the methods of their buttons, which return new values of the output components."""

    def __init__(self, pipe: SparPipeline, call: Call | None) -> None:
        self.pipe, self.stream = pipe, PreviewStream(pipe, call)
        self.shapes = examples.knows_shapes(pipe)
        self.scenes = examples.scene_images()
        cleaning = (KEPT_SECONDS // 4, KEPT_SECONDS)
        with gr.Blocks(title="SPAR", analytics_enabled=False, delete_cache=cleaning) as self.blocks:
            self.files = self._scene_files()
            gr.HTML(components.head(pipe.image_size, self.shapes))
            with gr.Tabs(overflow_behavior="wrap"):
                for title, tab in (
                    ("Generate", self._generate_tab),
                    ("Edit", self._edit_tab),
                    ("Understand", self._understand_tab),
                    ("Reconstruct", self._reconstruct_tab),
                ):
                    with gr.Tab(title, id=title.lower()):
                        tab()
            self.blocks.unload(self.leave)
        self.blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=MAX_WAITING, api_open=False)

    # ---- tabs

    def _generate_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=320):
                prompt = self._text_box("What to draw", examples.PROMPTS)
                with gr.Row():
                    run, stop = components.button("Draw"), components.stop_button()
                seed, settings = self._settings()
            with gr.Column(min_width=320):
                image = components.image("Image", self.pipe.image_size)
                status, file = components.download_button()
        self._examples([prompt], [(None, text) for text in examples.PROMPTS], seed)
        view = components.routing_panel()
        self._on(run, prompt, self.generate, [prompt, seed, *settings], [image, status, file, view])
        stop.click(self.stop_generate, **components.HIDDEN)

    def _edit_tab(self) -> None:
        texts = [text for _, text in examples.EDITS]
        with gr.Row():
            with gr.Column(min_width=320):
                source = self._source()
                instruction = self._text_box("What to change", texts)
                with gr.Row():
                    run, stop = components.button("Change it"), components.stop_button()
                seed, settings = self._settings()
            with gr.Column(min_width=320):
                slider = components.slider("Before and after", self.pipe.image_size)
                status, file = components.download_button()
        self._examples([source, instruction], examples.EDITS, seed)
        view = components.routing_panel()
        self._on(run, instruction, self.edit, [source, instruction, seed, *settings], [slider, status, file, view])
        stop.click(self.stop_edit, **components.HIDDEN)

    def _understand_tab(self) -> None:
        texts = [text for _, text in examples.QUESTIONS]
        with gr.Row():
            with gr.Column(min_width=320):
                source = self._source()
                question = self._text_box("Your question", texts)
                run = components.button("Ask")
            with gr.Column(min_width=320):
                answer = gr.Textbox(label="Answer", lines=2, interactive=False, elem_classes="spar-answer")
                status = components.status()
        self._examples([source, question], examples.QUESTIONS)
        self._on(run, question, self.understand, [source, question], [answer, status])

    def _reconstruct_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=320):
                source = self._source()
                run = components.button("Rebuild")
            with gr.Column(min_width=320):
                slider = components.slider("Before and after", self.pipe.image_size)
                status, file = components.download_button()
        self._examples([source], [(place, "") for place in range(len(self.scenes))])
        self._on(run, None, self.reconstruct, [source], [slider, status, file])

    def _text_box(self, label: str, texts: Sequence[str]) -> gr.Textbox:
        """A box that grows with its text, of one line at first, since Enter submits only then."""
        return gr.Textbox(label=label, lines=1, max_lines=4, value=texts[0] if self.shapes else "")

    def _source(self) -> gr.Image:
        return components.source("Your image", self.pipe.image_size, self.files[0] if self.shapes else None)

    def _settings(self) -> tuple[gr.Textbox, list[gr.components.Component]]:
        """The seed, and the rarer settings: steps, guidance, negative prompt."""
        defaults = self.pipe.bundle.sampling
        with gr.Row(elem_classes="spar-seed"):
            seed = components.seed(str(examples.SEED))
            new = gr.Button("New seed", size="md", scale=1, min_width=110)
            new.click(lambda: str(secrets.randbelow(2**32)), None, seed, **components.HIDDEN)
        with gr.Accordion("More settings", open=False):
            steps = gr.Slider(
                1, max(MAX_STEPS, defaults.steps), defaults.steps, step=1, precision=0, label="Steps",
                info="More steps take longer and give finer images.",
            )  # fmt: skip
            guidance = gr.Slider(
                1, max(MAX_GUIDANCE, defaults.guidance), defaults.guidance, step=0.1, label="Guidance",
                info="How strictly the image follows the prompt; 1 switches it off.",
            )  # fmt: skip
            negative = gr.Textbox(label="Steer away from", info="What the image should not show; may be empty.")
        return seed, [steps, guidance, negative]

    def _examples(
        self, shown: list[Any], chosen: Sequence[tuple[int | None, str]], seed: gr.Textbox | None = None
    ) -> None:
        """Examples that a click puts into `shown` (image, text or both), with their seed; none for another world.

        Each is the index of a scene, if the tab takes images, and a text, if it takes text.
        """
        if not self.shapes:
            return
        samples = [
            [*([] if place is None else [self.files[place]]), *([text] if text else [])] for place, text in chosen
        ]
        dataset = gr.Dataset(
            label="Try one of these", components=shown, samples=samples, type="index", elem_classes="spar-examples"
        )
        targets, constants = (shown, []) if seed is None else ([*shown, seed], [str(examples.SEED)])

        def choose(index: int) -> Any:
            values = [*samples[index], *constants]
            return values if len(values) > 1 else values[0]

        dataset.click(choose, dataset, targets, **components.HIDDEN)

    def _scene_files(self) -> list[str]:
        """Write the scenes of the examples to the cache, and return their paths."""
        folder = Path(self.blocks.GRADIO_CACHE) / "scenes"
        files = [folder / f"scene-{index}.png" for index in range(len(self.scenes))]
        save_images(self.scenes, files)
        return [str(file) for file in files]

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

    def generate(
        self, prompt: str, seed: str, steps: int, guidance: float, negative: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Values of image, status, file, routing."""
        with _error_messages() as errors:
            prompt, keywords = _text(prompt), _keywords(seed, steps, guidance, negative)
            began = time.monotonic()
            yield gr.skip(), components.status_message("One moment."), gr.skip(), gr.skip()
            for item in self.stream.run(request.session_hash, "generate", prompt, **keywords):
                if isinstance(item, PreviewStep):
                    yield item.image or gr.skip(), components.progress(item), gr.skip(), gr.skip()
                    continue
                file = self._save(item, f"spar-seed-{item.seeds[0]}.png")
                status = components.done_message(item.seeds[0], steps, guidance, time.monotonic() - began)
                yield file, status, components.file(file), components.routing_html(routing_view(item.routing[0]))
        if errors:
            yield gr.skip(), errors[0], gr.skip(), gr.skip()

    def edit(
        self, source: str | None, instruction: str, seed: str, steps: int, guidance: float, negative: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Values of slider, status, file, routing."""
        with _error_messages() as errors:
            image, instruction = _open(source), _text(instruction)
            keywords, began = _keywords(seed, steps, guidance, negative), time.monotonic()
            before = None  # as the model sees it, at the output's size
            yield gr.skip(), components.status_message("One moment."), gr.skip(), gr.skip()
            for item in self.stream.run(request.session_hash, "edit", image, instruction, **keywords):
                if isinstance(item, PreviewStep):
                    if item.image:
                        before = before or to_size(image, *item.image.size)
                    pair = (before, item.image) if item.image else gr.skip()
                    yield pair, components.progress(item), gr.skip(), gr.skip()
                    continue
                before = before or to_size(image, *item.images[0].size)
                file = self._save(item, f"spar-seed-{item.seeds[0]}.png", source)
                status = components.done_message(item.seeds[0], steps, guidance, time.monotonic() - began)
                view = components.routing_html(routing_view(item.routing[0], before))
                yield (before, item.images[0]), status, components.file(file), view
        if errors:
            yield gr.skip(), errors[0], gr.skip(), gr.skip()

    def understand(self, source: str | None, question: str) -> tuple[Any, ...]:
        """Values of answer, status."""
        with _error_messages() as errors:
            image, question, began = _open(source), _text(question), time.monotonic()
            answer = self.stream.call(lambda pipe: pipe.understand(image, question)).result().texts[0]
            return answer, components.status_message(f"Answered in {time.monotonic() - began:.2g} seconds.")
        return "", errors[0]

    def reconstruct(self, source: str | None) -> tuple[Any, ...]:
        """Values of slider, status, file."""
        with _error_messages() as errors:
            side, began = self.pipe.image_size, time.monotonic()
            image = to_square(_open(source), side)
            out = self.stream.call(lambda pipe: pipe.reconstruct(image)).result()
            status = components.status_message(
                f"Rebuilt at {side} × {side} pixels in {time.monotonic() - began:.2g} seconds."
            )
            return (image, out.images[0]), status, components.file(self._save(out, "spar-rebuilt.png", source))
        return gr.skip(), errors[0], gr.skip()

    def stop_generate(self, request: gr.Request) -> None:
        self.stream.stop(request.session_hash, "generate")

    def stop_edit(self, request: gr.Request) -> None:
        self.stream.stop(request.session_hash, "edit")

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


def _open(source: str | None) -> Image.Image:
    """Open a dropped image with the pipeline's own checks, whose messages then contain no path."""
    if source is None:
        raise InputError("please drop an image first, or choose an example")
    try:
        data = Path(source).read_bytes()
    except OSError:
        raise InputError("the image is no longer here; please drop it again") from None
    return open_image(data)


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
    except InputError as error:
        errors.append(components.error_message(str(error)))
    except Unavailable:
        errors.append(components.error_message("spar is busy; please try again in a moment"))
    except (Cancelled, CancelledError):
        errors.append(components.status_message("Stopped."))
    except Exception:
        log.exception("a request of the page failed")
        errors.append(components.error_message("something went wrong here; spar's log has the details"))
