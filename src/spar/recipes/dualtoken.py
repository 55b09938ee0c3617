"""DualToken's recipes: `dualtoken-shapes` from random weights on the shapes world, its small copy for tests, and the
published sizes.
"""

from dataclasses import replace

from spar.losses.adversarial import PatchDiscriminatorConfig
from spar.models.config import TextConfig
from spar.models.dualtoken.config import (
    DepthHeadConfig,
    DualTokenConfig,
    PixelDecoderConfig,
    QuantizerConfig,
    TextTowerConfig,
    VisionTowerConfig,
)
from spar.models.dualtoken.sampling import CodeSampling
from spar.recipes.shapes.curricula import UnifiedLessons
from spar.recipes.shapes.data import ShapesData
from spar.recipes.shapes.dense_tagging import DenseContrastiveObjective, TaggedCaptionData
from spar.recipes.shapes.recipe import MIXTURE, QUESTIONS
from spar.training.config import StageConfig
from spar.training.data import CaptionDialogueData, ImageData
from spar.training.objectives.dual_next_token import DualNextTokenObjective
from spar.training.objectives.dual_tokenizer import DualTokenizerObjective
from spar.training.systems.dualtoken import DualPerceptualConfig, DualTokenRecipe

TOWERS = ("model.tokenizer.encoder.*", "model.tokenizer.text_tower.*")
# All of the tokenizer that has a gradient; the text tower is the teacher's and stays.
TOKENIZER = (
    "model.tokenizer.encoder.*", "model.tokenizer.reduce_*", "model.tokenizer.expand_semantic.*",
    "model.tokenizer.decoder.*",
)  # fmt: skip
LANGUAGE = ("model.language.*", "model.embedder.*")
HEADS = ("model.pixel_head.*", "model.semantic_head.*")
_PIXELS_AND_WORDS = DualTokenizerObjective(mse=5.0, perceptual=0.02, gan=0.0)
# Where things lie is the hardest to learn: two kinds of lessons lead to it, as in SPAR's recipe. Prompts are answered
# with layouts, and images are drawn of those.
_WORDS = UnifiedLessons(
    (*QUESTIONS, *2 * ("place",), *4 * ("relation",), *3 * ("position",)), per_image=8, caption_share=0.0,
    scene_kinds=MIXTURE, prompt_share=0.4, edit_prompts=0.0, layouts=True,
)
_NEXT_TOKEN = DualNextTokenObjective(tokenizer_bits=8)  # the bundled models together may have 40 MB

STAGES = (
    StageConfig(
        "towers", DenseContrastiveObjective(dense=1.0, pixel=10.0), (*TOWERS, "pair_logits.*", "dense_head.*"),
        data=TaggedCaptionData(), steps=1500, batch=32, lr=2.5e-3, lr_end=2e-5, warmup=50, optimizer="muon",
    ),
    StageConfig(
        "tokenizer", _PIXELS_AND_WORDS, TOKENIZER, steps=1500, batch=32, lr=2e-3, lr_end=1e-4, warmup=50,
        max_grad_norm=0.3, lr_multipliers=((TOWERS[0], 0.2),), optimizer="muon",
    ),
    StageConfig(
        "tokenizer-gan", replace(_PIXELS_AND_WORDS, gan=0.01, lecam=1e-3), (*TOKENIZER, "discriminator.*"),
        steps=300, batch=32, lr=2e-4, lr_end=1e-5, warmup=20, max_grad_norm=0.3, lr_multipliers=((TOWERS[0], 0.2),),
        optimizer="muon",
    ),
    StageConfig(
        "mllm", _NEXT_TOKEN, LANGUAGE, data=_WORDS, steps=1500, batch=32, lr=2e-3,
        lr_end=2e-4, warmup=60, optimizer="muon",
    ),
    StageConfig(
        "unified", replace(_NEXT_TOKEN, flat=0.1), (*LANGUAGE, *HEADS),
        data=replace(_WORDS, caption_share=0.8, layout_captions=0.9), steps=4500, batch=32, lr=2e-3, lr_end=1e-4,
        warmup=50, ema=0.998, optimizer="muon",
    ),
    StageConfig(
        "finetune", replace(_NEXT_TOKEN, flat=0.1), (*LANGUAGE, *HEADS),
        data=replace(_WORDS, caption_share=0.7, layout_captions=0.9), steps=200, batch=32, lr=2e-4, lr_end=1e-5,
        warmup=10, ema=0.99, optimizer="muon",
    ),
)  # fmt: skip


def dualtoken_shapes() -> DualTokenRecipe:
    """DualToken from random weights on version 2 of the shapes world."""
    # An autoregressive model overfits 9,000 scenes within the steps of its last stages.
    sampling = CodeSampling(temperature=0.7, guidance=2.2, top_p=0.95, depth_decay=0.8, layout=True)
    return DualTokenRecipe(name="dualtoken-shapes", stages=STAGES, data=ShapesData(scenes=65536), sampling=sampling)


# ---- studies: the same data, steps and stages, one choice of the design changed --------------------------------------


def dualtoken_one_codebook() -> DualTokenRecipe:
    """One codebook of the deep features for pixels and meaning, as VILA-U has it, in place of two."""
    base = dualtoken_shapes()
    model = replace(base.model, one_codebook=True, shortcut=0.0, reads=("semantic",), semantic_given_pixel=False)
    stages = tuple(
        replace(stage, trainable=tuple(pattern for pattern in stage.trainable if pattern != HEADS[0]))
        for stage in base.stages
    )
    return replace(base, name="dualtoken-one-codebook", model=model, stages=stages)


def dualtoken_both_deep() -> DualTokenRecipe:
    """Two codebooks, both of the deep features, without the shortcut."""
    base = dualtoken_shapes()
    vision = replace(base.model.vision, pixel_layer=base.model.vision.taps[2])
    return replace(base, name="dualtoken-both-deep", model=replace(base.model, vision=vision, shortcut=0.0))


def dualtoken_both_shallow() -> DualTokenRecipe:
    """Two codebooks, both of the shallow features; quantised ones run through all layers after it."""
    base = dualtoken_shapes()
    vision = replace(base.model.vision, semantic_layer=base.model.vision.taps[1])
    return replace(base, name="dualtoken-both-shallow", model=replace(base.model, vision=vision))


def dualtoken_pixel_only() -> DualTokenRecipe:
    """The LLM reads pixel codes alone, and predicts both vocabularies."""
    base = dualtoken_shapes()
    return replace(base, name="dualtoken-pixel-only", model=replace(base.model, reads=("pixel",)))


def dualtoken_semantic_only() -> DualTokenRecipe:
    """The LLM reads semantic codes alone, and predicts both vocabularies."""
    base = dualtoken_shapes()
    return replace(base, name="dualtoken-semantic-only", model=replace(base.model, reads=("semantic",)))


def dualtoken_independent_heads() -> DualTokenRecipe:
    """Both heads read the LLM's state alone, as the paper has it: the semantic codes are not given the pixel codes."""
    base = dualtoken_shapes()
    model = replace(base.model, semantic_given_pixel=False)
    return replace(base, name="dualtoken-independent-heads", model=model)


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
    """Three steps a stage, four images a step: shows that all stages run, not what they reach."""
    base = dualtoken_shapes()
    stages = tuple(replace(stage, steps=3, batch=4, warmup=1) for stage in base.stages)
    data = ShapesData(scenes=48, edits=32)
    return replace(base, name="dualtoken-tiny", model=TINY_MODEL, stages=stages, data=data, log_every=1)


# ---- the published sizes ---------------------------------------------------------------------------------------------

_CODES_256 = QuantizerConfig(
    depth=4, entries=16384, width=32, codebook="shared", decay=0.99, eps=1e-5, restart_share=1 / 16
)
_SO400M = VisionTowerConfig(
    hidden_size=1152, layers=27, heads=16, intermediate_size=4304, patch_size=16, image_size=256, norm_eps=1e-6,
    shortcut_layer=4, pixel_layer=6, semantic_layer=26,
)  # fmt: skip
# Qwen2.5-3B, which two surveys name; the project page says 3B and no LLM. The image tokens are its first spare rows.
_QWEN_3B = TextConfig(
    vocab_size=151936, hidden_size=2048, layers=36, heads=16, kv_heads=2, intermediate_size=11008, rope_theta=1e6,
    max_positions=32768, rms_norm_eps=1e-6, tied_head=True, image_token_id=151666, eos_token_id=151645,
    pad_token_id=151643,
)  # fmt: skip
# Three layers are the figure's; their width is the LLM's, as VILA-U has it, since none is stated.
_HEAD = DepthHeadConfig(layers=3, width=2048, heads=16, mlp_ratio=4)
DUALTOKEN_3B_256 = DualTokenConfig(
    vision=_SO400M,
    text_tower=TextTowerConfig(
        vocab_size=256000, hidden_size=1152, layers=27, heads=16, intermediate_size=4304, positions=64
    ),
    pixel=_CODES_256,
    semantic=_CODES_256,
    shortcut=0.6,
    decoder=PixelDecoderConfig(channels=(128, 128, 512, 512, 1024), layers=2, groups=32, grid=16),
    text=_QWEN_3B,
    pixel_head=_HEAD,
    semantic_head=_HEAD,
    visual_positions=False,
    semantic_given_pixel=False,
)  # fmt: skip
_CODES_384 = replace(_CODES_256, depth=8)
DUALTOKEN_3B = replace(
    DUALTOKEN_3B_256, vision=replace(_SO400M, patch_size=14, image_size=384), pixel=_CODES_384, semantic=_CODES_384,
    decoder=replace(DUALTOKEN_3B_256.decoder, grid=24),
)  # fmt: skip
# The public code's stage 1, the only one of its three that runs: 20 epochs of 10 M images by 8 x 32, warm-up, AdamW and
# weights of the losses are its own; the adversary learns and counts from the middle of the first epoch.
_EPOCH = 10_000_000 // 256
FULL_STAGES = (
    StageConfig(
        "tokenizer", DualTokenizerObjective(gan_start=_EPOCH // 2, discriminator_start=_EPOCH // 2),
        (*TOKENIZER, "discriminator.*"), data=ImageData(), steps=20 * _EPOCH, batch=256, lr=7.2e-5, lr_end=0.0,
        warmup=10_000, weight_decay=1e-4, betas=(0.5, 0.9), max_grad_norm=1.0,
    ),
    # Nothing was published of this stage: VILA-U's learning rate and batch, steps for 15 M samples, half of them
    # conversations about images.
    StageConfig(
        "unified", DualNextTokenObjective(mean_over="images"), (*LANGUAGE, *HEADS), data=CaptionDialogueData(),
        steps=15_000_000 // 1024, batch=1024, lr=1e-4, lr_end=0.0, warmup=440, betas=(0.9, 0.95), max_grad_norm=1.0,
    ),
)  # fmt: skip


def dualtoken_3b() -> DualTokenRecipe:
    """The published system at 384 pixels: SigLIP 2 So400m, patches of 14, 27 x 27 x 8 codes, Qwen2.5-3B."""
    return DualTokenRecipe(
        name="dualtoken-3b", model=DUALTOKEN_3B, stages=FULL_STAGES, max_prompt_tokens=300,
        published=("model.tokenizer.encoder", "model.tokenizer.text_tower", "model.language"),
        sampling=CodeSampling(temperature=1.0, top_k=900, top_p=0.96, guidance=3.0),  # VILA-U's
        perceptual=DualPerceptualConfig(teacher=0.0, lpips=1.0),
        discriminator=PatchDiscriminatorConfig(width=64, layers=3),
    )


def dualtoken_3b_256() -> DualTokenRecipe:
    """`dualtoken-3b` at 256 pixels: patches of 16, 16 x 16 x 4 codes."""
    return replace(dualtoken_3b(), name="dualtoken-3b-256", model=DUALTOKEN_3B_256)
