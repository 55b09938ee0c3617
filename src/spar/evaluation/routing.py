"""Routing weights by kind of token: which words, image tokens and queries read which LLM layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Protocol

import numpy as np

from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES
from spar.worlds.shapes.words import NUMBERS, PLURALS

_WORDS = {
    "color word": frozenset(COLORS),
    "shape word": frozenset((*SHAPES, *PLURALS.values(), "shape")),
    "size word": frozenset(SIZES),
    "number word": frozenset(NUMBERS),
    "background word": frozenset((*BACKGROUNDS, "background")),
    "place word": frozenset(("left", "right", "above", "below")),
    "verb": frozenset("generate edit describe recolor make change remove delete add replace".split()),
}
_TEMPLATE = frozenset(("user", "assistant", "system"))
TOKEN_CLASSES = (*_WORDS, "other word", "template", "image", "query")


class RoutingLike(Protocol):
    """`pipeline.Routing`: T tokens, their kinds, K layer numbers, weights [T, K]."""

    tokens: list[str]
    kinds: list[str]
    layers: tuple[int, ...]
    weights: np.ndarray


@dataclass(frozen=True)
class RoutingSummary:
    """Mean weight of each layer by class of token: `means` [C, K], in the order of `classes`; `counts` of tokens."""

    classes: tuple[str, ...]
    layers: tuple[int, ...]
    means: np.ndarray
    counts: tuple[int, ...]


def plain_word(token: str) -> str:
    """A token as a word: marks of byte-pair and sentence-piece tokenizers stripped, lower case."""
    return token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").strip(" ").lower()


def token_class(token: str, kind: str) -> str:
    """One of TOKEN_CLASSES: the kind, if it is no text, else by the word; marks and the chat's frame are "template"."""
    if kind in ("image", "query"):
        return kind
    word = plain_word(token)
    for name, words in _WORDS.items():
        if word in words:
            return name
    return "other word" if re.fullmatch(r"[\w'-]+", word) and word not in _TEMPLATE else "template"


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


def image_maps(routing: RoutingLike) -> np.ndarray | None:
    """The image tokens' weights as maps [K, side, side]; None without image tokens, or where they fill no square."""
    places = [place for place, kind in enumerate(routing.kinds) if kind == "image"]
    side = isqrt(len(places))
    if not places or side * side != len(places):
        return None
    return np.asarray(routing.weights)[places].T.reshape(-1, side, side)


def strip_tokens(routing: RoutingLike) -> Sequence[int]:
    """The places of the tokens that are no image tokens, in order."""
    return [place for place, kind in enumerate(routing.kinds) if kind != "image"]
