"""What is outside of the world is said, and nothing inside of it is."""

import numpy as np
import pytest

from spar.worlds.shapes.captions import (
    caption,
    divided_caption,
    layout,
    open_caption,
    position_caption,
    related_caption,
)
from spar.worlds.shapes.detector import degrade_image
from spar.worlds.shapes.edits import BY_ANYTHING, edit_kinds, make_edit
from spar.worlds.shapes.forms import paraphrase
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import ALL_KINDS, make_scene, pick
from spar.worlds.shapes.scope import image_notes, is_of_this_world, prompt_notes
from spar.worlds.shapes.tokenizer import VOCABULARY

SCENES = [make_scene(seed, kind=kind, combinations="any") for seed in range(60) for kind in ALL_KINDS]


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("a circle, a star, a ring, a cross and a square", "5 objects are asked for; .* up to 4"),
        ("three red stars and two small blue rings on a gray background", "5 objects"),
        ("4 dots and a box", "5 objects"),
        ("five stars", "5 objects"),
        ("eight small red circles.", "8 objects"),
        ("some stars and four circles", "6 objects"),
        ("the circle, the star, the ring, the cross and the square", "5 objects"),
        ("make the circle white.", "no object .* is white"),
        ("can you make the circle white, please?", "no object .* is white"),
        ("the star at the top should be white", "no object .* is white"),
        ("change the star to white", "no object .* is white"),
        ("turn the star into a white one", "no object .* is white"),
        ("a navy large star", "no object .* is navy"),
        ("something white", "no object .* is white"),
        ("draw a circle that is white", "no object .* is white"),
        ("two circles that are grey on a gray background", "no object .* is gray"),
        ("two circles, one red and one gray", "no object .* is gray"),
        ("two stars: one large navy, one red on a gray background", "no object .* is navy"),
        ("the background should be red!", "no background .* is red"),
        ("a white circle", "no object .* is white; their colours are red"),
        ("Two grey discs!", "no object .* is gray"),
        ("make the red circle navy", "no object .* is navy"),
        ("a circle on a red background", "no background .* is red; they are gray"),
        ("change the background to violet", "no background .* is purple"),
        ("a circle on green", "no background .* is green"),
        ("a red blue circle", "red and blue are both said of one circle"),
        ("a green thing that is yellow", "green and yellow are both said of one object"),
        ("a small star that is huge", "small and large are both said of one star"),
        ("make the star that is red white", "no object .* is white"),
        ("Two 3 stars", "two and three are both said of one star"),
        ("a tiny large violet box", "small and large are both said of one square"),
        ("no stars", "was not taught to leave things out .'no'.: it draws what is named"),
        ("zero circles", "was not taught to leave things out .'zero'."),
        ("a red or blue star", "was not taught to choose .'or'."),
        ("a star above a ring below a cross", "2 relations are asked for; the model has seen one"),
        ("a white gray background", "white and gray are both said of one background"),
        ("a star on a white background on a black background", "an image has one background"),
        ("???", "no object and no background is named"),
        ("large", "no object and no background is named"),
    ],
)
def test_what_no_scene_has_is_said(text, note):
    import re

    (found,) = prompt_notes(text)
    assert re.search(note, found)


@pytest.mark.parametrize("test", [False, True])
def test_nothing_is_said_of_what_the_world_has(test):
    rng = np.random.default_rng(0)
    for scene in SCENES:
        kind = pick(rng, [kind for kind in edit_kinds(scene, "any", BY_ANYTHING) if kind != "add"])
        edit = make_edit(scene, rng, kind, "any", BY_ANYTHING).instruction
        placed = (position_caption(scene, rng), layout(scene, range(len(scene.objects))))
        taught = [text for text in (related_caption(scene, rng), divided_caption(scene, rng)) if text]
        for text in (caption(scene, rng), open_caption(scene, rng), edit, *placed, *taught):
            assert prompt_notes(text) == []
            said = paraphrase(text, rng, test=test)
            assert prompt_notes(said) == [], said
    assert prompt_notes("two stars, one small and one large on one gray background") == []


def test_scenes_pass_also_as_a_decoder_draws_them_and_other_images_do_not():
    rng = np.random.default_rng(1)
    for scene in SCENES[::3]:
        assert image_notes(render(scene), (64, 64)) == []
        assert image_notes(degrade_image(render(scene), rng), (64, 64)) == []
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    for strange in (noise, ramp, np.zeros((64, 64, 3), np.uint8)):
        (note,) = image_notes(strange, (640, 480))
        assert "outside the model's world" in note and "resized from 640 x 480 pixels" in note
    assert "resized" not in image_notes(noise, (64, 64))[0] and "cut" not in image_notes(noise, (128, 128))[0]
    assert prompt_notes("make the star on the white background red") == []
    assert prompt_notes("change the gray background to a navy background") == []


def test_a_vocabulary_says_its_world():
    assert is_of_this_world(VOCABULARY) and is_of_this_world(VOCABULARY[:77])
    assert not is_of_this_world(["a", "red", "circle"])
