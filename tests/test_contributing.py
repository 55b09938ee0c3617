"""The blocks of CONTRIBUTING.md: an objective, a source of data and a system of ten lines each train at tiny size."""

import ast
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spar.common.config import by_kind, from_dict, to_dict
from spar.data.batches import Images
from spar.recipes import OBJECTIVES, REGISTRY, SOURCES, SYSTEMS, recipe
from spar.training.config import Recipe, StageConfig
from spar.training.data import DataConfig, ImageData, TrainingData
from spar.training.estimate import HardwareConfig, estimate
from spar.training.objectives.base import Objective
from spar.training.plan import read_run, resolve
from spar.training.run_folder import read_recipe
from spar.training.trainer import train
from spar.worlds.shapes.tokenizer import build_tokenizer

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
GIVEN = {
    "dataclass": dataclass, "ClassVar": ClassVar, "np": np, "torch": torch, "nn": nn, "save_file": save_file,
    "Images": Images, "Recipe": Recipe, "DataConfig": DataConfig, "ImageData": ImageData, "TrainingData": TrainingData,
    "Objective": Objective, "build_tokenizer": build_tokenizer, "__name__": __name__,
}


@pytest.fixture(scope="module")
def names() -> dict:
    found = dict(GIVEN)
    for block in BLOCKS:
        exec(compile(block, "CONTRIBUTING.md", "exec"), found)  # the repository's own text
    return found


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_has_ten_lines(block):
    tree = ast.parse(block)
    docstrings = {node.body[0].lineno for node in tree.body if isinstance(node.body[0], ast.Expr)}
    lines = [line for number, line in enumerate(block.splitlines(), 1) if number not in docstrings]
    assert len([line for line in lines if not line.startswith("@")]) <= 10


def trained(chosen: Recipe, registry: dict, run: Path) -> list[float]:
    """The losses of a run of a recipe that its own file gives back, with a line more in each table."""
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(chosen))), complete=True, registry=registry) == chosen
    assert resolve(chosen, read_run(chosen, run)).stages[0].start.source == "random"
    (cost,) = estimate(chosen, HardwareConfig(gpus=1, sharded=False))
    assert cost.flops == 0 and cost.trainable > 0  # an objective need not say what it costs
    losses: list[float] = []
    assert train(chosen, run, report=lambda *line: losses.append(line[3]["loss"])) is not None
    assert read_recipe(run / "recipe.json", registry) == chosen
    return losses


def stage(objective: Objective, *trainable: str) -> StageConfig:
    return StageConfig("only", objective, trainable, steps=30, batch=4, warmup=1, lr=1e-2, max_grad_norm=100.0)


def test_an_objective_and_a_source_of_data_are_one_class_and_one_line_each(names, tmp_path):
    registry = {
        **REGISTRY, Objective: by_kind((*OBJECTIVES, names["SmoothObjective"])),
        DataConfig: by_kind((*SOURCES, names["StripesData"])),
    }  # fmt: skip
    only = stage(names["SmoothObjective"](price=0.5), "model.tokenizer.*_stream.*", "model.tokenizer.fusion.*")
    only = replace(only, batch=16)  # of four images, the loss says more of their brightness than of the step
    chosen = replace(recipe("tiny"), stages=(only,), data=names["StripesData"](), log_every=1)
    losses = trained(chosen, registry, tmp_path / "run")
    assert len(losses) == 30 and max(losses[-10:]) < losses[0]


def test_a_system_is_one_class_and_one_line(names, tmp_path):
    registry = {
        **REGISTRY, Recipe: by_kind((*SYSTEMS, names["PaletteRecipe"])),
        Objective: by_kind((*OBJECTIVES, names["ColorObjective"])),
        DataConfig: by_kind((*SOURCES, names["StripesData"])),
    }  # fmt: skip
    only = stage(names["ColorObjective"](), "model.*")
    chosen = names["PaletteRecipe"](name="palette", stages=(only,), data=names["StripesData"](), log_every=1)
    losses = trained(chosen, registry, tmp_path / "run")
    assert losses[-1] < losses[0] / 2
    assert load_file(tmp_path / "run" / "model.safetensors").keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_the_folders_of_the_table_exist():
    for cell in re.findall(r"^\| (`.*?`) \|", TEXT, re.M):
        for folder in re.findall(r"`([a-z]+)/`", cell):
            assert (Path(__file__).parents[1] / "src" / "spar" / folder).is_dir(), folder
