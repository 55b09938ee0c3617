"""View of the routing of one image: the LLM layers that each word, each square of an image and each query reads.

Every token is a stripe whose colours are layers, each as wide as its weight, so that the mixture is visible. Colours
are viridis from the first layer to the last, distinct for the colour-blind and in grey print; the numbers below a
stripe and the exact weights on hover give the same without colour.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from spar.inference.outputs import Routing
from spar.reporting.templating import render_template, template_text

# Viridis at even steps, without its darkest and lightest ends, which are invisible on dark and on light ground.
_VIRIDIS = np.array(
    [(65, 68, 135), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44)]
)
_FRAME = frozenset(("system", "user", "assistant"))
NAMED = 0.1  # a layer of at least this weight is named below a stripe
SHOWN = 0.005  # a weight below half a per cent is not shown
SIDE = 256  # least width of the image, pixels
STYLE = template_text("routing.css")


class TokenView(NamedTuple):
    """A token's word or number, its stripe in CSS, the numbers of the layers that it reads most, and all weights."""

    word: str
    stripe: str
    layers: str
    weights: str


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


def routing_view(routing: Routing, image: Image.Image | None = None) -> Markup:
    """View of the words, the image's squares and the queries of one prompt, each with its stripe. Needs `STYLE`.

    Args:
        routing: of one image.
        image: the image of the image tokens, as the model saw it; it is shown in grey below them.
    """
    layers, colors = routing.layers, layer_colors(len(routing.layers))
    views: dict[str, list[TokenView]] = {"text": [], "image": [], "query": []}
    for token, kind, weights in zip(routing.tokens, routing.kinds, routing.weights, strict=True):
        if kind != "text" or not is_template_token(token):
            word = plain_word(token) if kind == "text" else str(len(views[kind]) + 1)
            views[kind].append(_token_view(word, weights, layers, colors))
    rows, columns = grid_shape(len(views["image"]), image) or (0, 0)
    return render_template(
        "routing_view.html", legend=list(zip(layers, colors, strict=True)), words=views["text"],
        queries=views["query"], squares=views["image"] if rows else [], rows=rows, columns=columns, image=image,
        scale=max(1, -(-SIDE // image.width)) if image else 1,
    )  # fmt: skip


def _token_view(word: str, weights: np.ndarray, layers: Sequence[int], colors: Sequence[str]) -> TokenView:
    read = list(zip(layers, weights, strict=True))
    return TokenView(
        word, stripe(weights, colors), "+".join(str(layer) for layer, weight in read if weight >= NAMED),
        ", ".join(f"layer {layer} {100 * weight:.1f} %" for layer, weight in read),
    )  # fmt: skip
