"""Fake pipes: one that knows every truth, one that is wrong at a planted rate, one that shows plain gray."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from spar.common.errors import InputError
from spar.evaluation.shapes_chat import chat_items
from spar.evaluation.shapes_edit import edit_items
from spar.evaluation.shapes_gen import gen_prompts
from spar.evaluation.shapes_paraphrase import reword
from spar.evaluation.shapes_vqa import vqa_items
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import Object, Scene

OTHER = Scene("gray", (Object("ring", "pink", "small", 20.0, 44.0),), "single")


class Oracle:
    """Answers everything rightly, but for a planted share of errors; remembers how it was called."""

    image_size = 64

    def __init__(self, options, error=0.0):
        self.error, self.calls, self.rng, self.refused = error, [], np.random.default_rng(5), set()
        prompts = [*gen_prompts(options), *gen_prompts(options, "shapes-gen-bind")]
        edits = [*edit_items(options), *edit_items(options, "shapes-edit-bind")]
        asked = [*vqa_items(options), *vqa_items(options, "shapes-vqa-bind")]
        self.scenes = {prompt.text: prompt.scene for prompt in prompts}
        self.targets = {(item.image.tobytes(), item.edit.instruction): item.edit.target for item in edits}
        self.answers = {(item.image.tobytes(), item.question.text): item.question.answer for item in asked}
        for item in chat_items(options):
            self.answers |= {(item.image.tobytes(), question.text): question.answer for question in item.questions}
        self._know_test_forms(options)

    def _know_test_forms(self, options):
        """What Shapes-Paraphrase asks, by the same places in its lists."""
        few = [replace(options, limit=options.limit or count) for count in (25, 30, 25)]
        prompts, edits, asked = gen_prompts(few[0]), edit_items(few[1]), vqa_items(few[2])
        for item, text in zip(prompts, reword([one.text for one in prompts], options.combinations), strict=True):
            self.scenes[text] = item.scene
        told = reword([one.edit.instruction for one in edits], options.combinations)
        for item, text in zip(edits, told, strict=True):
            self.targets[item.image.tobytes(), text] = item.edit.target
        for item, text in zip(asked, reword([one.question.text for one in asked], options.combinations), strict=True):
            self.answers[item.image.tobytes(), text] = item.question.answer

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

    def chat(self, messages):
        first, last = messages[0]["content"], messages[-1]["content"]
        answer = self.answers[first[0]["image"].tobytes(), last[-1]["text"]]
        return iter(["nothing" if self.fails() else answer])

    def check_text(self, text, what):
        if text in self.refused:
            raise InputError(f"{what}: unknown words")

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

    def chat(self, messages):
        return iter(["gray"])

    def check_text(self, text, what):
        pass


@pytest.fixture
def oracle():
    return Oracle


@pytest.fixture
def gray():
    return Gray()
