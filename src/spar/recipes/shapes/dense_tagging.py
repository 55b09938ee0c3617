"""Dense tagging: what each visual token shows, and what the LLM takes over from it.

It replaces the years of images that InternViT was trained on: the encoder of a small setting learns shapes, colours and
places from tags of every token, its features are whitened, and the LLM's words for the tags begin where the encoder
points.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar.common.errors import InputError
from spar.data.batches import Captioned, Descriptions, Dialogues, Images
from spar.processing.prompts import PackedBatch, PromptEncoder
from spar.recipes.shapes.curricula import Lessons, QuestionData
from spar.training.cost import Cost, meta_input, part_cost
from spar.training.data import StageData, TrainingData
from spar.training.modules import Head, TrainingModules
from spar.training.objectives.base import Networks, Objective, StepContext, Terms, check_at_least
from spar.training.objectives.common import sample_images
from spar.training.objectives.contrastive import ContrastiveObjective
from spar.training.objectives.next_token import NextTokenObjective, image_features, last_states
from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES
from spar.worlds.shapes.tokenizer import PLURALS

if TYPE_CHECKING:
    from spar.training.config import Recipe, StageConfig
    from spar.training.plan import InitFolder, Origin, PlannedStage
    from spar.training.systems.dualtoken import DualTokenRecipe
    from spar.training.systems.spar import SparRecipe

TAG_EMBEDDINGS = "tag embeddings"
# What the encoder's dense pre-training reads off each token of `f_v`: classes for each named target.
TAGS = {"shape": 7, "color": 9, "size": 3, "background": 6}
CENTER_BINS = 16
TAG_NAMES = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
}


@dataclass(frozen=True, kw_only=True)
class Tagged(Images):
    """Images with `tags` of each visual token, `[B, N, ...]` by name."""

    tags: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TaggedCaptions(Captioned, Tagged):
    """Images with a caption each, and with `tags` of each visual token."""


@dataclass(frozen=True, kw_only=True)
class TaggedPrompts(Descriptions):
    """Prompts answered in words, with the `tags` of each visual token of the image that they ask for, `[B, N, ...]` by
    name, and which tokens count, `[B, N]`: those of an object, and some of the others. Without the others the LLM would
    predict an object at every empty token.
    """

    tags: Mapping[str, Tensor]
    counted: Tensor


@dataclass(frozen=True, kw_only=True)
class TaggedEdits(TaggedPrompts):
    """Edits; the tokens of objects before the edit count too."""


@dataclass(frozen=True, kw_only=True)
class TaggedLayouts(TaggedPrompts):
    """Captions or instructions, and as their `texts` layouts; the tags are read at the tokens of the blank canvas, or
    of the image to edit, after the layout.
    """


@dataclass(frozen=True)
class TagData(StageData):
    """Images with the tags of each visual token."""

    kind: ClassVar[str] = "tags"
    gives: ClassVar[tuple[type[Images], ...]] = (Tagged,)


@dataclass(frozen=True)
class TaggedCaptionData(Lessons, StageData):
    """Images with captions and with the tags of each visual token."""

    kind: ClassVar[str] = "tagged_captions"
    gives: ClassVar[tuple[type[Images], ...]] = (TaggedCaptions,)


class DenseHead(Head):
    """Linear read-outs of `f_v`: tags, the owner's centre in bins a side, coverage, and the token's own pixels."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.tags = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in TAGS.items()})
        self.center = nn.Linear(width, 2 * CENTER_BINS)
        self.coverage = nn.Linear(width, 1)
        self.pixels = nn.Linear(width, 3 * stride**2)

    def linears(self) -> list[nn.Linear]:
        """All read-outs."""
        return [part for part in self.modules() if isinstance(part, nn.Linear)]


def build_dense_head(recipe: "Recipe") -> Mapping[str, Callable[[Any], nn.Module]]:
    """The read-outs of a recipe's encoder, for the objectives that read them."""
    return {"dense_head": lambda _: DenseHead(recipe.feature_width, recipe.token_stride)}


def dense_head(modules: TrainingModules) -> DenseHead:
    """The read-outs among the modules of a run."""
    head = modules.get_submodule("dense_head")
    if not isinstance(head, DenseHead):
        raise TypeError(f"expected the dense_head of a run, got {type(head).__name__}")
    return head


@dataclass(frozen=True)
class DenseTaggingObjective(Objective["SparRecipe"]):
    """Pre-training of E_s: tags, centres and coverage, weighed by `dense`, and pixels, by `pixel`, each read linearly
    off `f_v`.
    """

    kind: ClassVar[str] = "dense_tagging"
    takes: ClassVar[tuple[type[Images], ...]] = (Tagged,)
    splittable: ClassVar[bool] = False  # a mean over the whole batch's tokens
    measures: ClassVar[str] = "whitening"
    dense: float = 1.0
    pixel: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(0, **vars(self))

    def build(self, recipe: "SparRecipe", networks: Networks) -> Mapping[str, Callable[[Any], nn.Module]]:
        return build_dense_head(recipe)

    def __call__(self, ctx: StepContext, batch: Tagged) -> Terms:
        f_v = ctx.modules.model.tokenizer.encoder(batch.require_pixels())               # [B, N, D_s]
        return dense_terms(ctx, batch, f_v, dense=self.dense, pixel=self.pixel)

    @torch.no_grad()
    def finish(self, ctx: StepContext, data: TrainingData) -> None:
        """Whiten `f_v`."""
        encoder, chunks = ctx.modules.model.tokenizer.encoder, sample_images(ctx, data)
        with ctx.autocast():
            f_v = torch.cat([encoder(chunk) for chunk in chunks]).float()
            whiten(ctx.modules, f_v)

    def cost(self, modules: TrainingModules, recipe: "SparRecipe", stage: "StageConfig") -> Cost:
        encoder, head, config = modules.model.tokenizer.encoder, dense_head(modules), recipe.model
        image = meta_input(1, 3, *2 * (config.image_size,))
        f_v = meta_input(1, config.grid**2, config.text.hidden_size)
        cost = part_cost(lambda: encoder(image.detach()), encoder, through=False)
        return cost + part_cost(lambda: [part(f_v) for part in head.linears()], head)


@dataclass(frozen=True)
class TagWordsObjective(NextTokenObjective):
    """Next-token prediction whose words for tags begin at the tags' read-out vectors: a word begins where the encoder
    already points. Published LLMs know their words before they see an image.

    `edit_tags` weighs a second term: after an instruction, or a layout, the LLM's last states at the image's, or
    canvas's, tokens tell the tags of these tokens in the image that is asked for, by the encoder's own read-outs. Words
    alone leave it to the answer's tokens to find what an instruction means, and the DiT does not read those.
    """

    kind: ClassVar[str] = "next_token_from_tags"
    edit_tags: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, edit_tags=self.edit_tags)

    def __call__(self, ctx: StepContext, batch: Dialogues | Descriptions) -> Terms:
        packed, states = self.read(ctx, batch)
        terms = self.answer_terms(ctx, packed, states)
        if not (self.edit_tags and isinstance(batch, TaggedPrompts)):
            return terms
        seen = states[packed.ids == ctx.recipe.model.text.image_token_id]
        seen = seen.unflatten(0, (len(packed.ids), -1))[:, -batch.counted.shape[1] :]      # the last image of a row
        tagged = tag_terms(dense_head(ctx.modules), seen, batch.tags, batch.counted)
        return {**terms, "loss": terms["loss"] + self.edit_tags * sum(tagged.values()), **tagged}

    def read(self, ctx: StepContext, batch: Dialogues | Descriptions) -> tuple[PackedBatch, Tensor]:
        if not isinstance(batch, TaggedLayouts):
            return super().read(ctx, batch)
        packed = ctx.prompts.pack_layouts(batch.prompts, batch.texts, edits=batch.edits).to(ctx.device)
        if not batch.edits:
            return packed, last_states(ctx, packed, ctx.modules.model.canvas(len(batch)))
        return packed, last_states(ctx, packed, image_features(ctx, batch).repeat_interleave(2, dim=0))

    def build(self, recipe: "SparRecipe", networks: Networks) -> Mapping[str, Callable[[Any], nn.Module]]:
        return build_dense_head(recipe)

    def check(self, recipe: "SparRecipe", stage: "StageConfig") -> None:
        data = stage.data
        prompted = isinstance(data, QuestionData) and data.prompt_share and (data.edit_prompts or data.layouts)
        if self.edit_tags and not prompted:
            raise InputError(
                f"stage {stage.name}: edit_tags {self.edit_tags} needs edits or layouts among the prompts: data of "
                f"kind {QuestionData.kind} with prompt_share above 0, and edit_prompts above 0 or layouts"
            )

    def check_folder(self, stage: "StageConfig", init: "InitFolder") -> None:
        if self.edit_tags and "dense_head" not in init.holds:
            raise InputError(
                f"stage {stage.name}: edit_tags reads the read-outs of the encoder's training, which {init.path} does "
                "not hold: start from a stage's end, or set edit_tags 0"
            )

    def preparations(self, recipe: "SparRecipe", stage: "StageConfig", origin: "Origin") -> tuple[str, ...]:
        random = origin.init is None and origin.before is None
        return (TAG_EMBEDDINGS,) if random or origin.made_by(DenseTaggingObjective) else ()

    def prepare(self, ctx: StepContext, data: TrainingData, planned: "PlannedStage") -> None:
        if TAG_EMBEDDINGS in planned.prepares:
            init_tag_embeddings(ctx.modules, ctx.prompts)


@dataclass(frozen=True)
class DenseContrastiveObjective(ContrastiveObjective):
    """Contrastive pre-training of both towers, with the dense tags and pixels of each token beside it, read linearly
    off the semantic layer and weighed by `dense` and `pixel`: a short training on pairs alone teaches the pooled
    feature, hardly the tokens'.
    """

    kind: ClassVar[str] = "dense_contrastive"
    takes: ClassVar[tuple[type[Images], ...]] = (TaggedCaptions,)
    dense: float = 1.0
    pixel: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(0, **vars(self))

    def build(self, recipe: "DualTokenRecipe", networks: Networks) -> Mapping[str, Callable[[Any], nn.Module]]:
        return {**super().build(recipe, networks), **build_dense_head(recipe)}

    def __call__(self, ctx: StepContext, batch: TaggedCaptions) -> Terms:  # type: ignore[override]
        deep, pooled = ctx.modules.model.tokenizer.encoder(batch.require_pixels())
        pairs = self.pair_terms(ctx, pooled, batch.texts)
        terms = dense_terms(ctx, batch, deep, dense=self.dense, pixel=self.pixel)
        return {**terms, **pairs, "loss": pairs["loss"] + terms["loss"]}


def dense_terms(ctx: StepContext, batch: Tagged, features: Tensor, *, dense: float, pixel: float) -> Terms:
    """Tags, centres, coverage and pixels read linearly off features `[B, N, D]`, and `loss`, their weighted sum."""
    head, targets, pixels = dense_head(ctx.modules), batch.tags, batch.require_pixels()
    owned = targets["shape"] > 0
    terms = tag_terms(head, features, targets, owned)
    bins = (targets["center"] * CENTER_BINS).long().clamp(0, CENTER_BINS - 1)            # [B, N, 2]
    places = head.center(features).float().unflatten(-1, (2, CENTER_BINS))[owned]
    terms["center"] = F.cross_entropy(places.flatten(0, 1), bins[owned].flatten())
    coverage = head.coverage(features).float().squeeze(-1)
    terms["coverage"] = F.binary_cross_entropy_with_logits(coverage, targets["coverage"].float())
    patches = F.pixel_unshuffle(pixels, ctx.recipe.token_stride).flatten(2).transpose(1, 2)  # [B, N, 3 stride^2]
    terms["pixels"] = F.mse_loss(head.pixels(features).float(), patches)
    tags = sum(value for name, value in terms.items() if name != "pixels")
    with torch.no_grad():
        right = (head.tags["shape"](features).argmax(-1) == targets["shape"])[owned].float().mean()
    return {"loss": dense * tags + pixel * terms["pixels"], **terms, "shape_accuracy": right}


def tag_terms(head: DenseHead, states: Tensor, targets: Mapping[str, Tensor], counted: Tensor) -> Terms:
    """The cross-entropy of each tag, read off states `[B, N, D]`; an object's tags on the tokens `counted` `[B, N]`
    alone: over all tokens the background drowns them.
    """
    terms: Terms = {}
    for name in TAGS:
        logits, here = head.tags[name](states).float(), torch.ones_like(counted) if name == "background" else counted
        terms[name] = F.cross_entropy(logits[here], targets[name][here])
    return terms


@torch.no_grad()
def init_tag_embeddings(modules: TrainingModules, prompts: PromptEncoder) -> None:
    """Start each tag's word (and a shape's plural) at the tag's read-out vector, at the usual size of a word."""
    table = modules.model.language.network.embed_tokens.weight
    size = table.norm(dim=-1).mean()
    for tag, names in TAG_NAMES.items():
        weight = dense_head(modules).get_parameter(f"tags.{tag}.weight")
        rows = weight[-len(names) :]  # the first row of most tags is "none"
        for name, row in zip(names, rows - rows.mean(0), strict=True):
            for word in (name, PLURALS.get(name, name)):
                (token,) = prompts.encode(word)
                table[token] = row / row.norm() * size


@torch.no_grad()
def whiten(modules: TrainingModules, f_v: Tensor, floor: float = 0.1) -> None:
    """Fold a whitening of `f_v` `[B, N, D]` into the projector's last layer, and its inverse into the dense read-outs.

    Pre-training leaves 95 % of the variance of `f_v` in a dozen directions of colour and brightness; a frozen encoder
    that hands these to the LLM loses the rest in its RMSNorm. `floor` is the share of the mean variance that is
    added to every direction, so that noise is not blown up.
    """
    rows = f_v.flatten(0, 1).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((rows - mean).T))
    scale = (values.clamp(min=0) + floor * values.mean()).sqrt()
    forward, backward = (vectors / scale) @ vectors.T, (vectors * scale) @ vectors.T
    projector, head = modules.model.tokenizer.encoder.multi_modal_projector, dense_head(modules)
    weight, bias = (projector.get_parameter(f"linear_2.{name}") for name in ("weight", "bias"))
    bias.copy_((forward @ (bias.double() - mean)).to(bias.dtype))
    weight.copy_((forward @ weight.double()).to(weight.dtype))
    for linear in head.linears():
        linear.bias.add_((linear.weight.double() @ mean).to(linear.bias.dtype))
        linear.weight.copy_((linear.weight.double() @ backward).to(linear.weight.dtype))
