"""Tiny random checkpoints in the published formats, written by the libraries that own them."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from spar.worlds.shapes.tokenizer import build_tokenizer

WIDTH, LAYERS, CHANNELS, CAPTION = 32, 4, 8, 48
STRIDE = 28


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights that keep activations near unit size, every norm, bias and position at random too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / min(parameter[0].numel(), 64) ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    return module.eval().requires_grad_(False)


def mllm(*, tied: bool = True, layers: int = LAYERS) -> InternVLForConditionalGeneration:
    """InternVL3's structure: biases in the tower, dynamic rotary scaling, tokens of stride 28."""
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=(112, 112),
            patch_size=(14, 14), attention_bias=True, layer_scale_init_value=0.1,
        ),
        text_config=Qwen2Config(
            vocab_size=192, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=tied,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}, eos_token_id=2, pad_token_id=0,
            bos_token_id=1,
        ),
        image_token_id=5, image_seq_length=16, tie_word_embeddings=tied,
    )  # fmt: skip
    model = randomize(InternVLForConditionalGeneration(config))
    if tied:
        model.tie_weights()
    return model


def save_hf(model: InternVLForConditionalGeneration, folder: Path, *, shard: str = "5GB", **config: Any) -> Path:
    """transformers' layout (`InternVL3-*-hf`); `config` replaces fields of config.json, `...` removes one."""
    model.save_pretrained(folder, max_shard_size=shard)
    build_tokenizer().save_pretrained(folder)
    edit_json(folder / "config.json", **config)
    return folder


_TO_ORIGINAL = (
    (".attention.projection_layer.", ".attn.proj."),
    (".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."), (".lambda_1", ".ls1"),
    (".lambda_2", ".ls2"), ("encoder.layer.", "encoder.layers."),
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
)  # fmt: skip
_MLP1 = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}


def original_vision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The vision tower's tensors under OpenGVLab's names: q, k and v in one matrix."""
    out = {}
    for key, value in state.items():
        if ".attention.k_proj." in key or ".attention.v_proj." in key:
            continue
        if ".attention.q_proj." in key:
            value = torch.cat([state[key.replace("q_proj", f"{name}_proj")] for name in "qkv"])
            key = key.replace(".attention.q_proj.", ".attn.qkv.")
        for ours, theirs in _TO_ORIGINAL:
            key = key.replace(ours, theirs)
        out[key] = value.clone()
    return out


def original_projector(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{_MLP1[key.split('.')[0]]}.{key.split('.')[1]}": value.clone() for key, value in state.items()}


def save_original(model: InternVLForConditionalGeneration, folder: Path) -> Path:
    """OpenGVLab's own layout (`InternVL3-*`): its names, its configuration, code that must not run."""
    folder.mkdir(parents=True)
    inner = model.model
    tensors = {f"vision_model.{k}": v for k, v in original_vision(inner.vision_tower.state_dict()).items()}
    tensors |= {f"mlp1.{k}": v for k, v in original_projector(inner.multi_modal_projector.state_dict()).items()}
    tensors |= {f"language_model.model.{k}": v.clone() for k, v in inner.language_model.state_dict().items()}
    tensors["language_model.lm_head.weight"] = model.lm_head.weight.clone()
    save_file(tensors, folder / "model.safetensors")
    text, vision = model.config.text_config, model.config.vision_config
    config = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1, "force_image_size": 112,
        "llm_config": {
            "model_type": "qwen2", "vocab_size": 192, "hidden_size": WIDTH, "hidden_act": "silu",
            "num_hidden_layers": text.num_hidden_layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 64, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
            "rope_scaling": {"type": "dynamic", "factor": 2.0}, "tie_word_embeddings": text.tie_word_embeddings,
            "use_sliding_window": False,
        },
        "vision_config": {
            "model_type": "intern_vit_6b", "hidden_size": vision.hidden_size, "hidden_act": "gelu",
            "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 112,
            "patch_size": 14, "qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm",
            "initializer_factor": 0.1, "layer_norm_eps": 1e-6, "drop_path_rate": 0.1,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    build_tokenizer().save_pretrained(folder)
    return folder


def autoencoder() -> AutoencoderDC:
    """DC-AE's structure with its stride of 32, attention in the last stages."""
    return randomize(
        AutoencoderDC(
            latent_channels=CHANNELS, attention_head_dim=8,
            encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            decoder_block_types=("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
            encoder_block_out_channels=(8, 8, 8, 8, 16, 16), decoder_block_out_channels=(8, 8, 8, 8, 16, 16),
            encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), decoder_qkv_multiscales=((),) * 5 + ((5,),),
            downsample_block_type="Conv", upsample_block_type="interpolate", scaling_factor=0.41407,
        ),
        seed=1,
    )  # fmt: skip


def dit(*, layers: int = 3) -> SanaTransformer2DModel:
    return randomize(
        SanaTransformer2DModel(
            in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=4, attention_head_dim=8, num_layers=layers,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=CAPTION,
            mlp_ratio=2.5, sample_size=4, patch_size=1,
        ),
        seed=2,
    )  # fmt: skip


def save_dit(model: SanaTransformer2DModel, folder: Path, *, shift: float = 3.0) -> Path:
    """A SANA repository: transformer/ and its scheduler, whose shift is called `flow_shift`."""
    model.save_pretrained(folder / "transformer")
    DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=shift).save_pretrained(folder / "scheduler")
    return folder


def edit_json(path: Path, **fields: Any) -> None:
    """Replace fields of a JSON object; `...` removes one."""
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(path: Path, change: Any) -> None:
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
