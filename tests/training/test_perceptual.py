"""The networks of L_perc: each by its weight, asked for before the first step, refused with what to choose instead."""

import sys
from dataclasses import replace

import pytest
import torch
from transformers import ConvNextConfig, ConvNextForImageClassification

from spar.common.errors import InputError
from spar.losses.perceptual import FeatureLoss
from spar.recipes import recipe
from spar.training.objectives import tokenizer
from spar.training.systems.spar import PerceptualConfig
from spar.training.teacher import perceptual_networks
from spar.training.trainer import train


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    """A tiny ConvNeXt with random weights, in transformers' own format."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("convnext")
    config = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_labels=5)
    ConvNextForImageClassification(config).save_pretrained(folder)
    return str(folder)


def test_the_term_is_the_weighted_sum_of_what_the_networks_see(start, classifier):
    ctx = start("tokenizer-2").ctx
    pictures = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    own = FeatureLoss(ctx.modules.pixel_encoder.features)(*pictures)
    config = PerceptualConfig(autoencoder=2.0, convnext=0.5, classifier=classifier)
    (name, load), = perceptual_networks(config).items()
    assert name == "convnext"
    network = load()
    ctx = replace(ctx, recipe=replace(ctx.recipe, perceptual=config), networks={name: network})
    wanted = float(2 * own + 0.5 * network(*pictures))
    assert float(tokenizer._perceptual(ctx, *pictures)) == pytest.approx(wanted, rel=1e-5)
    ctx = replace(ctx, recipe=replace(ctx.recipe, perceptual=replace(config, autoencoder=0.0)))
    assert float(tokenizer._perceptual(ctx, *pictures)) == pytest.approx(0.5 * float(network(*pictures)), rel=1e-5)


def test_a_tokenizer_stage_trains_with_convnext_in_place_of_the_autoencoder(tiny_run, classifier, tmp_path):
    config = PerceptualConfig(autoencoder=0.0, convnext=1.0, classifier=classifier)
    reports = []
    train(
        replace(tiny_run.recipe, perceptual=config), tmp_path / "run", stages=("tokenizer-1",),
        init_from=tiny_run.path / "autoencoder" / "done", report=lambda *line: reports.append(line[3]),
    )  # fmt: skip
    plain = [line[3] for line in tiny_run.reports if line[0] == "tokenizer-1"]
    assert len(reports) == 3 and reports[0]["mse"] == plain[0]["mse"]
    assert reports[0]["perceptual"] != pytest.approx(plain[0]["perceptual"], rel=1e-2)


def test_what_is_missing_is_said_before_anything_is_written(tiny_run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)
    stages = {"stages": ("tokenizer-1",), "init_from": tiny_run.path / "autoencoder" / "done"}
    for config, said in (
        (PerceptualConfig(lpips=1.0), "LPIPS is expected from the optional packages"),
        (PerceptualConfig(convnext=1.0, classifier=str(tmp_path)), "a ConvNeXt classifier in transformers' format"),
    ):
        with pytest.raises(InputError, match=f"(?s){said}.*or choose the run's own features.*--perceptual.lpips 0"):
            train(replace(tiny_run.recipe, perceptual=config), tmp_path / "run", **stages)
        assert not (tmp_path / "run").exists()
    wanting = replace(tiny_run.recipe, perceptual=PerceptualConfig(lpips=1.0))  # no matter to a stage without the term
    assert train(wanting, tmp_path / "run", stages=("unified-3",), init_from=tiny_run.path / "model") is not None


def test_the_published_recipe_has_the_papers_networks_and_senseless_weights_are_refused():
    assert recipe("spar-1b").perceptual == PerceptualConfig(autoencoder=0.0, lpips=1.0, convnext=0.1)
    for wrong in ({"autoencoder": 0.0}, {"lpips": -1.0}, {"convnext": float("nan")}):
        with pytest.raises(InputError, match="perceptual: expected weights of at least 0"):
            PerceptualConfig(**wrong)
