"""The weights that a stage starts from: random ones, the end of a stage, or a finished model's folder."""

from pathlib import Path

import torch
from torch import nn

from spar.checkpoints.lora import is_lora_key, rename_for_lora
from spar.checkpoints.safetensors_io import load_weights
from spar.common.errors import InputError
from spar.common.generators import cpu_generator
from spar.training.checkpoint import load_group
from spar.training.config import Recipe, StageConfig, matches
from spar.training.objectives.base import Networks
from spar.training.plan import is_model_folder


def load_previous_weights(modules: nn.Module, folder: Path) -> None:
    """Load what a stage of this run has saved: its end, which may lack this recipe's LoRA, or its state."""
    load_weights(modules, rename_for_lora(modules.state_dict(), load_group(folder, "modules")), str(folder))


def random_modules(recipe: Recipe, device: torch.device | str, networks: Networks) -> nn.Module:
    """The modules of a recipe with weights drawn from its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(cpu_generator(recipe.seed).get_state())
        modules = recipe.build(networks)
    return modules.to(device)


def load_initial_weights(
    modules: nn.Module, folder: Path, stage: StageConfig, recipe: Recipe, reinitialize: tuple[str, ...] = ()
) -> None:
    """Start a stage from another run's stage, or from a finished model's folder, which holds no heads.

    What the stages before this one train must fit exactly, and so must published parts, what of the model no stage
    trains, and all of it where the stage goes on from a whole model. What else none has touched may differ in design
    (another router, another teacher's width) and then keeps its fresh random weights: so one tokenizer serves every
    ablation.
    What `reinitialize` means keeps them too.
    Where the model's configuration differs from the recipe's, a warning says so: not every field shows in weights.
    """
    finished, earlier = is_model_folder(folder), recipe.stages[: recipe.stages.index(stage)]
    patterns = [pattern for before in earlier for pattern in before.trainable]
    patterns += [f"{part}.*" for part in recipe.published] + ["model.*"] * stage.objective.continues
    trained = [pattern for one in recipe.stages for pattern in one.trainable]
    own = modules.state_dict()
    patterns += [k for k in own if k.startswith("model.") and not is_lora_key(k) and not matches(k, trained)]
    given = recipe.load_model(folder) if finished else load_group(folder, "modules")
    if any(map(is_lora_key, given)) and not any(map(is_lora_key, own)):
        raise InputError(f"{folder} holds LoRA beside the model: expected the run's merged model (RUN/model), got it")
    given = rename_for_lora(own, given)
    if finished:
        given = {**{key: value for key, value in own.items() if not key.startswith("model.")}, **given}
    if not own.keys() & given.keys():
        raise InputError(f"{folder} holds none of this model's weights")
    for key in own.keys() | given.keys():
        fits = key in own and key in given and own[key].shape == given[key].shape
        if matches(key, reinitialize) or (not fits and not matches(key, patterns)):
            given.pop(key, None)
            if key in own:
                given[key] = own[key]
    load_weights(modules, given, str(folder))
