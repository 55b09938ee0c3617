"""Components, messages and style of the page."""

import re
from collections.abc import Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from spar.reporting import routing
from spar.ui import examples
from spar.ui.preview_stream import PreviewStep

HEIGHT = 340  # of an image on the page, pixels
SMALL = 128  # images up to this side are enlarged without smoothing
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
_IMAGE: dict[str, Any] = {"format": "png", "height": HEIGHT, "buttons": ["fullscreen"]}
# The pipeline's messages name keywords and data; the page shows labels and files.
_PLAIN = (
    (r"^(prompt|instruction|question): ", ""),
    (r"^negative_prompt: ", "steer away from: "),
    (r"^num_inference_steps: ", "steps: "),
    (r"^guidance_scale: ", "guidance: "),
    (r"^unknown words ", "this model does not know: "),
    (r"; this model knows only .*", "; the top of the page says what it knows"),
    (r"\bthe given data\b", "the file"),
)


# ---- components ------------------------------------------------------------------------------------------------------


def button(title: str) -> gr.Button:
    """The button that starts a task."""
    return gr.Button(title, variant="primary", scale=3, min_width=140)


def image(side: int) -> gr.Image:
    """A result, as the written file, so that the browser saves what the command line writes."""
    return gr.Image(
        label="Image", type="filepath", image_mode=None, interactive=False, elem_classes=_classes(side), **_IMAGE
    )


def source(side: int, value: str | None) -> gr.Image:
    """An image input, as the path of the uploaded file."""
    component = gr.Image(
        value, label="Your image", type="filepath", image_mode=None, interactive=True, elem_classes=_classes(side),
        sources=["upload", "clipboard"], placeholder="Drop an image here, paste one, or click to choose a file",
        **_IMAGE,
    )  # fmt: skip
    # Gradio's own would open the file with Pillow before our checks.
    component.preprocess = (  # type: ignore[method-assign]  # a subclass would be another component to Gradio
        lambda payload: payload.path if payload else None
    )
    return component


def slider(side: int) -> gr.ImageSlider:
    """Two images over each other."""
    classes = ["spar-slider", *_classes(side)]
    return gr.ImageSlider(label="Before and after", type="pil", interactive=False, elem_classes=classes, **_IMAGE)


def _classes(side: int) -> list[str]:
    return ["spar-picture", *(["spar-small"] if side <= SMALL else [])]


def seed(value: str) -> gr.Textbox:
    """The field of the seed."""
    attributes: Any = {"inputmode": "numeric", "autocomplete": "off"}  # gradio's class lacks inputmode
    return gr.Textbox(
        value, label="Seed", info="The same seed, the same image.", placeholder="a new one each time", max_length=20,
        html_attributes=attributes, scale=3, min_width=160,
    )  # fmt: skip


def status() -> gr.HTML:
    """The line that says how a task goes on."""
    return gr.HTML(status_message(""), elem_classes="spar-status", min_height=40)


def download_button() -> tuple[gr.HTML, gr.DownloadButton]:
    """The row below a result: the status, and the file to download."""
    with gr.Row(elem_classes="spar-foot"):
        return status(), gr.DownloadButton("Download PNG", interactive=False, size="sm", min_width=130)


def file(path: str) -> dict[str, Any]:
    """Update of the download button once there is a file."""
    return gr.update(value=path, interactive=True)


def routing_panel(*, visible: bool) -> gr.HTML:
    """The view of what each token reads of the LLM's layers, where a model has such a mix."""
    with gr.Accordion("What each word reads", open=True, visible=visible):
        return gr.HTML(routing_html(Markup('<p class="spar-lead">Draw something first.</p>')))


# ---- messages --------------------------------------------------------------------------------------------------------


def routing_html(view: Markup) -> Markup:
    """A routing with its explanation."""
    explanation = (
        "The language model works in layers, and each word is read from a mix of them that the model chooses. A stripe "
        "shows the mix, the number below names the layers, and pointing at it gives the exact shares."
    )
    return Markup('<p class="spar-lead">{}</p>{}').format(explanation, view)


def head(system: str, side: int, *, shapes: bool, edits: bool) -> Markup:
    """Header of the page: the model and its abilities."""
    editing = " edits them," if edits else ""
    what = f"One model that generates images from text,{editing} answers questions about them and reconstructs them."
    if not shapes:
        what += f" This one works at {side} × {side} pixels."
        return Markup('<div class="spar-head"><h1>{}</h1><p>{}</p></div>').format(system, what)
    *first, last = examples.VOCABULARY_GROUPS["Shapes"]
    known = f"This one is small and knows a world of shapes, {side} × {side} pixels: {', '.join(first)} and {last}."
    groups = examples.VOCABULARY_GROUPS.items()
    words = [Markup("<dt>{}</dt><dd>{}</dd>").format(title, ", ".join(values)) for title, values in groups]
    return Markup(
        '<div class="spar-head"><h1>{}</h1><p>{}</p><p>{}</p>'
        "<details><summary>What it knows</summary><dl>{}</dl></details></div>"
    ).format(system, what, known, Markup().join(words))


def error_message(sentence: str) -> Markup:
    """An error in the page's own terms."""
    for pattern, plain in _PLAIN:
        sentence = re.sub(pattern, plain, sentence, flags=re.DOTALL)
    sentence = sentence[0].upper() + sentence[1:].rstrip(".") + "."
    return Markup('<div class="spar-problem" role="alert">{}</div>').format(sentence)


def status_message(text: str) -> Markup:
    """A status in words."""
    return Markup('<div class="spar-note" role="status">{}</div>').format(text)


def progress(step: PreviewStep) -> Markup:
    """The status of a step."""
    return Markup(
        '<div class="spar-note"><span class="spar-bar"><i style="width:{:.0f}%"></i></span>Step {} of {}</div>'
    ).format(100 * step.done / step.steps, step.done, step.steps)


def done_message(text: str, notes: Sequence[str] = ()) -> Markup:
    """The status of a finished task, and notes on what lay outside the model's world."""
    warnings = (Markup('<div class="spar-note spar-warning">{}.</div>').format(n[0].upper() + n[1:]) for n in notes)
    return status_message(text) + Markup().join(warnings)


# ---- style -----------------------------------------------------------------------------------------------------------


def theme() -> gr.themes.Base:
    """Theme with system fonts, so that nothing is loaded from elsewhere, and legible small text."""
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="zinc", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        button_secondary_text_color="*neutral_800", button_large_text_weight="500", button_medium_text_weight="500",
        button_small_text_weight="500",
    )  # fmt: skip


CSS = """
.gradio-container { max-width: 1080px !important; width: 100% !important; margin: 0 auto !important; }
.spar-head h1 { font-size: 1.75rem; font-weight: 700; margin: .5rem 0 .25rem; }
.spar-head p { margin: .1rem 0; line-height: 1.5; }
.spar-head details { margin: .4rem 0 .25rem; }
.spar-head summary { cursor: pointer; color: var(--link-text-color); }
.spar-head dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: .5rem 0; }
.spar-head dt { color: var(--body-text-color-subdued); } .spar-head dd { margin: 0; }
.spar-picture img { object-fit: contain !important; }
.spar-small img, .spar-examples img { image-rendering: pixelated; }
.spar-slider :is(.image-container, .slider-wrap, .wrap, .content) { height: 100%; max-height: none !important; }
.spar-slider .content img { width: 100%; height: 100%; max-height: 100% !important; inset: 0; }
.spar-note { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; padding: .25rem 0; }
.spar-bar { display: inline-block; width: 7rem; height: .5rem; margin-right: .6rem; border-radius: 4px;
  background: var(--border-color-primary); overflow: hidden; }
.spar-bar i { display: block; height: 100%; background: var(--color-accent); }
.spar-problem { border-left: 4px solid #c2410c; background: rgb(194 65 12 / .1); border-radius: 4px;
  padding: .6rem .8rem; overflow-wrap: anywhere; }
.spar-warning { border-left: 4px solid #a16207; padding-left: .8rem; }
.spar-foot { align-items: start; flex-wrap: nowrap !important; }
.spar-foot > .block { flex: 1 1 0; } .spar-foot > button { flex: 0 0 auto !important; margin-top: .35rem; }
.spar-answer textarea { font-size: 1.15rem; }
.spar-lead { color: var(--body-text-color-subdued); margin: 0; }
.spar-seed { align-items: end; }
@media (max-width: 640px) { .tab-container button { padding-inline: .5rem !important; font-size: .875rem; } }
.spar-examples thead { display: none; }
.spar-examples .table-wrap { border: 0; }
.spar-examples table { display: block; }
.spar-examples tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: .5rem; }
.spar-examples tr { display: flex; align-items: center; background: none !important; border-radius: 6px;
  border: 1px solid var(--border-color-primary) !important; }
.spar-examples button { text-align: left; }
.spar-examples tr:hover { border-color: var(--color-accent) !important; }
.spar-examples td { padding: .3rem !important; border: 0 !important; text-align: left; max-width: none !important; }
.spar-examples td img { width: 44px !important; height: 44px !important; }
.spar-examples td .container { width: 44px; height: 44px; border: 0; }
""" + routing.STYLE
