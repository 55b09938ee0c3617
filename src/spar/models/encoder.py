"""The semantic encoder E_s: InternViT, 2x2 patch merge, projector (SPAR section 3.1; InternVL3).

B batch, S image side, P = S / patch, N = (P / 2)^2 visual tokens, D_s the LLM's width.
"""

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLVisionConfig, InternVLVisionModel, Qwen2Config
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from spar.models.attention import ATTENTION
from spar.models.config import TextConfig, VisionConfig, library_fields

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

# transformers' names for our fields, by which its configurations are built and published ones are read.
VISION_FIELDS = {
    "hidden_size": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size", "norm_eps": "layer_norm_eps",
}  # fmt: skip
TEXT_FIELDS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings", "rms_norm_eps": "rms_norm_eps",
}  # fmt: skip


def vision_config(config: VisionConfig) -> InternVLVisionConfig:
    """The library's configuration; q, k and v have biases as in the published checkpoints."""
    return InternVLVisionConfig(
        **library_fields(config, VISION_FIELDS),
        image_size=(config.image_size, config.image_size),
        patch_size=(config.patch_size, config.patch_size),
        attention_bias=True,
        layer_scale_init_value=config.layer_scale,
    )


def qwen_config(config: TextConfig) -> Qwen2Config:
    """The LLM's configuration, as transformers has it."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factor > 1:
        rope |= {"rope_type": "dynamic", "factor": config.rope_factor}
    return Qwen2Config(
        **library_fields(config, TEXT_FIELDS),
        rope_parameters=rope,
        tie_word_embeddings=config.tied_head,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=None,
    )


def internvl_config(vision: VisionConfig, text: TextConfig) -> InternVLConfig:
    """The configuration of the whole MLLM for `InternVLForConditionalGeneration`."""
    return InternVLConfig(
        vision_config=vision_config(vision),
        text_config=qwen_config(text),
        image_token_id=text.image_token_id,
        image_seq_length=(vision.image_size // (2 * vision.patch_size)) ** 2,
        tie_word_embeddings=text.tied_head,
    )


def merge_patches(features: Tensor, height: int, width: int) -> Tensor:
    """InternVL's pixel shuffle at ratio 0.5: `[B, height * width, C]` to `[B, height * width / 4, 4 C]`.

    Channel order within a merged token is row-major over the 2x2 square, as in `InternVLModel.pixel_shuffle`.
    """
    batch, _, channels = features.shape
    squares = features.view(batch, height // 2, 2, width // 2, 2, channels)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(batch, height * width // 4, 4 * channels)


class SemanticEncoder(nn.Module):
    """Pixels in [0, 1] to projected visual tokens `f_v`; the module names are transformers' own."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, vision: VisionConfig, text: TextConfig) -> None:
        super().__init__()
        library = vision_config(vision)
        library._attn_implementation = ATTENTION
        self.patch_size = vision.patch_size
        self.vision_tower = InternVLVisionModel(library)
        self.multi_modal_projector = InternVLMultiModalProjector(internvl_config(vision, text))
        # In float32 even where a library builds models with another default type.
        for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """`[B, 3, S, S]` in [0, 1] to `f_v`: `[B, N, D_s]`."""
        height, width = pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size
        x = (pixels - self.pixel_mean) / self.pixel_std                   # [B, 3, S, S]
        x = self.vision_tower(x).last_hidden_state[:, 1:]                 # [B, P^2, D_vit], without CLS
        x = merge_patches(x, height, width)                              # [B, N, 4 D_vit]
        return self.multi_modal_projector(x)                             # [B, N, D_s]
