"""Shapes-Fréchet: the jackknife against its definition, the world against itself, drawings that are all alike."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from spar.common.errors import InputError
from spar.evaluation import shapes_frechet as module
from spar.evaluation.frechet import FeatureSums, gaussian_distance
from spar.evaluation.options import EvalOptions
from spar.evaluation.shapes_frechet import pseudo_values, shapes_frechet
from spar.evaluation.shapes_loss import loss_scenes
from spar.worlds.shapes.render import render


class Drawing:
    """Draws what a function makes of the scene that a caption describes."""

    def __init__(self, picture, refused=()):
        self.picture, self.refused, self.seeds = picture, refused, []
        self.scenes = {text: scene for scene, text in loss_scenes(120)}

    def check_text(self, text, what):
        if text in self.refused:
            raise InputError("unknown")

    def generate(self, prompt, *, seed):
        self.seeds += seed
        return SimpleNamespace(images=[Image.fromarray(self.picture(self.scenes[text])) for text in prompt])


def test_pseudo_values_are_the_jackknifes():
    rng = np.random.default_rng(0)
    features, world = rng.normal(size=(9, 3)), rng.normal(size=(50, 3))
    mean, covariance = world.mean(0), np.cov(world.T)

    def distance(rows):
        return gaussian_distance(rows.mean(0), np.cov(rows.T), mean, covariance)

    wanted = [9 * distance(features) - 8 * distance(np.delete(features, i, 0)) for i in range(9)]
    np.testing.assert_allclose(pseudo_values(features, FeatureSums.of(world)), wanted, atol=1e-9)


def test_their_mean_has_lost_the_bias_of_few_images():
    """Sets of one and the same distribution, of which the plain distance is far above 0."""
    rng = np.random.default_rng(1)
    world = FeatureSums.of(rng.normal(size=(20_000, 8)))
    plain, corrected = [], []
    for _ in range(30):
        rows = rng.normal(size=(40, 8))
        plain.append(gaussian_distance(*FeatureSums.of(rows).gaussian(), *world.gaussian()))
        corrected.append(pseudo_values(rows, world).mean())
    assert np.mean(plain) > 0.3 and abs(np.mean(corrected)) < 0.15 * np.mean(plain)


def test_the_worlds_own_images_are_near_and_others_far(monkeypatch):
    monkeypatch.setattr(module, "REFERENCES", 300)
    options = EvalOptions(limit=100, batch=30)
    pipe = Drawing(render)
    own = shapes_frechet(pipe, options).score("overall")
    assert own.low < 0.1 and own.n == 100 and len(set(pipe.seeds)) == 100
    noise = np.random.default_rng(0)
    for picture in (
        lambda scene: render(scene) // 2 + noise.integers(0, 99, (64, 64, 3), "u1"),
        lambda scene: np.full((64, 64, 3), 200, np.uint8),
    ):
        assert shapes_frechet(Drawing(picture), options).score("overall").low > own.high


def test_it_is_paired_by_prompt_and_refused_captions_are_left_out(monkeypatch):
    monkeypatch.setattr(module, "REFERENCES", 50)
    texts = [text for _, text in loss_scenes(6)]
    result = shapes_frechet(Drawing(render, texts[:1]), EvalOptions(limit=6))
    assert [record["prompt"] for record in result.details["scenes"]] == texts[1:]
    with pytest.raises(InputError, match="expected at least 3 captions that the model takes, got 2"):
        shapes_frechet(Drawing(render, texts[:4]), EvalOptions(limit=6))
