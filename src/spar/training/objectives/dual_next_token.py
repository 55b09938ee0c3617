"""DualToken's LLM: answers in words about images, and images from words, both as next tokens.

Images are read and written as quantised codes of a frozen tokenizer; no continuous feature reaches the LLM.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spar.checkpoints.eight_bits import rounded
from spar.common.errors import InputError
from spar.data.batches import Captioned, Descriptions, Dialogues, Images
from spar.models.attention import attention_bias
from spar.models.dualtoken.tokenizer import DualCodes
from spar.processing.prompts import PackedBatch
from spar.training.cost import Cost, meta_input, part_cost
from spar.training.objectives.base import StepContext, Terms, check_at_least
from spar.training.objectives.dual_tokenizer import DualTokenizerObjective
from spar.training.objectives.flow import meta_layers
from spar.training.objectives.next_token import DIALOGUE_TOKENS, NextTokenObjective

if TYPE_CHECKING:
    from spar.training.config import StageConfig
    from spar.training.data import TrainingData
    from spar.training.plan import Origin, PlannedStage

PROMPT_TOKENS = 32  # of a caption with its template, in what a step costs
TOKENIZER_ROUNDED = "tokenizer rounded as it is stored"
FLAT_RANGE = 0.02  # of a channel within a patch, of 1


@dataclass(frozen=True)
class DualNextTokenObjective(NextTokenObjective):
    """Cross-entropy of answers' tokens, or of both vocabularies' codes.

    `pixel` and `semantic` weigh the vocabularies' cross-entropies, `depth_decay` each depth against the one before
    it, `flat` the codes after the first of patches that show one colour alone (below FLAT_RANGE): those say nothing
    about the image, and are most of the loss of a drawing. `unconditional` is the share of the prompts that are
    replaced by the unconditional one. `tokenizer_bits` (16: bfloat16, or 8: matrices in float8) is what the tokenizer's
    weights are rounded to before the LLM reads its first code: those of a folder so stored are then the same.
    """

    kind: ClassVar[str] = "dual_next_token"
    takes: ClassVar[tuple[type[Images], ...]] = (Dialogues, Descriptions, Captioned)
    pixel: float = 1.0
    semantic: float = 1.0
    depth_decay: float = 1.0
    flat: float = 1.0
    unconditional: float = 0.1
    tokenizer_bits: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer_bits not in (8, 16):
            raise InputError(f"tokenizer_bits: expected 8 or 16, got {self.tokenizer_bits}")
        check_at_least(0, **{name: value for name, value in vars(self).items() if name != "mean_over"})

    def preparations(self, recipe: Any, stage: "StageConfig", origin: "Origin") -> tuple[str, ...]:
        """After the tokenizer's training its weights are rounded: a folder of them then gives the LLM's codes."""
        return (TOKENIZER_ROUNDED,) if origin.made_by(DualTokenizerObjective) else ()

    @torch.no_grad()
    def prepare(self, ctx: StepContext, data: "TrainingData", planned: "PlannedStage") -> None:
        if TOKENIZER_ROUNDED in planned.prepares:
            for name, value in ctx.modules.model.tokenizer.state_dict().items():
                value.copy_(rounded(name, value, self.tokenizer_bits))

    def may_split(self, stage: "StageConfig") -> bool:
        """Images alone may: each has as many codes. With answers it is `mean_over` that says."""
        return not {Dialogues, Descriptions} & set(stage.data.gives) or super().may_split(stage)

    def may_rest(self, recipe: Any) -> tuple[str, ...]:
        """A step of dialogues does not reach the heads, one of prompts in words not the visual tokens."""
        return ("model.embedder.*", "model.pixel_head.*", "model.semantic_head.*")

    def __call__(self, ctx: StepContext, batch: Dialogues | Descriptions | Captioned) -> Terms:
        if isinstance(batch, Captioned):
            return self.image_terms(ctx, batch)
        packed, states = self.read(ctx, batch)
        return self.answer_terms(ctx, packed, states)

    def codes(self, ctx: StepContext, batch: Images) -> DualCodes:
        """The codes of a batch's images, in float32 whatever the run's precision, computed once an image."""
        tokenizer = ctx.modules.model.tokenizer

        def encode(pixels: Tensor) -> Terms:
            with torch.autocast(ctx.device.type, enabled=False):
                return vars(tokenizer.encode(pixels.float()))

        return DualCodes(**ctx.frozen_features("codes", batch, encode))

    def read(self, ctx: StepContext, batch: Dialogues | Descriptions) -> tuple[PackedBatch, Tensor]:
        """As of SPAR's, with codes in place of features."""
        model = ctx.modules.model
        if isinstance(batch, Dialogues):
            packed = ctx.prompts.pack(batch.turns)
        else:
            packed = ctx.prompts.pack_descriptions(batch.prompts, batch.texts, edits=batch.edits)
        packed = packed.to(ctx.device)
        codes = self.codes(ctx, batch) if isinstance(batch, Dialogues) or batch.edits else None
        embeddings = model.embed(packed.ids, codes)
        bias = attention_bias(packed.allowed, embeddings, causal=False)
        return packed, model.language(embeddings, bias, packed.positions)[0]

    def image_terms(self, ctx: StepContext, batch: Captioned) -> Terms:
        """The codes' cross-entropies, depth by depth, of images after their prompts (teacher forcing)."""
        model, codes = ctx.modules.model, self.codes(ctx, batch)
        tokens = ctx.prompts.generation(ctx.unconditional(batch.texts, self.unconditional)).to(ctx.device)
        logits = model.image_logits(tokens.ids, tokens.mask, codes)
        terms: Terms = {}
        total = torch.zeros((), device=ctx.device)
        is_flat = flat_patches(batch.require_pixels(), model.config.token_stride).flatten()      # [B N]
        for name, found in logits.items():
            losses = losses_by_depth(found, getattr(codes, name).flatten(0, 2))  # [B N, D]
            weights = self.depth_decay ** torch.arange(losses.shape[1], device=losses.device)
            weights = (weights / weights.sum()).expand(losses.shape).clone()
            weights[:, 1:] *= torch.where(is_flat, self.flat, 1.0)[:, None]
            total = total + getattr(self, name) * (losses * weights).sum(1).mean()
            terms |= {f"{name}_{depth}": loss.mean().detach() for depth, loss in enumerate(losses.unbind(1), start=1)}
        return {"loss": total, **terms}

    def cost(self, modules: Any, recipe: Any, stage: "StageConfig") -> Cost:
        """The frozen tokenizer; an image after its prompt (the LLM's layers, both heads at every position) or a
        conversation about it, by their shares, and the memory of the larger.
        """
        model, config, side = modules.model, recipe.model, recipe.image_size
        positions, image = config.grid**2, meta_input(1, 3, side, side).detach()
        encoder = part_cost(lambda: model.tokenizer.features(image), model.tokenizer.encoder, through=False)
        share, layers = stage.data.shares.get("dialogue", 0.0), model.language.network.layers
        talk = part_cost(lambda: meta_layers(model, layers, positions + DIALOGUE_TOKENS), model.language)
        if share == 1:
            return encoder + talk
        cost = part_cost(lambda: meta_layers(model, layers, positions + PROMPT_TOKENS), model.language)
        for name, codes in config.vocabularies.items():
            head = model.heads[name]
            sums = meta_input(positions, codes.depth - 1, codes.width)
            given = meta_input(positions, config.pixel.width) if head.from_given else None
            cost += _head_cost(head, meta_input(positions, config.text.hidden_size), sums, given)
        if share:
            flops = (1 - share) * cost.flops + share * talk.flops
            cost = Cost(flops, max(cost.kept, talk.kept), max(cost.recomputed, talk.recomputed))
        return encoder + cost


def _head_cost(head: Any, states: Tensor, sums: Tensor, given: Tensor | None) -> Cost:
    return part_cost(lambda: head(states, sums, given), head)


def flat_patches(pixels: Tensor, side: int) -> Tensor:
    """Which patches of `side` pixels show one colour alone: `[B, 3, S, S]` to `[B, N]`, in raster order."""
    highest, lowest = (F.max_pool2d(sign * pixels, side) for sign in (1, -1))
    return (highest + lowest).amax(1).flatten(1) < FLAT_RANGE


def losses_by_depth(logits: Tensor, codes: Tensor) -> Tensor:
    """The cross-entropies `[M, D]` of logits `[M, D, K]` and codes `[M, D]`."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none")
    return losses.view(codes.shape)
