"""The page's texts on the shapes world, and examples that the bundled models get right (a test runs the detector)."""

from PIL import Image

from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, Object, Scene
from spar.worlds.shapes.tokenizer import NUMBERS, PLURALS

SEED = 0
PROMPTS = (
    "a large red circle to the left of a large blue star",
    "two large yellow stars on a black background",
    "three large purple triangles",
    "a large purple ring and a small orange cross",
    "a large pink circle above a small cyan square",
    "a small yellow triangle on a navy background",
)
# Of a bundled model that draws other prompts wrongly, those that it draws rightly; by its name.
PROMPTS_OF = {
    "dualtoken": (
        "a large red circle to the left of a large blue star", "two large yellow stars on a black background",
        "a large purple ring and a small orange cross",
    ),
}  # fmt: skip
SCENES = (
    Scene("gray", (Object("circle", "red", "large", 19, 34), Object("star", "blue", "large", 45, 28)), "two"),
    Scene(
        "navy",
        (
            Object("square", "green", "large", 18, 20), Object("triangle", "yellow", "small", 46, 18),
            Object("ring", "orange", "large", 40, 46),
        ),
        "multi",
    ),
    Scene("beige", tuple(Object("star", "purple", "small", x, y) for x, y in ((16, 20), (46, 16), (34, 46))), "count"),
)  # fmt: skip
# (index of the scene, text)
EDITS = (
    (0, "change the background to navy"),
    (0, "make the red circle green"),
    (0, "remove the blue star"),
    (0, "replace the blue star with a yellow triangle"),
    (1, "recolor the green square to pink"),
    (1, "add a small red circle"),
)
QUESTIONS = (
    (0, "what color is the circle?"),
    (0, "is the red circle to the left of the blue star?"),
    (1, "what shape is the yellow object?"),
    (1, "is there a green square?"),
    (1, "describe the image"),
    (2, "how many stars are there?"),
)
VOCABULARY_GROUPS = {
    "Shapes": [PLURALS[shape] for shape in SHAPES],
    "Colors": list(COLORS),
    "Sizes": list(SIZES),
    "Backgrounds": list(BACKGROUNDS),
    "How many": list(NUMBERS[1:]),
    "Where": list(RELATIONS.values()),
    "Changes": ["recolor", "remove", "add", "replace", "change the background"],
    "Questions": ["what color", "what shape", "how many", "is there", "is ... above ...", "describe the image"],
}


def scene_images() -> list[Image.Image]:
    """Render SCENES."""
    return [Image.fromarray(render(scene)) for scene in SCENES]
