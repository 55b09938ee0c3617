"""The drawing of a routing: each token's stripe says its weights, each square lies where its token does."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from spar.reporting.routing import grid_shape, is_template_token, layer_colors, routing_view, stripe

COLORS = ["#111111", "#222222", "#333333"]


def routing(tokens, kinds, weights, layers=(2, 4)):
    return SimpleNamespace(tokens=tokens, kinds=kinds, layers=layers, weights=np.array(weights))


def test_a_stripe_is_as_wide_as_the_weights_and_leaves_out_what_is_next_to_nothing():
    assert stripe([0.25, 0.0, 0.75], COLORS) == (
        "background:linear-gradient(to right,#111111 0.0% 25.0%,#333333 25.0% 100.0%)"
    )
    assert "0.0% 100.0%" in stripe([0.999, 0.001, 0.0], COLORS) and "#222222" not in stripe([0.999, 0.001, 0], COLORS)


def test_colours_go_from_dark_to_light_so_that_brightness_alone_tells_layers_apart():
    def brightness(color):
        red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for count in (2, 4, 8, 28):
        levels = [brightness(color) for color in layer_colors(count)]
        assert len(levels) == count and np.all(np.diff(levels) > 0)
    assert len(layer_colors(1)) == 1


@pytest.mark.parametrize("token", ["<|im_start|>", "user", "\n", "Ċ", "</img>", "<|im_end|>", " "])
def test_the_chats_frame_is_left_out(token):
    assert is_template_token(token)
    view = routing_view(routing([token, "Ġred", ":"], ["text"] * 3, [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]))
    assert re.findall(r'title="([^:]*|:): layer', view) == ["red", ":"]


def test_words_are_escaped_and_name_the_layers_that_they_read():
    view = routing_view(routing(["<b>&"], ["text"], [[0.95, 0.05]]))
    assert 'title="&lt;b&gt;&amp;: layer 2 95.0 %, layer 4 5.0 %"' in view and "<b>" not in view
    assert "<small>2</small>" in view
    assert "<small>2+4</small>" in routing_view(routing(["a"], ["text"], [[0.6, 0.4]]))


@pytest.mark.parametrize(
    ("count", "size", "shape"),
    [(4, None, (2, 2)), (3, None, None), (32, (128, 64), (4, 8)), (32, (64, 128), (8, 4)), (1, (64, 64), (1, 1))],
)
def test_the_grid_has_the_images_proportions(count, size, shape):
    assert grid_shape(count, size and Image.new("RGB", size)) == shape


def test_squares_are_drawn_row_by_row_over_the_image():
    weights = [[1.0, 0.0], [0.0, 1.0]] * 4
    view = routing_view(routing(["<IMG_CONTEXT>"] * 8, ["image"] * 8, weights), Image.new("RGB", (64, 32)))
    assert "repeat(4,1fr)" in view and "aspect-ratio:4/2" in view and "data:image/png;base64," in view
    found = re.findall(r'title="row (\d), column (\d): layer 2 (\d+)', view)
    assert found == [(str(i // 4 + 1), str(i % 4 + 1), "100" if i % 2 == 0 else "0") for i in range(8)]


def test_queries_are_counted_and_claim_no_place():
    view = routing_view(routing(["query 0", "query 1"], ["query"] * 2, [[1.0, 0.0], [0.0, 1.0]]))
    assert "own 2 drawing queries" in view and "routing-grid" not in view
