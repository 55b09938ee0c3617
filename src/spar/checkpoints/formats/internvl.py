"""InternVL3 with Qwen2.5: transformers' layout (`OpenGVLab/InternVL3-*-hf`) and the original, read without its code.

Their names differ in the vision tower and the projector; the original keeps q, k and v in one matrix. Older files name
the LLM `language_model.model`, newer ones `model.language_model`; both are known.
"""

import logging
import re
from dataclasses import replace
from typing import Any

import torch

from spar.checkpoints.formats.checkpoint_source import CheckpointSource
from spar.checkpoints.formats.foreign_config import ForeignConfig
from spar.checkpoints.formats.key_map import TensorReader, TensorSlice
from spar.common.errors import InputError
from spar.models.config import TextConfig, VisionConfig
from spar.models.encoder import TEXT_FIELDS, VISION_FIELDS
from spar.processing.prompts import IMAGE_TOKEN, TURN_END

log = logging.getLogger("spar.checkpoints")

FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt")  # no .py: nothing that could run
ENCODER, LANGUAGE = "tokenizer.encoder", "language"

_FROM_ORIGINAL = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding.": "embeddings.patch_embeddings.projection.",
    "encoder.layers.": "encoder.layer.",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "attn.proj.": "attention.projection_layer.",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
}
_PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
_QKV = re.compile(r"encoder\.layer\.(\d+)\.attn\.qkv\.(weight|bias)")


def read_config(
    source: CheckpointSource, files: TensorReader, text_tokenizer: Any, *, own_vocabulary: bool = False
) -> tuple[VisionConfig, TextConfig]:
    """Read the sizes of a checkpoint in either layout; unsupported settings are refused.

    Args:
        own_vocabulary: the LLM in `files` has other rows of words than the source's configuration says.
    """
    config = source.config("config.json")
    config.expect_if_given(downsample_ratio=0.5, ps_version="v2", projector_hidden_act="gelu")
    config.expect_if_given(vision_feature_layer=-1, select_layer=-1)
    text = config.inner("text_config", "llm_config")
    stated = config.get("tie_word_embeddings", default=text.get("tie_word_embeddings", default=False))
    tied = is_tied(files, stated=bool(stated))
    read = read_text_config(text, config, tied, text_tokenizer)
    if own_vocabulary:
        read = replace(read, vocab_size=len(files.shapes[_embeddings(files)]))
    return _vision(config.inner("vision_config")), read


def _embeddings(files: TensorReader) -> str:
    """The name of the LLM's word embeddings; a connector made of LLM layers may have some of its own."""
    found = [key for key in files.shapes if key.endswith("embed_tokens.weight") and "connector" not in key]
    if len(found) != 1:
        raise InputError(f"{files.path}: expected one matrix of word embeddings (embed_tokens), got {len(found)}")
    return found[0]


def is_tied(files: TensorReader, *, stated: bool) -> bool:
    """Whether an LLM's head is its word embeddings: none is stored, or the configuration says so and it is the same.

    Of a head that is stored and differs, the weights are believed, as transformers 5 does.
    """
    head = next((key for key in files.shapes if key.endswith("lm_head.weight")), None)
    if head is None:
        return True
    if not stated:
        return False
    words = _embeddings(files)
    same = files.shapes[words].shape == files.shapes[head].shape and torch.equal(files.read(words), files.read(head))
    if not same:
        log.warning("%s: its configuration says that the head is tied, but %s differs; both are kept", files.path, head)
    return same


def _vision(config: ForeignConfig) -> VisionConfig:
    config.expect_if_given(hidden_act="gelu", norm_type="layer_norm", num_channels=3)
    config.expect_if_given(use_qk_norm=False, qk_normalization=False, use_mask_token=False)
    config.expect_if_given(use_absolute_position_embeddings=True)
    config.expect("qkv_bias" if "qkv_bias" in config else "attention_bias", True, default=False)
    return VisionConfig(
        **config.numbers(VisionConfig, VISION_FIELDS, norm_eps=1e-6),
        patch_size=config.side("patch_size"),
        image_size=config.side("image_size"),
        layer_scale=config.number("layer_scale_init_value", "initializer_factor", default=0.1),
    )


def read_text_config(config: ForeignConfig, whole: ForeignConfig, tied: bool, tokenizer: Any) -> TextConfig:
    """Read the sizes of a Qwen2 LLM; `whole` may name the image token, `tokenizer` knows it."""
    config.expect_if_given(model_type="qwen2", hidden_act="silu", use_sliding_window=False)
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    for token, found in ((IMAGE_TOKEN, image), (TURN_END, end)):
        if found is None or found == tokenizer.unk_token_id:
            raise InputError(f"{whole.where}: expected a text tokenizer that knows {token}, got none")
    stated = whole.get("image_token_id", "image_token_index", default=image)  # older revisions have the second name
    if stated != image:
        raise InputError(f"{whole.where}: image_token_id: expected that of {IMAGE_TOKEN}, {image}, got {stated!r}")
    theta, factor = _rope(config)
    return TextConfig(
        **config.numbers(TextConfig, TEXT_FIELDS, kv_heads=config.get("num_attention_heads"), rms_norm_eps=1e-6),
        rope_theta=theta,
        rope_factor=factor,
        tied_head=tied,
        image_token_id=image,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )


def _rope(config: ForeignConfig) -> tuple[float, float]:
    """Base and factor of the rotary positions, from their newer field or their two older ones."""
    name = next((name for name in ("rope_parameters", "rope_scaling") if name in config), None)
    rope = config.inner(name) if name else ForeignConfig({}, config.where)
    kind = rope.get("rope_type", "type", default="default")
    theta = rope.number("rope_theta", default=config.number("rope_theta", default=10000.0))
    if kind not in ("default", "dynamic"):
        raise InputError(f"{rope.where}: expected rope_type default or dynamic, got {kind!r}")
    return theta, rope.number("factor") if kind == "dynamic" else 1.0


def translate(key: str, *, head: bool) -> tuple[TensorSlice, ...] | None:
    """Translate a tensor's name in either layout to ours; `head`: whether the model has a separate head."""
    key = re.sub(r"^model\.(?=(language_model|vision_tower|multi_modal_projector)\.)", "", key)
    if re.fullmatch(r"(language_model\.)?lm_head\.weight", key):
        return (TensorSlice(f"{LANGUAGE}.head.weight"),) if head else ()
    if key.startswith("language_model."):
        return (TensorSlice(f"{LANGUAGE}.network." + re.sub(r"^language_model\.(model\.)?", "", key)),)
    if key.startswith(("vision_tower.", "multi_modal_projector.")):
        return (TensorSlice(f"{ENCODER}.{key}"),)
    if key.startswith("mlp1."):
        return translate_projector(key.removeprefix("mlp1."))
    if key.startswith("vision_model."):
        return translate_vision(key.removeprefix("vision_model."))
    return None


def translate_vision(key: str) -> tuple[TensorSlice, ...]:
    """Translate a name within the original vision tower."""
    for old, new in _FROM_ORIGINAL.items():
        key = re.sub(rf"(^|(?<=\.)){re.escape(old)}", new, key)
    if fused := _QKV.fullmatch(key):
        layer, kind = fused.groups()
        start = f"{ENCODER}.vision_tower.encoder.layer.{layer}.attention."
        return tuple(TensorSlice(f"{start}{name}_proj.{kind}", i, 3) for i, name in enumerate("qkv"))
    return (TensorSlice(f"{ENCODER}.vision_tower.{key}"),)


def translate_projector(key: str) -> tuple[TensorSlice, ...] | None:
    """Translate a name within the original projector: LayerNorm, Linear, GELU, Linear by number."""
    number, _, kind = key.partition(".")
    if number not in _PROJECTOR:
        return None
    return (TensorSlice(f"{ENCODER}.multi_modal_projector.{_PROJECTOR[number]}.{kind}"),)


def read_text_tokenizer(source: CheckpointSource) -> Any:
    """The checkpoint's own tokenizer, its end token the end of a turn."""
    tokenizer = source.text_tokenizer()
    if tokenizer.pad_token_id is None:
        raise InputError(f"{source.folder}: expected a text tokenizer with a padding token, got none")
    tokenizer.eos_token = TURN_END
    return tokenizer
