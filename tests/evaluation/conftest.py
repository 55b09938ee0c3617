"""Fake pipes: one that knows every truth, one that is wrong at a planted rate, one that shows plain gray."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from spar.evaluation.shapes_edit import edit_items
from spar.evaluation.shapes_gen import gen_prompts
from spar.evaluation.shapes_vqa import vqa_items
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import Object, Scene

OTHER = Scene("gray", (Object("ring", "pink", "small", 20.0, 44.0),), "single")


class Oracle:
    """Answers everything rightly, but for a planted share of errors; remembers how it was called."""

    image_size = 64

    def __init__(self, options, error=0.0):
        self.error, self.calls, self.rng = error, [], np.random.default_rng(5)
        self.scenes = {prompt.text: prompt.scene for prompt in gen_prompts(options)}
        self.targets = {
            (item.image.tobytes(), item.edit.instruction): item.edit.target for item in edit_items(options)
        }
        self.answers = {
            (item.image.tobytes(), item.question.text): item.question.answer for item in vqa_items(options)
        }

    def fails(self):
        return self.rng.random() < self.error

    def picture(self, scene):
        return Image.fromarray(render(OTHER if self.fails() else scene))

    def generate(self, prompt, *, seed, num_images_per_prompt=1, **keywords):
        self.calls.append(("generate", list(prompt), list(seed), keywords))
        return SimpleNamespace(images=[self.picture(self.scenes[text]) for text in prompt])

    def edit(self, image, instruction, *, seed, **keywords):
        self.calls.append(("edit", list(instruction), list(seed), keywords))
        targets = [self.targets[one.tobytes(), text] for one, text in zip(image, instruction, strict=True)]
        return SimpleNamespace(images=[self.picture(target) for target in targets])

    def understand(self, image, question):
        found = [self.answers.get((one.tobytes(), text), "") for one, text in zip(image, question, strict=True)]
        return SimpleNamespace(texts=["nothing" if self.fails() else answer for answer in found])

    def reconstruct(self, image):
        return SimpleNamespace(images=[Image.fromarray(render(OTHER)) if self.fails() else one for one in image])


class Gray:
    """Shows gray and says gray, whatever it is asked."""

    image_size = 64

    def blank(self, count):
        return SimpleNamespace(images=[Image.new("RGB", (64, 64), (128, 128, 128))] * count)

    def generate(self, prompt, **keywords):
        return self.blank(len(prompt))

    def edit(self, image, instruction, **keywords):
        return self.blank(len(image))

    def reconstruct(self, image):
        return self.blank(len(image))

    def understand(self, image, question):
        return SimpleNamespace(texts=["gray"] * len(image))


@pytest.fixture
def oracle():
    return Oracle


@pytest.fixture
def gray():
    return Gray()
