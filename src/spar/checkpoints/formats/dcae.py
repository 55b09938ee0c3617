"""DC-AE in diffusers' layout (`mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers`)."""

import inspect
from typing import Any

from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

from spar.checkpoints.formats.checkpoint_source import CheckpointSource
from spar.checkpoints.formats.foreign_config import ForeignConfig
from spar.checkpoints.formats.key_map import TensorSlice
from spar.common.errors import InputError
from spar.models.config import AutoencoderConfig

FILES = ("config.json", "diffusion_pytorch_model*.json", "diffusion_pytorch_model*.safetensors")
STEM = "diffusion_pytorch_model"
DECODER, PIXEL_ENCODER = "tokenizer.decoder", "pixel_encoder"


def read_config(source: CheckpointSource) -> tuple[AutoencoderConfig, float]:
    """Read the sizes of a checkpoint and the factor that scales its latents to unit variance.

    Missing fields have the library's defaults.
    """
    given = ForeignConfig.read(source.folder / "config.json")
    given.expect("_class_name", "AutoencoderDC")
    parameters = inspect.signature(AutoencoderDC.__init__).parameters
    known = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    config = ForeignConfig({**known, **given.values}, given.where)
    config.expect("in_channels", 3)
    for name in ("encoder_out_shortcut", "decoder_in_shortcut"):
        config.expect(name, True)
    config.expect("decoder_conv_act_fn", "relu")
    channels = tuple(config.get("encoder_block_out_channels"))
    if channels != tuple(config.get("decoder_block_out_channels")):
        raise InputError(f"{given.where}: expected encoder_ and decoder_block_out_channels alike, got different ones")
    for name, value in (("decoder_norm_types", "rms_norm"), ("decoder_act_fns", "silu")):
        if set(_each(config.get(name), len(channels))) != {value}:
            raise InputError(f"{given.where}: {name}: expected {value!r} throughout, got {config.get(name)!r}")
    unshuffles = config.get("downsample_block_type") == "pixel_unshuffle"
    interpolates = config.get("upsample_block_type") == "interpolate"
    halves: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        halves[f"{half}_layers"] = tuple(config.get(f"{half}_layers_per_block"))
        halves[f"{half}_blocks"] = _each(config.get(f"{half}_block_types"), len(channels))
        halves[f"{half}_multiscales"] = tuple(tuple(scales) for scales in config.get(f"{half}_qkv_multiscales"))
    sizes = AutoencoderConfig(
        latent_channels=config.whole("latent_channels"), head_dim=config.whole("attention_head_dim"),
        channels=channels, downsample="pixel_unshuffle" if unshuffles else "Conv",
        upsample="interpolate" if interpolates else "pixel_shuffle", **halves,
    )
    return sizes, config.number("scaling_factor")


def _each(value: Any, count: int) -> tuple[Any, ...]:
    """One entry per resolution; a single one applies to all."""
    return (value,) * count if isinstance(value, str) else tuple(value)


def translate(key: str) -> tuple[TensorSlice, ...] | None:
    """Translate a tensor's name to ours; both halves are in one file."""
    half, _, rest = key.partition(".")
    prefix = {"decoder": DECODER, "encoder": PIXEL_ENCODER}.get(half)
    return None if prefix is None else (TensorSlice(f"{prefix}.network.{rest}"),)
