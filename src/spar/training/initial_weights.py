"""The weights that a stage starts from: random ones, the end of a stage, or a finished model's folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from spar.checkpoints.lora import is_lora_key, rename_for_lora
from spar.checkpoints.safetensors_io import TensorSource, check_fit
from spar.common.errors import InputError
from spar.common.generators import cpu_generator
from spar.training.checkpoint import GroupReader, copy_stored
from spar.training.config import Recipe, StageConfig, matches
from spar.training.distributed import DistributedContext
from spar.training.objectives.base import Networks
from spar.training.plan import is_model_folder
from spar.training.sharded_build import build_rows


def load_previous_weights(modules: nn.Module, folder: Path) -> None:
    """Load what a stage of this run has saved: its end, which may lack this recipe's LoRA, or its state."""
    own, stored = modules.state_dict(), GroupReader(folder, "modules")
    _load_named(own, stored, rename_for_lora(own, stored.shapes), folder)


def stored_modules(recipe: Recipe, folder: Path, networks: Networks) -> tuple[nn.Module, GroupReader]:
    """The modules that a stage of this run has saved: their buffers, on the CPU, and outlines of their parameters, on
    the meta device, which the reader has.
    """
    with _seeded(recipe.seed), init_empty_weights(include_buffers=False):
        modules = recipe.build(networks)
    own, stored = modules.state_dict(), GroupReader(folder, "modules")
    check_fit(own, stored.shapes, folder)
    copy_stored(own, stored, {key: None if value.is_meta else key for key, value in own.items()}, folder)
    return modules, stored


def random_modules(recipe: Recipe, device: torch.device | str, networks: Networks) -> nn.Module:
    """The modules of a recipe with weights drawn from its seed."""
    with _seeded(recipe.seed):
        modules = recipe.build(networks)
    return modules.to(device)


def random_rows(
    recipe: Recipe, parallel: DistributedContext, networks: Networks
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The same as outlines on the meta device, and this process's rows of each parameter: what `shard_modules` takes.

    No process holds them whole; buffers are there, on the CPU.
    """
    if len(networks):  # those that the build asks for are loaded before, or their weights would be taken for its own
        with torch.device("meta"):
            recipe.build(networks)
    with _seeded(recipe.seed):
        return build_rows(lambda: recipe.build(networks), parallel)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A context whose random numbers are those of a seed, and that leaves those after it as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(cpu_generator(seed).get_state())
        yield


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
    source: TensorSource = recipe.open_model(folder) if finished else GroupReader(folder, "modules")
    if any(map(is_lora_key, source.shapes)) and not any(map(is_lora_key, own)):
        raise InputError(f"{folder} holds LoRA beside the model: expected the run's merged model (RUN/model), got it")
    names = rename_for_lora(own, source.shapes)
    if finished:
        names = {**{key: None for key in own if not key.startswith("model.")}, **names}
    if not own.keys() & names.keys():
        raise InputError(f"{folder} holds none of this model's weights")
    given = _outlines(own, source, names)
    for key in own.keys() | given.keys():
        fits = key in own and key in given and own[key].shape == given[key].shape
        if matches(key, reinitialize) or (not fits and not matches(key, patterns)):
            names.pop(key, None)
            if key in own:
                names[key] = None
    _load_named(own, source, names, folder)


def _load_named(own: dict[str, Tensor], source: TensorSource, names: dict[str, str | None], folder: Path) -> None:
    """Load a module's tensors strictly, each from the stored one that `names` has for it; None keeps it."""
    check_fit(own, _outlines(own, source, names), folder)
    copy_stored(own, source, names, folder)


def _outlines(own: dict[str, Tensor], source: TensorSource, names: dict[str, str | None]) -> dict[str, Tensor]:
    """Shape and type of what `names` has for each name."""
    return {key: own[key] if name is None else source.shapes[name] for key, name in names.items()}
