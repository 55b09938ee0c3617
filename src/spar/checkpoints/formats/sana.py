"""SANA in diffusers' layout (`Efficient-Large-Model/Sana_*_512px_diffusers`): transformer/ and scheduler/.

That layout has a trap: its scheduler's configuration has `flow_shift`, and a scheduler class that reads `shift`
silently uses 1. Here the shift of sampling is that of the field which the named class reads.
"""

from dataclasses import replace

from spar.checkpoints.formats.checkpoint_source import CheckpointSource
from spar.checkpoints.formats.key_map import TensorSlice
from spar.common.errors import InputError
from spar.models.config import DenoiserConfig
from spar.models.denoiser import SANA_FIELDS

SCHEDULER = "scheduler/scheduler_config.json"
FILES = (
    "transformer/config.json", "transformer/diffusion_pytorch_model*.json",
    "transformer/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.bf16.safetensors",
    "transformer/diffusion_pytorch_model-*.safetensors", SCHEDULER,
)  # fmt: skip
FOLDER, STEM = "transformer", "diffusion_pytorch_model"
DENOISER = "denoiser"
SHIFTS = {"DPMSolverMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}


def read_config(
    source: CheckpointSource, base: DenoiserConfig, latent_channels: int, grid: int
) -> tuple[DenoiserConfig, float | None]:
    """Read the sizes of a checkpoint for latents of these channels, and the shift of sampling (None: no scheduler).

    Settings that SANA's configuration lacks are those of `base`. `grid` is the model's own, in cells per side.

    Raises:
        InputError: a configuration that ours cannot hold, as sine positions that are scaled for another grid.
    """
    config = source.config(f"{FOLDER}/config.json")
    config.expect("_class_name", "SanaTransformer2DModel")
    config.expect("patch_size", 1)
    config.expect_if_given(attention_bias=False, norm_elementwise_affine=False, guidance_embeds=False)
    config.expect_if_given(qk_norm=None, timestep_scale=1, dropout=0)
    channels = config.whole("in_channels")
    config.expect_if_given(out_channels=channels)
    if channels != latent_channels:
        raise InputError(f"the DiT denoises {channels} channels, expected the autoencoder's {latent_channels}")
    numbers = config.numbers(DenoiserConfig, SANA_FIELDS, mlp_ratio=2.5, norm_eps=1e-6)
    config.expect("cross_attention_dim", numbers["heads"] * numbers["head_dim"])
    scale = config.number("interpolation_scale") if "interpolation_scale" in config else None
    side = config.whole("sample_size", default=32)
    if scale is not None and side != grid:
        raise InputError(
            f"{config.where}: interpolation_scale: expected none where sample_size is not the model's grid of {grid} "
            f"cells per side, since its positions are scaled by both, got {scale:g} and sample_size {side}"
        )
    sizes = replace(base, **numbers, interpolation_scale=scale, self_attention="linear")
    return sizes, _shift(source)


def _shift(source: CheckpointSource) -> float | None:
    if not (source.folder / SCHEDULER).is_file():
        return None
    config = source.config(SCHEDULER)
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in SHIFTS:
        raise InputError(f"{config.where}: expected a scheduler of the kinds {', '.join(SHIFTS)}, got {kind!r}")
    return config.number(SHIFTS[kind], default=1.0)


def translate(key: str) -> tuple[TensorSlice, ...] | None:
    """Where a tensor of SANA's file goes; None for one that is not read."""
    return (TensorSlice(f"{DENOISER}.network.{key}"),)
