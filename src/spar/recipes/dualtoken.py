"""DualToken's recipes: `dualtoken-shapes` from random weights on the shapes world, and its small copy for tests."""

from dataclasses import replace

from spar.models.config import TextConfig
from spar.models.dualtoken.config import (
    DepthHeadConfig,
    DualTokenConfig,
    PixelDecoderConfig,
    QuantizerConfig,
    TextTowerConfig,
    VisionTowerConfig,
)
from spar.recipes.shapes.curricula import UnifiedLessons
from spar.recipes.shapes.data import ShapesData
from spar.recipes.shapes.dense_tagging import DenseContrastiveObjective, TaggedCaptionData
from spar.recipes.shapes.recipe import MIXTURE, QUESTIONS
from spar.training.config import StageConfig
from spar.training.objectives.dual_next_token import DualNextTokenObjective
from spar.training.objectives.dual_tokenizer import DualTokenizerObjective
from spar.training.systems.dualtoken import DualTokenRecipe

TOWERS = ("model.tokenizer.encoder.*", "model.tokenizer.text_tower.*")
# All of the tokenizer that has a gradient; the text tower is the teacher's and stays.
TOKENIZER = (
    "model.tokenizer.encoder.*", "model.tokenizer.reduce_*", "model.tokenizer.expand_semantic.*",
    "model.tokenizer.decoder.*",
)  # fmt: skip
LANGUAGE = ("model.language.*", "model.embedder.*")
HEADS = ("model.pixel_head.*", "model.semantic_head.*")
_WORDS = UnifiedLessons(QUESTIONS, per_image=8, caption_share=0.0, scene_kinds=MIXTURE)

STAGES = (
    StageConfig(
        "towers", DenseContrastiveObjective(dense=1.0, pixel=10.0), (*TOWERS, "pair_logits.*", "dense_head.*"),
        data=TaggedCaptionData(), steps=1500, batch=32, lr=2.5e-3, lr_end=2e-5, warmup=50, optimizer="muon",
    ),
    StageConfig(
        "tokenizer", DualTokenizerObjective(perceptual=0.02, gan=0.0), TOKENIZER, steps=1500, batch=32, lr=2e-3,
        lr_end=1e-4, warmup=50, max_grad_norm=0.3, lr_multipliers=((TOWERS[0], 0.2),), optimizer="muon",
    ),
    StageConfig(
        "tokenizer-gan", DualTokenizerObjective(perceptual=0.02, gan=0.01, lecam=1e-3), (*TOKENIZER, "discriminator.*"),
        steps=300, batch=32, lr=2e-4, lr_end=1e-5, warmup=20, max_grad_norm=0.3, lr_multipliers=((TOWERS[0], 0.2),),
        optimizer="muon",
    ),
    StageConfig(
        "mllm", DualNextTokenObjective(), LANGUAGE, data=_WORDS, steps=1500, batch=32, lr=2e-3, lr_end=2e-4, warmup=60,
        optimizer="muon",
    ),
    StageConfig(
        "unified", DualNextTokenObjective(), (*LANGUAGE, *HEADS), data=replace(_WORDS, caption_share=0.8), steps=6000,
        batch=32, lr=2e-3, lr_end=1e-4, warmup=50, ema=0.998, optimizer="muon",
    ),
    StageConfig(
        "finetune", DualNextTokenObjective(), (*LANGUAGE, *HEADS), data=replace(_WORDS, caption_share=0.7), steps=300,
        batch=32, lr=2e-4, lr_end=1e-5, warmup=10, ema=0.99, optimizer="muon",
    ),
)  # fmt: skip


def dualtoken_shapes() -> DualTokenRecipe:
    """DualToken from random weights on version 2 of the shapes world."""
    return DualTokenRecipe(name="dualtoken-shapes", stages=STAGES, data=ShapesData())


TINY_MODEL = DualTokenConfig(
    vision=VisionTowerConfig(hidden_size=32, layers=6, heads=2, intermediate_size=64, patch_size=8),
    text_tower=TextTowerConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64),
    pixel=QuantizerConfig(depth=2, entries=16, width=8),
    semantic=QuantizerConfig(depth=2, entries=16, width=8, codebook="shared"),
    decoder=PixelDecoderConfig(channels=(8, 8, 16, 16), groups=4),
    text=TextConfig(hidden_size=32, layers=2, heads=2, kv_heads=1, intermediate_size=64),
    pixel_head=DepthHeadConfig(layers=1, width=16, heads=2),
    semantic_head=DepthHeadConfig(layers=1, width=16, heads=2),
)


def dualtoken_tiny() -> DualTokenRecipe:
    """Three steps a stage, four images a step: a check of the way, not of the goal."""
    base = dualtoken_shapes()
    stages = tuple(replace(stage, steps=3, batch=4, warmup=1) for stage in base.stages)
    data = ShapesData(scenes=48, edits=32)
    return replace(base, name="dualtoken-tiny", model=TINY_MODEL, stages=stages, data=data, log_every=1)
