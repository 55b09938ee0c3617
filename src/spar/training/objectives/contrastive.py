"""Contrastive pre-training of SigLIP's two towers on images and captions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from spar.data.batches import Captioned, Images
from spar.losses.contrastive import sigmoid_contrastive_loss
from spar.processing.prompts import tower_tokens
from spar.training.objectives.base import Networks, Objective, StepContext, Terms

if TYPE_CHECKING:
    from spar.training.systems.dualtoken import DualTokenRecipe

LOG_SCALE, BIAS = 2.303, -10.0  # SigLIP's own start: t = 10, and few of all pairs match


class PairLogits(nn.Module):
    """The learned scale and bias of the logits of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(LOG_SCALE))
        self.bias = nn.Parameter(torch.tensor(BIAS))


@dataclass(frozen=True)
class ContrastiveObjective(Objective["DualTokenRecipe"]):
    """SigLIP's loss over all pairs of a batch; captions that are the same text match each other's images too."""

    kind: ClassVar[str] = "contrastive"
    takes: ClassVar[tuple[type[Images], ...]] = (Captioned,)
    splittable: ClassVar[bool] = False  # a loss over all pairs of the whole batch

    def build(self, recipe: "DualTokenRecipe", networks: Networks) -> Mapping[str, Callable[[Any], nn.Module]]:
        return {"pair_logits": lambda _: PairLogits()}

    def __call__(self, ctx: StepContext, batch: Captioned) -> Terms:
        _, pooled = ctx.modules.model.tokenizer.encoder(batch.require_pixels())
        return self.pair_terms(ctx, pooled, batch.texts)

    def pair_terms(self, ctx: StepContext, pooled: Tensor, texts: tuple[str | None, ...]) -> Terms:
        """The loss of pooled features `[B, W]` and their texts, and how often an image's own text is the likeliest."""
        tokenizer, head = ctx.modules.model.tokenizer, ctx.modules.pair_logits
        ids = tower_tokens(ctx.prompts.tokenizer, texts, ctx.recipe.model.text_tower.positions).to(ctx.device)
        features = tokenizer.text_tower(ids)
        same = (ids[:, None] == ids[None]).all(2)
        loss = sigmoid_contrastive_loss(pooled, features, head.log_scale, head.bias, same)
        with torch.no_grad():
            best = (pooled.float() @ torch.nn.functional.normalize(features.float(), dim=1).T).argmax(1)
            right = same[torch.arange(len(best), device=best.device), best].float().mean()
        return {"loss": loss, "contrastive": loss.detach(), "pair_accuracy": right}
