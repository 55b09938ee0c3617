"""Shapes-Probe: features in which the answer is planted, and features without it."""

import numpy as np
import pytest
import torch

from spar.evaluation.options import EvalOptions
from spar.evaluation.shapes_probe import shapes_probe
from spar.inference.pipeline import SparPipeline
from spar.worlds.shapes.dataset import dense_targets, scene_at
from spar.worlds.shapes.render import render


class Knowing:
    """Tokens whose features are their classes, in a random basis; or only their colours."""

    def __init__(self, *names):
        self.names, self.rng = names, np.random.default_rng(0)
        self.scenes = {render(scene).tobytes(): scene for scene in (scene_at("validation", i) for i in range(40))}
        self.basis = self.rng.normal(size=(32, 32))

    def token_features(self, images):
        rows = []
        for image in images:
            found = dense_targets(self.scenes[np.asarray(image).tobytes()])
            given = [np.eye(16)[found[name].reshape(-1)] for name in self.names]
            rows.append(np.pad(np.concatenate(given, 1), ((0, 0), (0, 32 - 16 * len(given)))) @ self.basis)
        return torch.from_numpy(np.stack(rows))


def test_a_linear_map_reads_what_is_there_and_nothing_else():
    result = shapes_probe(Knowing("shape", "color"), EvalOptions(limit=20, batch=7))
    assert [score.name for score in result.scores] == ["overall", "shape", "color"]
    assert result.score("overall").value == pytest.approx(1.0, abs=0.02) and result.score("overall").n == 20
    half = shapes_probe(Knowing("color"), EvalOptions(limit=20))
    assert half.score("color").value == pytest.approx(1.0, abs=0.02) and half.score("shape").value < 0.6
    assert half.details["scenes"][0]["right"] == [
        pytest.approx(np.mean([half.details["scenes"][0][name] for name in ("shape", "color")]))
    ]


def test_a_model_gives_the_features_that_its_llm_reads(tiny_run):
    pipe = SparPipeline.from_pretrained(tiny_run.path / "model", dtype=torch.float32, device="cpu")
    images = [render(scene_at("validation", index)) for index in range(3)]
    features = pipe.token_features(images)
    assert features.shape[:2] == (3, 64) and features.dtype == torch.float32
    result = shapes_probe(pipe, EvalOptions(limit=4))
    assert 0 <= result.score("overall").value <= 1
