"""Mean routing weights by class of token: words, image tokens and queries."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from spar.reporting.routing import is_template_token, plain_word
from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES
from spar.worlds.shapes.tokenizer import NUMBERS, PLURALS

_WORDS = {
    "color word": frozenset(COLORS),
    "shape word": frozenset((*SHAPES, *PLURALS.values(), "shape")),
    "size word": frozenset(SIZES),
    "number word": frozenset(NUMBERS),
    "background word": frozenset((*BACKGROUNDS, "background")),
    "place word": frozenset(("left", "right", "above", "below")),
    "verb": frozenset(
        ("generate", "edit", "describe", "recolor", "make", "change", "remove", "delete", "add", "replace")
    ),
}
TOKEN_CLASSES = (*_WORDS, "other word", "template", "image", "query")


@dataclass(frozen=True)
class RoutingSummary:
    """Mean weight of each layer by class of token: `means` [C, K], in the order of `classes`; `counts` of tokens."""

    classes: tuple[str, ...]
    layers: tuple[int, ...]
    means: np.ndarray
    counts: tuple[int, ...]


def token_class(token: str, kind: str) -> str:
    """One of TOKEN_CLASSES: the kind, if not text, else by the word; marks and the chat template are "template"."""
    if kind in ("image", "query"):
        return kind
    word = plain_word(token).lower()
    for name, words in _WORDS.items():
        if word in words:
            return name
    return "other word" if re.fullmatch(r"[\w'-]+", word) and not is_template_token(word) else "template"


def collect_routing(outputs: Iterable[Any]) -> RoutingSummary:
    """Mean routing weights by class of token.

    Args:
        outputs: of `pipe.generate` or `pipe.edit` (anything with `.routing`), or single routings.

    Raises:
        ValueError: no routing at all, or routings over different layers.
    """
    routings = [one for output in outputs for one in getattr(output, "routing", [output])]
    layers = {tuple(routing.layers) for routing in routings}
    if len(layers) != 1:
        raise ValueError(f"expected routings over the same layers, got {len(layers)} different sets")
    rows: dict[str, list[np.ndarray]] = {}
    for routing in routings:
        for token, kind, weights in zip(routing.tokens, routing.kinds, routing.weights, strict=True):
            rows.setdefault(token_class(token, kind), []).append(np.asarray(weights, dtype=np.float64))
    classes = tuple(name for name in TOKEN_CLASSES if name in rows)
    return RoutingSummary(
        classes, layers.pop(), np.stack([np.mean(rows[name], 0) for name in classes]),
        tuple(len(rows[name]) for name in classes),
    )
