"""Recipes: functions that return a complete configuration. A variant derives from another and changes what differs.

What a recipe may be made of is listed here too: a new objective, source of data or system is one file of its own and
one line in its table.
"""

from collections.abc import Callable

from spar.common.config import Registry, by_kind
from spar.common.errors import InputError
from spar.recipes import dualtoken
from spar.recipes.shapes.curricula import CaptionLessons, MixedLessons, QuestionData, UnifiedLessons
from spar.recipes.shapes.data import ShapesData
from spar.recipes.shapes.dense_tagging import (
    DenseContrastiveObjective,
    DenseTaggingObjective,
    TagData,
    TaggedCaptionData,
    TagWordsObjective,
)
from spar.recipes.shapes.recipe import shapes, shapes_few_steps, shapes_long, shapes_self_flow
from spar.recipes.spar import spar_1b, spar_3b
from spar.recipes.tiny import tiny
from spar.training.config import Recipe
from spar.training.data import (
    CaptionData,
    CaptionDialogueData,
    DataConfig,
    DialogueData,
    ImageData,
    MixedData,
    NoData,
    StageData,
)
from spar.training.files_data import FilesData
from spar.training.objectives.autoencoder import AutoencoderObjective
from spar.training.objectives.base import Objective
from spar.training.objectives.contrastive import ContrastiveObjective
from spar.training.objectives.dit import DitObjective
from spar.training.objectives.dual_next_token import DualNextTokenObjective
from spar.training.objectives.dual_tokenizer import DualTokenizerObjective
from spar.training.objectives.few_step import FewStepObjective
from spar.training.objectives.next_token import NextTokenObjective
from spar.training.objectives.self_flow import SelfFlowObjective
from spar.training.objectives.tokenizer import TokenizerObjective
from spar.training.objectives.unified import UnifiedObjective
from spar.training.systems.dualtoken import DualTokenRecipe
from spar.training.systems.spar import SparRecipe

RECIPES: dict[str, Callable[[], Recipe]] = {
    "shapes": shapes, "shapes-long": shapes_long, "shapes-few-steps": shapes_few_steps,
    "shapes-self-flow": shapes_self_flow, "tiny": tiny,
    "spar-1b": spar_1b, "spar-3b": spar_3b,
    "dualtoken-shapes": dualtoken.dualtoken_shapes, "dualtoken-tiny": dualtoken.dualtoken_tiny,
    "dualtoken-3b": dualtoken.dualtoken_3b, "dualtoken-3b-256": dualtoken.dualtoken_3b_256,
    "dualtoken-one-codebook": dualtoken.dualtoken_one_codebook,
    "dualtoken-both-deep": dualtoken.dualtoken_both_deep, "dualtoken-both-shallow": dualtoken.dualtoken_both_shallow,
    "dualtoken-pixel-only": dualtoken.dualtoken_pixel_only,
    "dualtoken-semantic-only": dualtoken.dualtoken_semantic_only,
    "dualtoken-independent-heads": dualtoken.dualtoken_independent_heads,
}  # fmt: skip

SYSTEMS = (DualTokenRecipe, SparRecipe)
OBJECTIVES = (
    AutoencoderObjective,
    ContrastiveObjective,
    DenseContrastiveObjective,
    DenseTaggingObjective,
    DitObjective,
    DualNextTokenObjective,
    DualTokenizerObjective,
    FewStepObjective,
    NextTokenObjective,
    SelfFlowObjective,
    TagWordsObjective,
    TokenizerObjective,
    UnifiedObjective,
)
SOURCES = (FilesData, NoData, ShapesData)
STAGE_DATA = (
    CaptionData, CaptionDialogueData, CaptionLessons, DialogueData, ImageData, MixedData, MixedLessons, QuestionData,
    TagData, TaggedCaptionData, UnifiedLessons,
)  # fmt: skip

REGISTRY: Registry = {
    Recipe: by_kind(SYSTEMS),
    Objective: by_kind(OBJECTIVES),
    DataConfig: by_kind(SOURCES),
    StageData: by_kind(STAGE_DATA),
}


def recipe(name: str) -> Recipe:
    """The recipe of a name; an unknown name raises and lists the known ones."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()
