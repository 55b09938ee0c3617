"""View of the routing of one image: the LLM layers that each word, each square of an image and each query reads.

Every token is a stripe whose colours are layers, each as wide as its weight, so that the mixture is visible. Colours
are viridis from the first layer to the last, distinct for the colour-blind and in grey print; the numbers below a
stripe and the exact weights on hover give the same without colour.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from spar.reporting.markup import Markup, inline_image, join, tag

# Viridis at even steps, without its darkest and lightest ends, which are invisible on dark and on light ground.
_VIRIDIS = np.array(
    [(65, 68, 135), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44)]
)
_FRAME = frozenset(("system", "user", "assistant"))
NAMED = 0.1  # a layer of at least this weight is named below a stripe
SHOWN = 0.005  # a weight below half a per cent is not shown
SIDE = 256  # least width of the image, pixels


class RoutingLike(Protocol):
    """`outputs.Routing`: T tokens, their kinds, K layer numbers, weights [T, K]."""

    @property
    def tokens(self) -> list[str]: ...

    @property
    def kinds(self) -> list[str]: ...

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def weights(self) -> np.ndarray: ...


def plain_word(token: str) -> str:
    """Convert a token to a word: without marks of byte-pair and sentence-piece tokenizers and white space."""
    return token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").strip()


def is_template_token(token: str) -> bool:
    """Whether a token belongs to the chat template (roles, control tokens, line ends)."""
    word = plain_word(token)
    return not word or word in _FRAME or bool(re.fullmatch(r"<[^<>\s]+>", word))


def layer_colors(count: int) -> list[str]:
    """One colour per layer, first to last."""
    places = np.linspace(0, len(_VIRIDIS) - 1, count)
    channels = [np.interp(places, np.arange(len(_VIRIDIS)), _VIRIDIS[:, channel]) for channel in range(3)]
    return ["#{:02x}{:02x}{:02x}".format(*(round(value) for value in rgb)) for rgb in zip(*channels, strict=True)]


def stripe(weights: Iterable[float], colors: Sequence[str]) -> str:
    """A CSS background: each colour as wide as its weight."""
    shown = [(color, weight) for color, weight in zip(colors, weights, strict=True) if weight >= SHOWN]
    ends = 100 * np.cumsum([weight for _, weight in shown]) / sum(weight for _, weight in shown)
    starts = [0.0, *ends[:-1]]
    stops = [f"{color} {a:.1f}% {b:.1f}%" for (color, _), a, b in zip(shown, starts, ends, strict=True)]
    return f"background:linear-gradient(to right,{','.join(stops)})"


def grid_shape(count: int, image: Image.Image | None) -> tuple[int, int] | None:
    """Rows and columns of an image's tokens, in its proportions; a square without an image.

    None if they do not fill such a grid.
    """
    ratio = image.height / image.width if image else 1.0
    rows, columns = round((count * ratio) ** 0.5), round((count / ratio) ** 0.5)
    return (rows, columns) if rows * columns == count else None


def routing_view(routing: RoutingLike, image: Image.Image | None = None) -> Markup:
    """View of the words, the image's squares and the queries of one prompt, each with its stripe. Needs `STYLE`.

    Args:
        routing: of one image.
        image: the image of the image tokens, as the model saw it; it is shown in grey below them.
    """
    layers, colors = routing.layers, layer_colors(len(routing.layers))
    places: dict[str, list[int]] = {"text": [], "image": [], "query": []}
    for place, (token, kind) in enumerate(zip(routing.tokens, routing.kinds, strict=True)):
        if kind != "text" or not is_template_token(token):
            places[kind].append(place)

    def stripes(kind: str, words: Sequence[str]) -> list[Markup]:
        return [
            _token(word, routing.weights[place], layers, colors)
            for word, place in zip(words, places[kind], strict=True)
        ]

    key = [
        join(tag("span", style=f"background:{color}"), f"layer {layer}")
        for layer, color in zip(layers, colors, strict=True)
    ]
    words = [plain_word(routing.tokens[place]) for place in places["text"]]
    read = [tag("div", *stripes("text", words), class_="routing-words", role="list", aria_label="words")]
    if places["query"]:
        numbers = [str(number + 1) for number in range(len(places["query"]))]
        note = f"The model's own {len(numbers)} drawing queries, which belong to no place in the image:"
        read += [
            tag("p", note, class_="routing-note"),
            tag("div", *stripes("query", numbers), class_="routing-words", role="list", aria_label="queries"),
        ]
    shape = grid_shape(len(places["image"]), image)
    seen = None
    if shape and shape[0]:
        seen = _image_squares(routing.weights[places["image"]], shape, image, layers, colors)
    return tag(
        "div", tag("p", *(tag("span", one, class_="routing-key") for one in key), class_="routing-legend"),
        tag("div", tag("div", *read), seen, class_="routing-parts"), class_="routing",
    )  # fmt: skip


def _weights_text(weights: Iterable[float], layers: Sequence[int]) -> str:
    return ", ".join(f"layer {layer} {100 * weight:.1f} %" for layer, weight in zip(layers, weights, strict=True))


def _token(word: str, weights: np.ndarray, layers: Sequence[int], colors: Sequence[str]) -> Markup:
    """A word, its stripe, and the numbers of the layers that it reads most."""
    named = "+".join(str(layer) for layer, weight in zip(layers, weights, strict=True) if weight >= NAMED)
    return tag(
        "span", word, tag("i", style=stripe(weights, colors)), tag("small", named), class_="routing-token",
        role="listitem", title=f"{word}: {_weights_text(weights, layers)}",
    )  # fmt: skip


def _image_squares(
    weights: np.ndarray, shape: tuple[int, int], image: Image.Image | None, layers: Sequence[int], colors: Sequence[str]
) -> Markup:
    """The image tokens' stripes, each at its square's place, over the image in grey."""
    rows, columns = shape
    cells = [
        tag("i", style=stripe(one, colors),
            title=f"row {place // columns + 1}, column {place % columns + 1}: {_weights_text(one, layers)}")
        for place, one in enumerate(weights)
    ]  # fmt: skip
    grid = tag("div", *cells, class_="routing-grid", style=f"grid-template-columns:repeat({columns},1fr)")
    note = tag("p", "The squares of the image:", class_="routing-note")
    below = inline_image(image, "the image, in grey", scale=max(1, -(-SIDE // image.width))) if image else None
    view = tag(
        "div", below, grid, class_="routing-picture", role="img", style=f"aspect-ratio:{columns}/{rows}",
        aria_label=f"layers that the {rows} x {columns} squares of the image read",
    )
    return tag("div", note, view)


# Colours derive from the text's own, so that the style suits light and dark pages.
STYLE = """
.routing p { margin: 1rem 0 .4rem; max-width: none; }
.routing-legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .875rem; }
.routing-key { display: inline-flex; align-items: center; gap: .4rem; }
.routing-key span { width: .9rem; height: .9rem; border-radius: 3px; outline: 1px solid rgb(128 128 128 / .5); }
.routing-note { font-size: .875rem; opacity: .8; }
.routing-parts { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.routing-parts > * { flex: 0 1 320px; } .routing-parts > :first-child { flex: 1 1 300px; }
.routing-parts > * > .routing-note:first-child { margin-top: 0; }
.routing-words { display: flex; flex-wrap: wrap; gap: .5rem .35rem; }
.routing-token { display: inline-flex; flex-direction: column; align-items: center; min-width: 2rem;
  padding: .2rem .45rem; border: 1px solid rgb(128 128 128 / .35); border-radius: 6px; line-height: 1.35; }
.routing-token i { align-self: stretch; height: 7px; border-radius: 3px; margin-top: .2rem;
  outline: 1px solid rgb(128 128 128 / .4); }
.routing-token small { font-size: .7rem; opacity: .75; font-variant-numeric: tabular-nums; }
.routing-picture { position: relative; }
.routing-picture img { position: absolute; inset: 0; width: 100%; height: 100%; max-width: none; border-radius: 0;
  image-rendering: pixelated; filter: grayscale(1); }
.routing-grid { position: absolute; inset: 0; display: grid; gap: 1px; opacity: .65; }
"""
