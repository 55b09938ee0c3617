"""Captioning and question answering: next-token prediction by the LLM on images that a frozen encoder reads."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from spar.common.errors import InputError
from spar.data.batches import Descriptions, Dialogues, Images
from spar.models.attention import attention_bias
from spar.processing.prompts import PackedBatch
from spar.training.cost import Cost, meta_input, part_cost
from spar.training.objectives.base import Objective, StepContext, Terms
from spar.training.objectives.common import image_side
from spar.training.objectives.flow import meta_layers

if TYPE_CHECKING:
    from spar.training.config import StageConfig
    from spar.training.modules import TrainingModules
    from spar.training.systems.spar import SparRecipe

DIALOGUE_TOKENS = 190  # of the words of a row, in what a step costs: those of a row of questions in `shapes`


@dataclass(frozen=True)
class NextTokenObjective(Objective["SparRecipe"]):
    """Cross-entropy of the answers' tokens alone; the encoder's features are computed once an image.

    `mean_over` "tokens" weighs all tokens of a batch alike; "images" all images, each with the mean of its own tokens:
    so a batch may be shared among processes and micro-steps.
    """

    kind: ClassVar[str] = "next_token"
    takes: ClassVar[tuple[type[Images], ...]] = (Dialogues, Descriptions)
    mean_over: Literal["tokens", "images"] = "tokens"

    def __post_init__(self) -> None:
        if self.mean_over not in ("tokens", "images"):
            raise InputError(f"mean_over: expected tokens or images, got {self.mean_over!r}")

    def may_split(self, stage: "StageConfig") -> bool:
        return self.mean_over == "images"

    def __call__(self, ctx: StepContext, batch: Dialogues | Descriptions) -> Terms:
        packed, states = self.read(ctx, batch)
        return self.answer_terms(ctx, packed, states)

    def read(self, ctx: StepContext, batch: Dialogues | Descriptions) -> tuple[PackedBatch, Tensor]:
        """The packed rows of a batch, and the LLM's last states of their tokens, `[B, T, D]`."""
        if isinstance(batch, Dialogues):
            packed = ctx.prompts.pack(batch.turns)
        else:
            packed = ctx.prompts.pack_descriptions(batch.prompts, batch.texts, edits=batch.edits)
        packed = packed.to(ctx.device)
        has_images = isinstance(batch, Dialogues) or batch.edits
        return packed, last_states(ctx, packed, image_features(ctx, batch) if has_images else None)

    def answer_terms(self, ctx: StepContext, packed: PackedBatch, states: Tensor) -> Terms:
        """The cross-entropy of the answers' tokens, each read off the state before it, and the share that is right."""
        weights = packed.weights[:, 1:]
        answered = weights > 0
        if self.mean_over == "images":  # of the tokens that count, in equal parts
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
        logits = ctx.modules.model.language.logits(states[:, :-1][answered]).float()
        targets, weights = packed.ids[:, 1:][answered], weights[answered]
        losses = F.cross_entropy(logits, targets, reduction="none")
        right = (logits.argmax(-1) == targets).float()
        words = targets != ctx.recipe.model.text.eos_token_id
        whole = len(packed.ids) if self.mean_over == "images" else weights.sum()
        return {"loss": (losses * weights).sum() / whole, "word_accuracy": right[words].mean()}

    def cost(self, modules: "TrainingModules", recipe: "SparRecipe", stage: "StageConfig") -> Cost:
        model, side = modules.model, image_side(recipe, stage)
        image, tokens = meta_input(1, 3, side, side), recipe.model.grid**2 + DIALOGUE_TOKENS
        cost = part_cost(lambda: model.tokenizer.encoder(image.detach()), model.tokenizer.encoder, through=False)
        return cost + part_cost(lambda: meta_layers(model, model.language.network.layers, tokens), model.language)


def image_features(ctx: StepContext, batch: Images) -> Tensor:
    """`f_v` `[B, N, D]` of a batch's images, which the LLM reads."""
    encoder = ctx.modules.model.tokenizer.encoder
    return ctx.frozen_features("f_v", batch, lambda x: {"f_v": encoder(x)})["f_v"].float()


def last_states(ctx: StepContext, packed: PackedBatch, f_v: Tensor | None) -> Tensor:
    """The LLM's last states of packed rows, `[B, T, D]`, with `f_v` at their image tokens."""
    model = ctx.modules.model
    embeddings = model.embed(packed.ids, f_v)
    bias = attention_bias(packed.allowed, embeddings, causal=False)
    states: Tensor = model.language(embeddings, bias, packed.positions)[0]
    return states
