"""A model as it is at the end of a stage of a run, of either system."""

from pathlib import Path
from typing import Any

import torch

from spar.checkpoints.lora import merge_lora
from spar.common.config import Registry
from spar.training.checkpoint import GroupReader, load_stored
from spar.training.run_folder import find_text_tokenizer, read_recipe
from spar.training.systems.lora import LoraRecipe


def load_stage_model(run: Path, registry: Registry, stage: str | None = None) -> Any:
    """The model at the end of a stage, by default the recipe's last: a `ModelBundle` or a `DualTokenBundle`.

    Args:
        registry: the kinds that the run's recipe may name (`spar.recipes.REGISTRY`).

    Raises:
        InputError: a folder that is no run, or a stage that has not ended.
    """
    recipe = read_recipe(run / "recipe.json", registry)
    last = stage or recipe.stages[-1].name
    folder = run / recipe.stage(last).name / "done"
    prompts = recipe.prompts(find_text_tokenizer(recipe, run, None))
    saved = GroupReader(folder, "modules")
    with torch.random.fork_rng(devices=[]):
        modules = recipe.build(recipe.stand_ins(saved.shapes))
    load_stored(modules, saved, folder)
    if isinstance(recipe, LoraRecipe) and recipe.lora.rank:
        merge_lora(modules.get_submodule("model"))
    return recipe.bundle(modules, run, prompts, last)
