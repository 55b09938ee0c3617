"""The benchmarks of visual vocabularies: planted answers and planted codes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spar.common.errors import InputError
from spar.evaluation.benchmarks import BENCHMARKS, suits
from spar.evaluation.options import EvalOptions
from spar.evaluation.shapes_agreement import shapes_agreement
from spar.evaluation.shapes_codes import perplexity, shapes_codes, usage
from spar.evaluation.shapes_gen import gen_prompts
from spar.evaluation.shapes_zero_shot import LABELS, label_text, shapes_zero_shot
from spar.inference.dualtoken import DualTokenPipeline
from spar.inference.pipeline import SparPipeline
from spar.worlds.shapes.detector import detect
from spar.worlds.shapes.questions import questions
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import HELD_OUT_PAIRS

LABEL_TEXTS = [label_text(*pair) for pair in LABELS]


class Seeing:
    """Classifies by the detector, and is wrong about every n-th image when quantised."""

    def __init__(self, wrong_every=0):
        self.wrong_every, self.seen = wrong_every, 0

    def classify(self, image, labels, *, quantized=True):
        assert list(labels) == LABEL_TEXTS
        answers = []
        for one in image:
            (found,) = detect(np.asarray(one)).objects
            answer = LABELS.index((found.color, found.shape))
            if quantized:
                self.seen += 1
                if self.wrong_every and self.seen % self.wrong_every == 0:
                    answer = (answer + 1) % len(LABELS)
            answers.append(answer)
        return answers


@pytest.mark.parametrize("combinations", ["seen", "held_out"])
def test_a_classifier_that_sees_is_right_about_the_pairs_of_each_set(combinations):
    result = shapes_zero_shot(Seeing(), EvalOptions(limit=24, batch=7, combinations=combinations))
    assert {score.name: score.value for score in result.scores} == {
        "overall": 1.0, "part.unquantized": 1.0, "part.color": 1.0, "part.shape": 1.0
    }
    shown = {LABELS[LABEL_TEXTS.index(one["expected"])] for one in result.details["images"]}
    held_out = {tuple(pair) for pair in HELD_OUT_PAIRS}
    assert shown <= held_out if combinations == "held_out" else not shown & held_out


def test_errors_of_quantisation_show_beside_the_unquantised_score():
    result = shapes_zero_shot(Seeing(wrong_every=4), EvalOptions(limit=40, batch=10))
    assert result.score("overall").value == 0.75 and result.score("part.unquantized").value == 1.0
    assert result.score("part.color").value > 0.75  # the next label is often another shape of the same colour


def test_there_is_a_label_for_each_pair_of_colour_and_shape():
    assert len(set(LABEL_TEXTS)) == len(LABELS) == 48 and "a red circle" in LABEL_TEXTS


def test_usage_and_perplexity_are_their_definitions():
    codes = np.array([[0, 0, 1], [1, 3, 3]])
    assert usage(codes, 8) == 3 / 8
    assert perplexity(codes, 8) == pytest.approx(3 / 8)                         # three entries, used alike
    uneven = np.array([0, 0, 0, 1])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert perplexity(uneven, 4) == pytest.approx(math.exp(entropy) / 4)
    assert perplexity(np.arange(16), 16) == pytest.approx(1.0)


def test_each_depth_and_the_pooled_entries_are_scored():
    """Depth 1 uses entries 0 to 3, depth 2 entries 4 to 7: half of eight each, all of them pooled."""
    generator = np.random.default_rng(0)

    def encode(images):
        first = torch.from_numpy(generator.integers(0, 4, (len(images), 4, 4, 1)))
        codes = torch.cat([first, first + 4], dim=3)
        return SimpleNamespace(pixel=codes, semantic=codes[..., :1] * 0)

    pipe = SimpleNamespace(encode=encode, entries={"pixel": 8, "semantic": 8})
    result = shapes_codes(pipe, EvalOptions(limit=20, batch=6))
    value = {score.name: score.value for score in result.scores}
    assert value["pixel.usage.1"] == value["pixel.usage.2"] == 0.5 and value["pixel.usage.pooled"] == 1.0
    assert value["pixel.perplexity.1"] == pytest.approx(0.5, abs=0.02)
    assert value["semantic.usage.1"] == value["overall"] == 1 / 8


def test_each_benchmark_is_for_systems_that_define_its_task(tmp_path):
    own = {name for name in BENCHMARKS if suits(name, DualTokenPipeline.tasks)}
    spars = {name for name in BENCHMARKS if suits(name, SparPipeline.tasks)}
    assert set(BENCHMARKS) - own == {"shapes-edit", "shapes-edit-bind", "shapes-paraphrase"}
    assert set(BENCHMARKS) - spars == {"shapes-zero-shot", "shapes-codes", "shapes-agreement"}
    for benchmark in (shapes_zero_shot, shapes_codes, shapes_agreement):
        with pytest.raises(InputError, match="expected one of DualToken"):
            benchmark(object())


def test_a_model_can_be_scored(dual_run):
    pipe = DualTokenPipeline.from_pretrained(dual_run.path / "model", dtype=torch.float32, device="cpu")
    options = EvalOptions(limit=6, batch=4)
    codes, zero = shapes_codes(pipe, options), shapes_zero_shot(pipe, options)
    assert 0 < codes.score("overall").value <= 1 and 0 <= zero.score("overall").value <= 1
    assert 0 <= shapes_agreement(pipe, options).score("overall").value <= 1
    depths = {score.name for score in codes.scores}
    assert {"pixel.usage.1", "pixel.usage.2", "semantic.usage.pooled"} <= depths


class Drawing:
    """Draws the scene of each prompt, or of its neighbour where it is wrong; its codes are the scene's own number, by
    which it answers rightly about what it drew.
    """

    def __init__(self, wrong):
        self.prompts, self.wrong = gen_prompts(EvalOptions(limit=10)), wrong
        self.seeds, self.asked = [], []

    def check_text(self, text, what):
        if text == self.prompts[3].text:
            raise InputError("unknown words")

    def generate(self, prompt, *, seed):
        self.seeds += seed
        places = [[one.text for one in self.prompts].index(text) for text in prompt]
        places = [(place + 1) % len(self.prompts) if place in self.wrong else place for place in places]
        scenes = [self.prompts[place].scene for place in places]
        return SimpleNamespace(images=[Image.fromarray(render(scene)) for scene in scenes], codes=scenes)

    def understand_codes(self, codes, question):
        answers = []
        for scene, text in zip(codes, question, strict=True):
            self.asked.append(text)
            own = [one for seed in range(200) for one in questions(scene, np.random.default_rng(seed))]
            answers.append(next((one.answer for one in own if one.text == text), "nothing"))
        return SimpleNamespace(texts=answers)


def test_agreement_is_that_of_the_answers_about_the_drawn_codes_with_the_prompts():
    pipe = Drawing(wrong=())
    result = shapes_agreement(pipe, EvalOptions(limit=10, batch=7))
    wrong = 1 / 10 / 6                                                         # the refused prompt, of six tasks
    assert result.score("overall").value == pytest.approx(1 - wrong)
    assert result.score("part.drawn").value == pytest.approx(1 - 1 / 60)
    assert result.score("part.of_drawn").value == 1.0
    assert len(set(pipe.seeds)) == len(pipe.seeds) == 59
    asked = {one["task"]: one["question"] for one in result.details["prompts"]}
    assert asked["counting"].startswith("how many") and asked["colors"].startswith("what color")
    other = shapes_agreement(Drawing(wrong=(*range(10, 20), *range(50, 60))), EvalOptions(limit=10))
    assert other.score("two_object").value < 1 and other.score("color_attribution").value < 0.5
    assert other.score("counting").value == 1.0 and other.score("part.drawn").value < 0.75


def test_a_model_of_one_codebook_has_one_vocabulary_to_score():
    codes = torch.arange(16).view(1, 4, 4, 1)
    pipe = SimpleNamespace(
        entries={"semantic": 16},
        encode=lambda images: SimpleNamespace(semantic=codes.expand(len(images), 4, 4, 1)),
    )
    result = shapes_codes(pipe, EvalOptions(limit=2))
    assert {score.name.partition(".")[0] for score in result.scores} == {"overall", "semantic"}
    assert result.score("semantic.usage.1").value == 1.0
