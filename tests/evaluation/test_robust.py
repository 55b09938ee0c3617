"""Shapes-Robust: the fixed prompts, and what planted drawings, refusals and errors are worth."""

from collections import Counter
from types import SimpleNamespace

import pytest
from PIL import Image

from spar.common.errors import InputError
from spar.evaluation.compare import compare
from spar.evaluation.options import EvalOptions
from spar.evaluation.results import read_result, write_result
from spar.evaluation.shapes_robust import KINDS, MEANT, robust_prompts, shapes_robust
from spar.inference.loading import load_pipeline
from spar.worlds.shapes.captions import parse
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import Object, Scene

MEANING = "a large red circle"
PICTURE = Image.fromarray(render(Scene("gray", (Object("circle", "red", "large", 32.0, 32.0),), "single")))


class Stranger:
    """Draws one picture whatever it is asked; refuses some texts and fails at others, alone or among others."""

    def __init__(self, refused=(), broken=()):
        self.refused, self.broken, self.calls = {*refused}, {*broken}, []

    def check_text(self, text, what):
        if text in self.refused:
            raise InputError(f"{what}: unknown words lareg (perhaps large); this model knows only large, red, circle")

    def generate(self, prompt, *, seed, num_images_per_prompt=1, **keywords):
        self.calls.append((list(prompt), list(seed), keywords))
        if self.broken & {*prompt}:
            raise IndexError("list index out of range")
        return SimpleNamespace(images=[PICTURE] * len(prompt))


def test_the_set_is_fixed_and_its_meanings_are_captions():
    prompts = robust_prompts()
    assert Counter(prompt.kind for prompt in prompts) == dict.fromkeys(KINDS, 60)
    assert len({(prompt.kind, prompt.text) for prompt in prompts}) == 300
    assert {prompt.kind for prompt in prompts if prompt.means} == {*MEANT}
    for prompt in prompts:
        if prompt.kind in MEANT:
            parse(prompt.means)
        if prompt.kind == "misspelt":
            assert prompt.text != prompt.means
    assert max(len(prompt.text) for prompt in prompts) == 20000 and "\ud800" in {prompt.text for prompt in prompts}
    assert [one.text for one in robust_prompts(2)[:2]] == [one.text for one in prompts[:2]]


def test_drawings_refusals_and_errors_are_told_apart(tmp_path):
    prompts = robust_prompts()
    meant = [prompt for prompt in prompts if prompt.means == MEANING]
    misspelt = [prompt for prompt in meant if prompt.kind == "misspelt"]
    refused, broken = misspelt[0], next(prompt for prompt in prompts if prompt.kind == "hostile")
    pipe = Stranger([refused.text], [broken.text])
    result = shapes_robust(pipe, EvalOptions(batch=7, num_inference_steps=3))
    for kind in MEANT:
        right = sum(prompt.kind == kind for prompt in meant) - (kind == "misspelt")
        assert result.score(kind).value == pytest.approx(right / 60)
    assert result.score("part.handled").value == pytest.approx(299 / 300)
    assert result.score("part.misspelt_refused").value == pytest.approx(1 / 60)
    assert result.score("part.hostile_refused").value == 0
    assert result.score("part.wrong").value == pytest.approx((180 - len(meant)) / 180)
    assert 0.3 < result.score("part.noted").value < 1
    assert result.score("part.named").value == ("large" not in refused.text.split())
    assert all(call[2] == {"num_inference_steps": 3} for call in pipe.calls)
    write_result(tmp_path / "robust.json", result)
    found = read_result(tmp_path / "robust.json")
    outcomes = [one["outcome"] for rows in found.details.values() for one in rows]
    assert Counter(outcomes)["failed"] == 1 and Counter(outcomes)["refused"] == 1
    (failed,) = [one for one in found.details["others"] if one["outcome"] == "failed"]
    assert failed["said"] == "IndexError: list index out of range"
    assert {one.score for one in compare(found, found)} >= {"overall", *MEANT}


def test_a_prompt_has_its_seed_in_any_batch():
    seeds = []
    for batch in (64, 7):
        pipe = Stranger()
        shapes_robust(pipe, EvalOptions(limit=3, batch=batch))
        seeds.append({text: seed for texts, own, _ in pipe.calls for text, seed in zip(texts, own, strict=True)})
    assert seeds[0] == seeds[1] and len(set(seeds[0].values())) == 15


@pytest.mark.parametrize("name", ["spar", "dualtoken"])
def test_the_bundled_models_end_every_prompt_in_an_image_or_in_words(name):
    """Of the checks alone, which take no time: what they let through is drawn by docs/results."""
    pipe = load_pipeline(name)
    for prompt in robust_prompts():
        try:
            pipe.check_text(prompt.text, "prompt")
        except InputError as error:
            assert str(error).startswith("prompt"), error


def test_a_setting_that_is_refused_ends_the_run_and_is_no_refusal_of_prompts():
    class Refusing(Stranger):
        def generate(self, prompt, **keywords):
            raise InputError("num_inference_steps: expected 8, got 20")

    with pytest.raises(InputError, match="num_inference_steps"):
        shapes_robust(Refusing(), EvalOptions(limit=1))
