"""LoRA in a recipe: which stages may have it, what trains, and what a run writes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from spar.checkpoints.lora import LORA_PREFIX, LoraConfig, merge_lora
from spar.checkpoints.lora_files import save_adapter
from spar.common.errors import InputError
from spar.training.config import Recipe, StageConfig
from spar.training.objectives.base import Objective


@dataclass(frozen=True, kw_only=True)
class LoraRecipe(Recipe):
    """A recipe whose `lora` adds to networks that are trained already.

    The first stage with the objective `adapted` trains them, so only later stages of that kind may have LoRA;
    `adapted_stages` names that kind in messages.
    """

    adapted: ClassVar[type[Objective]]
    adapted_stages: ClassVar[str]

    lora: LoraConfig = field(default_factory=LoraConfig)

    def check_stages(self, stages: tuple[StageConfig, ...]) -> None:
        kind = [stage for stage in self.stages if isinstance(stage.objective, self.adapted)]
        wrong = [stage.name for stage in stages if stage not in kind[1:]]
        if self.lora.rank and wrong:
            raise InputError(
                f"lora: expected {self.adapted_stages} after {kind[0].name if kind else 'the first'} alone (as in "
                f"--stage {self.stages[-1].name} --init-from MODEL), got {', '.join(wrong)}"
            )

    def must_reach(self, stage: StageConfig) -> tuple[str, ...]:
        """With LoRA each adapted part, and the heads beside the model."""
        if not self.lora.rank:
            return stage.trainable
        heads = (pattern for pattern in stage.trainable if not pattern.startswith("model."))
        return (*heads, *(f"model.{part}.*.{LORA_PREFIX}*" for part in self.lora.parts))

    def merge(self, model: nn.Module, run: Path, manifest: dict[str, Any]) -> None:
        """With LoRA, write its additions to `RUN/adapter` and merge them into the model."""
        if self.lora.rank:
            save_adapter(model, self.lora, run / "adapter", manifest)
            merge_lora(model)
