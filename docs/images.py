"""Write the images of the README with the bundled models: python docs/images.py [FOLDER], by default docs/images.

The models' images have 64 x 64 pixels; they are enlarged here without smoothing. Every one has seed 0. The
page's screenshots are written by docs/screenshots.py.
"""

import sys
from pathlib import Path

from PIL import Image

from spar import SparPipeline, load_pipeline
from spar.inference.base import Pipeline
from spar.ui.examples import PROMPTS_OF, scene_images

FOLDER = Path(__file__).parent / "images"
SEED, ENLARGED, GAP = 0, 4, 8
PROMPT = "a large red circle to the left of a large blue star"
INSTRUCTION = "change the background to navy"
COUNTED, QUESTION, ANSWER = "three large purple triangles", "how many triangles are there?", "three"
DUALTOKEN_PROMPTS = PROMPTS_OF["dualtoken"]


def enlarge(image: Image.Image) -> Image.Image:
    return image.resize((ENLARGED * image.width, ENLARGED * image.height), Image.Resampling.NEAREST)


def side_by_side(*images: Image.Image) -> Image.Image:
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    whole, left = Image.new("RGBA", (width, images[0].height)), 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width + GAP
    return whole


def make_images(pipe: SparPipeline, dualtoken: Pipeline) -> dict[str, Image.Image]:
    """The images by their file names.

    Raises:
        ValueError: the model answers QUESTION with something else than ANSWER.
    """
    first, counted = (pipe.generate(prompt, seed=SEED).images[0] for prompt in (PROMPT, COUNTED))
    edited = pipe.edit(first, INSTRUCTION, seed=SEED).images[0]
    answer = pipe.understand(counted, QUESTION).texts[0]
    if answer != ANSWER:
        raise ValueError(f"expected the answer {ANSWER!r}, got {answer!r}")
    original = scene_images()[1]  # rendered, not generated
    again = pipe.reconstruct(original).images[0]
    drawn = [dualtoken.generate(prompt, seed=SEED).images[0] for prompt in DUALTOKEN_PROMPTS]
    drawn += [original, dualtoken.reconstruct(original).images[0]]
    return {
        "generate.png": enlarge(first),
        "edit.png": side_by_side(enlarge(first), enlarge(edited)),
        "understand.png": enlarge(counted),
        "reconstruct.png": side_by_side(enlarge(original), enlarge(again)),
        "dualtoken.png": side_by_side(*map(enlarge, drawn)),
    }


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in make_images(SparPipeline.from_pretrained(), load_pipeline("dualtoken", dtype="float32")).items():
        image.save(folder / name, optimize=True)


if __name__ == "__main__":
    main()
