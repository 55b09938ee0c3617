"""The weights that a stage starts from: the end of the stage before it, another run's, or a SPAR folder."""

import fnmatch
import logging
from pathlib import Path

from torch import Tensor, nn

from spar.checkpoints.lora import is_lora_key, rename_for_lora
from spar.checkpoints.safetensors_io import load_weights
from spar.checkpoints.spar_format import (
    has_pixel_encoder,
    has_teacher,
    load_model,
    load_pixel_encoder,
    load_teacher,
    read_config,
)
from spar.common.config import differences
from spar.common.errors import InputError
from spar.training.checkpoint import (
    load_group,
)
from spar.training.config import StageConfig
from spar.training.modules import TrainingModules
from spar.training.plan import is_spar_folder

log = logging.getLogger("spar.training")


def load_previous_weights(modules: TrainingModules, folder: Path) -> None:
    """Load the end of the stage before this one."""
    load_weights(modules, rename_for_lora(modules.state_dict(), load_group(folder, "modules")), str(folder))


def read_initial_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a stage's end, or of a SPAR folder under the training modules' names."""
    if not is_spar_folder(folder):
        return load_group(folder, "modules")
    parts: dict[str, nn.Module] = {"model": load_model(folder).model}
    if has_pixel_encoder(folder):
        parts["pixel_encoder"] = load_pixel_encoder(folder)
    if has_teacher(folder):
        parts["teacher"] = load_teacher(folder)
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def load_initial_weights(
    modules: TrainingModules,
    folder: Path,
    stage: StageConfig,
    order: tuple[StageConfig, ...],
    published: tuple[str, ...] = (),
) -> None:
    """Start a stage from another run's stage, or from a SPAR folder, which holds no teachers and no heads.

    What the stages before this one train must fit exactly, and so must `published` parts and what of the model no stage
    trains. What else none has touched may differ in design (another router, another teacher's width) and then keeps its
    fresh random weights: so one tokenizer serves every ablation.
    Where a SPAR folder's configuration differs from the recipe's, a warning says so: not every field shows in weights.
    """
    if is_spar_folder(folder):
        for name, given, own in differences(read_config(folder), modules.config, "model"):
            log.warning("%s was made with %s %r; this recipe has %r", folder, name, given, own)
    earlier = order[: [s.name for s in order].index(stage.name)]
    patterns = [pattern for before in earlier for pattern in before.trainable] + [f"{part}.*" for part in published]
    trained = [pattern for one in order for pattern in one.trainable]
    own = modules.state_dict()
    patterns += [
        key for key in own
        if key.startswith("model.") and not is_lora_key(key) and not any(fnmatch.fnmatchcase(key, p) for p in trained)
    ]  # fmt: skip
    given = read_initial_weights(folder)
    if any(map(is_lora_key, given)) and not any(map(is_lora_key, own)):
        raise InputError(f"{folder} holds LoRA beside the model: expected the run's merged model (RUN/model), got it")
    given = rename_for_lora(own, given)
    if is_spar_folder(folder):
        given = {**{key: value for key, value in own.items() if not key.startswith("model.")}, **given}
    if not own.keys() & given.keys():
        raise InputError(f"{folder} holds none of this model's weights")
    for key in own.keys() | given.keys():
        fits = key in own and key in given and own[key].shape == given[key].shape
        if not fits and not any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns):
            given.pop(key, None)
            if key in own:
                given[key] = own[key]
    load_weights(modules, given, str(folder))
