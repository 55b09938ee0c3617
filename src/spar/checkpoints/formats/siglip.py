"""SigLIP and SigLIP 2 of a fixed image size (`google/siglip2-so400m-*`), in transformers' layout."""

from spar.checkpoints.formats.foreign_config import ForeignConfig
from spar.checkpoints.formats.key_map import TensorSlice
from spar.models.dualtoken.config import TextTowerConfig, VisionTowerConfig
from spar.models.dualtoken.towers import TOWER_FIELDS

ENCODER, TEXT_TOWER = "tokenizer.encoder", "tokenizer.text_tower"
# transformers' defaults, which the published configurations leave out where they apply.
VISION_DEFAULTS = {
    "hidden_size": 768, "layers": 12, "heads": 12, "intermediate_size": 3072, "norm_eps": 1e-6
}  # fmt: skip


def read_config(config: ForeignConfig) -> tuple[VisionTowerConfig, TextTowerConfig]:
    """Read the sizes of both towers; unsupported settings are refused."""
    config.expect("model_type", "siglip")
    vision, text = config.inner("vision_config"), config.inner("text_config")
    for tower in (vision, text):
        tower.expect_if_given(hidden_act="gelu_pytorch_tanh")
    vision.expect_if_given(num_channels=3, vision_use_head=True)
    text.expect_if_given(projection_size=vision.whole("hidden_size", default=768))
    return (
        VisionTowerConfig(
            **vision.numbers(VisionTowerConfig, TOWER_FIELDS, **VISION_DEFAULTS),
            patch_size=vision.whole("patch_size", default=16),
            image_size=vision.whole("image_size", default=224),
        ),
        TextTowerConfig(
            **text.numbers(TextTowerConfig, TOWER_FIELDS, **VISION_DEFAULTS),
            vocab_size=text.whole("vocab_size", default=32000),
            positions=text.whole("max_position_embeddings", default=64),
            pad_token_id=0,
        ),
    )


def translate(key: str) -> tuple[TensorSlice, ...] | None:
    """Translate a tensor's name to ours; the logits' scale and bias belong to the contrastive loss."""
    if key in ("logit_scale", "logit_bias"):
        return ()
    for theirs, ours in (("vision_model.", ENCODER), ("text_model.", TEXT_TOWER)):
        if key.startswith(theirs):
            return (TensorSlice(f"{ours}.network.{key.removeprefix(theirs)}"),)
    return None
