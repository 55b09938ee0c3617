"""DC-AE in diffusers' layout (`mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers`)."""

import inspect
from typing import Any

from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

from spar.checkpoints.formats.checkpoint_source import CheckpointSource
from spar.checkpoints.formats.foreign_config import ForeignConfig, is_whole
from spar.checkpoints.formats.key_map import TensorSlice
from spar.checkpoints.model_header import check_latent_scale
from spar.common.errors import InputError
from spar.models.config import AutoencoderConfig

FILES = ("config.json", "diffusion_pytorch_model*.json", "diffusion_pytorch_model*.safetensors")
STEM = "diffusion_pytorch_model"
DECODER, PIXEL_ENCODER = "tokenizer.decoder", "pixel_encoder"


def read_config(source: CheckpointSource) -> tuple[AutoencoderConfig, float]:
    """Read the sizes of a checkpoint and the factor that scales its latents to unit variance.

    Missing fields have the library's defaults.

    Raises:
        InputError: a field of another type, or a configuration that ours cannot hold.
    """
    given = source.config("config.json")
    given.expect("_class_name", "AutoencoderDC")
    parameters = inspect.signature(AutoencoderDC.__init__).parameters
    known = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    config = ForeignConfig({**known, **given.values}, given.where)
    config.expect("in_channels", 3)
    for name in ("encoder_out_shortcut", "decoder_in_shortcut"):
        config.expect(name, True)
    config.expect("decoder_conv_act_fn", "relu")
    channels = config.wholes("encoder_block_out_channels")
    if channels != config.wholes("decoder_block_out_channels"):
        raise InputError(f"{given.where}: expected encoder_ and decoder_block_out_channels alike, got different ones")
    for name, value in (("decoder_norm_types", "rms_norm"), ("decoder_act_fns", "silu")):
        if set(_each(config, name, len(channels))) != {value}:
            raise InputError(f"{given.where}: {name}: expected {value!r} throughout, got {config.get(name)!r}")
    unshuffles = config.get("downsample_block_type") == "pixel_unshuffle"
    interpolates = config.get("upsample_block_type") == "interpolate"
    halves: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        halves[f"{half}_layers"] = config.wholes(f"{half}_layers_per_block")
        halves[f"{half}_blocks"] = _each(config, f"{half}_block_types", len(channels))
        halves[f"{half}_multiscales"] = _multiscales(config, f"{half}_qkv_multiscales")
    sizes = AutoencoderConfig(
        latent_channels=config.whole("latent_channels"), head_dim=config.whole("attention_head_dim"),
        channels=channels, downsample="pixel_unshuffle" if unshuffles else "Conv",
        upsample="interpolate" if interpolates else "pixel_shuffle", **halves,
    )
    return sizes, check_latent_scale(config.get("scaling_factor"), given.where, "scaling_factor")


def _each(config: ForeignConfig, name: str, count: int) -> tuple[str, ...]:
    """One name per resolution; a single one applies to all."""
    value = config.get(name)
    if isinstance(value, str):
        return (value,) * count
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise InputError(f"{config.where}: {name}: expected a name or a list of names, got {value!r}")
    return tuple(value)


def _multiscales(config: ForeignConfig, name: str) -> tuple[tuple[int, ...], ...]:
    """The scales of attention at each resolution."""
    value = config.get(name)
    lists = isinstance(value, list | tuple) and all(isinstance(one, list | tuple) for one in value)
    if not lists or not all(is_whole(scale) for one in value for scale in one):
        raise InputError(f"{config.where}: {name}: expected lists of whole numbers, got {value!r}")
    return tuple(tuple(one) for one in value)


def translate(key: str) -> tuple[TensorSlice, ...] | None:
    """Translate a tensor's name to ours; both halves are in one file."""
    half, _, rest = key.partition(".")
    prefix = {"decoder": DECODER, "encoder": PIXEL_ENCODER}.get(half)
    return None if prefix is None else (TensorSlice(f"{prefix}.network.{rest}"),)
