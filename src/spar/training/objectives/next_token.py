"""Captioning and question answering: next-token prediction by the LLM on images that a frozen encoder reads."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F

from spar.data.batches import Descriptions, Dialogues, Images
from spar.models.attention import attention_bias
from spar.training.cost import Cost, meta_input, part_cost
from spar.training.objectives.base import Objective, StepContext, Terms
from spar.training.objectives.common import image_side
from spar.training.objectives.flow import meta_layers

if TYPE_CHECKING:
    from spar.training.config import StageConfig
    from spar.training.modules import TrainingModules
    from spar.training.systems.spar import SparRecipe

DIALOGUE_TOKENS = 240  # of the words of a row, in what a step costs: 284 and 196 in the two stages of `shapes`


@dataclass(frozen=True)
class NextTokenObjective(Objective["SparRecipe"]):
    """Cross-entropy of the answers' tokens alone; the encoder's features are computed once an image."""

    kind: ClassVar[str] = "next_token"
    takes: ClassVar[tuple[type[Images], ...]] = (Dialogues, Descriptions)
    splittable: ClassVar[bool] = False  # a mean over the whole batch's tokens

    def __call__(self, ctx: StepContext, batch: Dialogues | Descriptions) -> Terms:
        model, f_v = ctx.modules.model, None
        if isinstance(batch, Dialogues):
            packed = ctx.prompts.pack(batch.turns)
        else:
            packed = ctx.prompts.pack_descriptions(batch.prompts, batch.texts, edits=batch.edits)
        if isinstance(batch, Dialogues) or batch.edits:
            f_v = ctx.frozen_features("f_v", batch, lambda x: {"f_v": model.tokenizer.encoder(x)})["f_v"].float()
        ids, weights = packed.ids.to(ctx.device), packed.weights.to(ctx.device)[:, 1:]
        embeddings = model.embed(ids, f_v)
        bias = attention_bias(packed.allowed.to(ctx.device), embeddings, causal=False)
        final, _ = model.language(embeddings, bias, packed.positions.to(ctx.device))
        answered = weights > 0
        logits = model.language.logits(final[:, :-1][answered]).float()
        targets, weights = ids[:, 1:][answered], weights[answered]
        losses = F.cross_entropy(logits, targets, reduction="none")
        right = (logits.argmax(-1) == targets).float()
        words = targets != ctx.recipe.model.text.eos_token_id
        return {"loss": (losses * weights).sum() / weights.sum(), "word_accuracy": right[words].mean()}

    def cost(self, modules: "TrainingModules", recipe: "SparRecipe", stage: "StageConfig") -> Cost:
        model, side = modules.model, image_side(recipe, stage)
        image, tokens = meta_input(1, 3, side, side), recipe.model.grid**2 + DIALOGUE_TOKENS
        cost = part_cost(lambda: model.tokenizer.encoder(image.detach()), model.tokenizer.encoder, through=False)
        return cost + part_cost(lambda: meta_layers(model, model.language.network.layers, tokens), model.language)
