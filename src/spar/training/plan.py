"""What a run would do, without doing it: the recipe built on no memory at all, and each stage's freezing applied.

A recipe whose sizes do not fit together is refused here, before a run's folder is made.
"""

from dataclasses import dataclass

import torch

from spar.checkpoints.lora import add_lora
from spar.common.errors import InputError
from spar.training.config import Recipe, StageConfig, freeze
from spar.training.modules import TrainingModules, init_weights
from spar.training.teacher import build_teacher

BYTES = 4  # float32


@dataclass(frozen=True)
class StageSummary:
    """One stage: its settings, trainable and frozen parameters, and the bytes of its weights and optimizer state.

    `bytes` counts every weight, and for those that train the gradient, two moments and the average; activations,
    which depend on the batch, are not counted.
    """

    stage: StageConfig
    trainable: int
    frozen: int
    bytes: int


def plan(recipe: Recipe, stages: tuple[str, ...] = ()) -> list[StageSummary]:
    """The stages that a run would train, in order; all when `stages` is empty.

    Raises:
        InputError: an unknown stage, a pattern without a parameter, sizes that do not fit, or an external teacher
            that cannot be loaded.
    """
    chosen = tuple(recipe.stage(name) for name in stages) or recipe.stages
    teacher = build_teacher(recipe.alignment)
    try:
        with torch.device("meta"):
            modules = TrainingModules(recipe, teacher_width=teacher.width() if teacher else None)
            init_weights(modules)
            if recipe.lora.rank:
                add_lora(modules.model, recipe.lora)
            tokenizer = modules.model.tokenizer
            for side in {recipe.model.image_size, *(stage.image_size or recipe.model.image_size for stage in chosen)}:
                tokenizer.decode(tokenizer.encode(torch.zeros(1, 3, side, side)).z_f)
    except InputError:
        raise
    except Exception as error:  # whatever class of the libraries refuses its sizes, and however
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"recipe {recipe.name}: its sizes do not fit together: {reason}") from error
    return [_plan_stage(modules, stage) for stage in chosen]


def _plan_stage(modules: TrainingModules, stage: StageConfig) -> StageSummary:
    freeze(modules, stage)
    sizes = {True: 0, False: 0}
    for parameter in modules.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    copies = 4 if stage.ema else 3
    return StageSummary(stage, sizes[True], sizes[False], BYTES * (sizes[False] + (1 + copies) * sizes[True]))
