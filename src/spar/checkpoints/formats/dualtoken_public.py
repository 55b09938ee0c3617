"""Names and forms of the tensors in DualToken's public tokenizer checkpoints (songweii/DualToken, commit 29e7c84).

They follow the released classes as their public code defines them; no checkpoint of these configurations was published.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from spar.checkpoints.formats.foreign_config import ForeignConfig
from spar.checkpoints.formats.key_map import TensorReader, TensorSlice
from spar.common.errors import InputError
from spar.models.dualtoken.config import PixelDecoderConfig, QuantizerConfig

TOWERS = {"siglip_model.vision_model.": "encoder.network.", "siglip_model.text_model.": "text_tower.network."}
PROJECTIONS = {
    "prequant_sem.": "reduce_semantic.", "prequant_pix.": "reduce_pixel.", "prequant_shortcut.": "reduce_shortcut.",
    "postquant_sem.": "expand_semantic.", "postquant_pix.": "decoder.expand.",
}  # fmt: skip
QUANTIZERS = {"quantizer_sem.": "semantic_quantizer", "quantizer_pix.": "pixel_quantizer"}
BUFFERS = {"weight": "codebook", "cluster_size_ema": "counts", "embed_ema": "sums"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
RESIDUAL = {"nin_shortcut": "conv_shortcut"}
UNUSED = ("siglip_model.logit_scale", "siglip_model.logit_bias")


@dataclass(frozen=True)
class Reshaped(TensorSlice):
    """A whole tensor in another form: its first `rows` rows, with an axis of one before them, or without axes of one
    after the second.
    """

    rows: int | None = None
    stacked: bool = False
    flat: bool = False

    def take(self, tensor: Tensor) -> Tensor:
        tensor = tensor[: self.rows] if self.rows else tensor
        if self.flat and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        return tensor[None] if self.stacked else tensor


def translate(key: str, levels: int, entries: dict[str, int]) -> tuple[TensorSlice, ...] | None:
    """A public name as ours in `DualTokenizer`; empty for what is not needed, None for an unknown one.

    Args:
        levels: resolutions of the decoder.
        entries: of each vocabulary, by our name of its quantiser.
    """
    if key in UNUSED:
        return ()
    for theirs, ours in TOWERS.items():
        if key.startswith(theirs):
            return _as(ours + key.removeprefix(theirs))
    for theirs, ours in PROJECTIONS.items():
        if key.startswith(theirs):
            return () if key.endswith("attn.zero_k_bias") else _as(ours + key.removeprefix(theirs))
    for theirs, ours in QUANTIZERS.items():
        if key.startswith(theirs):
            return _codebook(key.removeprefix(theirs), ours, entries[ours])
    if key.startswith("post_quant_conv."):
        return _as("decoder.block." + key.removeprefix("post_quant_conv.").replace("nin_shortcut", "shortcut"))
    return _decoder(key, levels)


def _as(name: str) -> tuple[TensorSlice, ...]:
    return (TensorSlice(f"tokenizer.{name}"),)


def _codebook(rest: str, quantizer: str, entries: int) -> tuple[TensorSlice, ...] | None:
    """The one codebook, which the checkpoints repeat at every depth (`check_shared`); its last row is padding."""
    found = re.fullmatch(r"codebooks\.(\d+)\.(\w+)", rest)
    if not found or found[2] not in BUFFERS:
        return None
    if int(found[1]):
        return ()
    return (Reshaped(f"tokenizer.{quantizer}.{BUFFERS[found[2]]}", rows=entries, stacked=True),)


def _decoder(key: str, levels: int) -> tuple[TensorSlice, ...] | None:
    """VQGAN's names as diffusers'; its level 0 is the highest resolution, diffusers' last."""
    plain = re.fullmatch(r"decoder\.(conv_in|norm_out|conv_out)\.(weight|bias)", key)
    if plain:
        name = {"norm_out": "conv_norm_out"}.get(plain[1], plain[1])
        return _as(f"decoder.network.{name}.{plain[2]}")
    middle = re.fullmatch(r"decoder\.mid\.(block|attn)_(\d)\.(\w+)\.(weight|bias)", key)
    if middle:
        place = f"mid_block.{'resnets' if middle[1] == 'block' else 'attentions'}.{int(middle[2]) - 1}"
        return _block(middle[1], place, middle[3], middle[4])
    upper = re.fullmatch(r"decoder\.up\.(\d+)\.(block|attn)\.(\d+)\.(\w+)\.(weight|bias)", key)
    if upper:
        part = "resnets" if upper[2] == "block" else "attentions"
        return _block(upper[2], f"up_blocks.{levels - 1 - int(upper[1])}.{part}.{upper[3]}", upper[4], upper[5])
    larger = re.fullmatch(r"decoder\.up\.(\d+)\.upsample\.conv\.(weight|bias)", key)
    if larger:
        return _as(f"decoder.network.up_blocks.{levels - 1 - int(larger[1])}.upsamplers.0.conv.{larger[2]}")
    return None


def _block(kind: str, place: str, name: str, end: str) -> tuple[TensorSlice, ...] | None:
    if kind == "block":
        return _as(f"decoder.network.{place}.{RESIDUAL.get(name, name)}.{end}")
    if name not in ATTENTION:
        return None
    return (Reshaped(f"tokenizer.decoder.network.{place}.{ATTENTION[name]}.{end}", flat=True),)


def check_forms(files: TensorReader) -> None:
    """Refuse what our forms cannot hold: keys with a bias, and a codebook that differs between depths."""
    for key in files.shapes:
        if key.endswith("attn.zero_k_bias") and bool(files.read(key).any()):
            raise InputError(f"{files.path}: expected zeros in {key}, the bias of keys, which ours have not")
        found = re.fullmatch(r"(quantizer_\w+\.codebooks)\.(\d+)\.weight", key)
        if found and int(found[2]) and not torch.equal(files.read(key), files.read(f"{found[1]}.0.weight")):
            raise InputError(f"{files.path}: expected one codebook at every depth, got another one in {key}")


def quantizer_config(settings: ForeignConfig) -> QuantizerConfig:
    """A vocabulary's sizes from its part of config.json."""
    settings.expect("shared_codebook", True)
    shape = settings.get("code_shape")
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(one) is int for one in shape)):
        raise InputError(f"{settings.where}: code_shape: expected rows, columns and depth, got {shape!r}")
    return QuantizerConfig(
        depth=shape[2], entries=settings.whole("n_embed"), width=settings.whole("embed_dim"), codebook="shared",
        decay=settings.number("decay", default=0.99),
    )  # fmt: skip


def decoder_config(settings: ForeignConfig) -> PixelDecoderConfig:
    """The decoder's sizes from `ddconfig` and `decoder_latent_shape`."""
    sizes = settings.inner("ddconfig")
    base, factors = sizes.whole("ch"), sizes.wholes("ch_mult")
    grid, attention = settings.wholes("decoder_latent_shape"), sizes.wholes("attn_resolutions")
    channels = tuple(base * factor for factor in factors)
    if len(set(grid)) != 1 or attention != grid[:1] or sizes.whole("decoder_in_channels") != channels[-1]:
        raise InputError(
            f"{settings.where}: expected attention at the decoder's own square grid {[*grid]} alone, and as many input "
            f"channels as it begins with ({channels[-1]}), got {[*attention]} and {sizes.get('decoder_in_channels')}"
        )
    return PixelDecoderConfig(channels=channels, layers=sizes.whole("num_res_blocks"), groups=32, grid=grid[0])

