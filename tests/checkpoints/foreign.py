"""Tiny random checkpoints in the published formats, written by the libraries that own them."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
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


# The published vocabulary: Qwen2.5's 151,643 tokens and its own 22 special ones, then InternVL's nine.
QWEN_TOKENS = 151_643
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
INTERN_SPECIAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
INTERN_ROWS = QWEN_TOKENS + len(QWEN_SPECIAL) + len(INTERN_SPECIAL)
PUBLISHED_IDS = {"image_token_id": 151_667, "eos_token_id": 151_645, "pad_token_id": 151_643, "bos_token_id": 151_643}
SMALL_IDS = {"image_token_id": 5, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save_published_tokenizer(folder: Path, *more: str) -> None:
    """A tokenizer of the published length and structure, and `more` special tokens after it.

    A byte-level BPE in which every token but the bytes is a merge, Qwen's way to split words, every special token at
    its published place. Which pairs merge is ours: all pairs of bytes, then triples.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate(letters)}
    merges = [(first, second) for first in letters for second in letters]
    words |= {first + second: len(words) + number for number, (first, second) in enumerate(merges)}
    for first, second in merges[:]:
        for third in letters:
            if len(words) == QWEN_TOKENS:
                break
            words[first + second + third] = len(words)
            merges.append((first + second, third))
    tokenizer = Tokenizer(models.BPE(words, merges))
    tokenizer.normalizer = normalizers.NFC()
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), whole])
    tokenizer.decoder = decoders.ByteLevel()
    special = (*QWEN_SPECIAL, *INTERN_SPECIAL, *more)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {str(QWEN_TOKENS + i): {"content": text, **plain, "special": True} for i, text in enumerate(special)}
    config = {
        "added_tokens_decoder": added, "additional_special_tokens": list(special[3:]), "bos_token": None,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "extra_special_tokens": {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"} if more else {},
        "model_max_length": 8192, "pad_token": "<|endoftext|>", "processor_class": "InternVLProcessor",
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_published_files(folder: Path) -> None:
    """The small files beside the weights of an `InternVL3-*-hf` repository."""
    processor = {
        "crop_to_patches": False, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406], "image_processor_type": "GotOcr2ImageProcessorFast",
        "image_std": [0.229, 0.224, 0.225], "max_patches": 12, "min_patches": 1, "resample": 3,
        "rescale_factor": 1 / 255, "size": {"height": 112, "width": 112},
    }  # fmt: skip
    files = {
        "preprocessor_config.json": processor,
        "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor"},
        "processor_config.json": {"image_seq_length": 16, "processor_class": "InternVLProcessor"},
        "generation_config.json": {"eos_token_id": 151_645, "pad_token_id": 151_643, "_from_model_config": True},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['role'] }}{% endfor %}")


def mllm(*, tied: bool = True, layers: int = LAYERS, rows: int = 192) -> InternVLForConditionalGeneration:
    """InternVL3's structure: biases in the tower, dynamic rotary scaling, tokens of stride 28.

    Args:
        rows: of words; the ids of the special tokens are the published ones where they have a row.
    """
    ids = PUBLISHED_IDS if rows >= INTERN_ROWS else SMALL_IDS
    image = ids["image_token_id"]
    special = {name: value for name, value in ids.items() if name != "image_token_id"}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=(112, 112),
            patch_size=(14, 14), attention_bias=True, layer_scale_init_value=0.1,
        ),
        text_config=Qwen2Config(
            vocab_size=rows, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=tied,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}, **special,
        ),
        image_token_id=image, image_seq_length=16, tie_word_embeddings=tied,
    )  # fmt: skip
    model = randomize(InternVLForConditionalGeneration(config))
    if tied:
        model.tie_weights()
    return model


def save_hf(model: InternVLForConditionalGeneration, folder: Path, *, shard: str = "5GB", **config: Any) -> Path:
    """transformers' layout (`InternVL3-*-hf`); `config` replaces fields of config.json, `...` removes one."""
    model.save_pretrained(folder, max_shard_size=shard)
    if model.config.text_config.vocab_size >= INTERN_ROWS:
        save_published_tokenizer(folder, "<video>")
        save_published_files(folder)
    else:
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
