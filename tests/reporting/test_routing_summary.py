"""Routing weights by kind of token."""

from types import SimpleNamespace

import numpy as np
import pytest

from spar.reporting.routing_summary import TOKEN_CLASSES, collect_routing, token_class

TOKENS = ["<|im_start|>", "user", "\n", "make", "red", "circle", *["<IMG_CONTEXT>"] * 4, "query 0"]
KINDS = ["text"] * 6 + ["image"] * 4 + ["query"]


def routing(weights=None, tokens=TOKENS, kinds=KINDS, layers=(2, 4)):
    weights = np.tile([0.25, 0.75], (len(tokens), 1)) if weights is None else weights
    return SimpleNamespace(tokens=list(tokens), kinds=list(kinds), layers=layers, weights=weights)


@pytest.mark.parametrize(
    ("token", "kind", "name"),
    [
        ("red", "text", "color word"),
        ("ĠRed", "text", "color word"),
        ("crosses", "text", "shape word"),
        ("left", "text", "place word"),
        ("three", "text", "number word"),
        ("navy", "text", "background word"),
        ("small", "text", "size word"),
        ("recolor", "text", "verb"),
        ("the", "text", "other word"),
        ("<|im_end|>", "text", "template"),
        ("\n", "text", "template"),
        (":", "text", "template"),
        ("assistant", "text", "template"),
        ("<IMG_CONTEXT>", "image", "image"),
        ("query 3", "query", "query"),
    ],
)
def test_tokens_have_classes(token, kind, name):
    assert token_class(token, kind) == name
    assert name in TOKEN_CLASSES


def test_a_planted_preference_is_found():
    weights = np.tile([0.5, 0.5], (len(TOKENS), 1))
    weights[4] = [0.9, 0.1]
    weights[6:10] = [[0.0, 1.0], [0.2, 0.8], [0.4, 0.6], [0.6, 0.4]]
    summary = collect_routing([SimpleNamespace(routing=[routing(weights), routing()])])
    means = dict(zip(summary.classes, summary.means.tolist(), strict=True))
    assert means["color word"] == pytest.approx([(0.9 + 0.25) / 2, (0.1 + 0.75) / 2])
    assert means["image"] == pytest.approx([(0.3 + 0.25) / 2, (0.7 + 0.75) / 2])
    assert dict(zip(summary.classes, summary.counts, strict=True))["image"] == 8
    assert summary.means.sum(1) == pytest.approx(1.0)
    assert summary.layers == (2, 4)
    assert sum(summary.counts) == 2 * len(TOKENS)


def test_single_routings_are_taken_too():
    assert np.array_equal(collect_routing([routing()]).means, collect_routing([routing(), routing()]).means)


def test_nothing_and_different_layers_are_refused():
    with pytest.raises(ValueError, match="got 0"):
        collect_routing([])
    with pytest.raises(ValueError, match="got 2"):
        collect_routing([routing(), routing(layers=(1, 2))])
