"""The unified tokenizer with the interface of diffusers' autoencoders.

It replaces `AutoencoderDC`: `encode(x).latent`, `decode(z).sample`, pixels in [-1, 1], and a latent that is multiplied
by `config.scaling_factor` before a network denoises it. It is deterministic and has no `latent_dist`.
"""

from pathlib import Path

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor, nn

from spar.checkpoints.model_header import check_replaceable
from spar.checkpoints.spar_format import FORMAT, load_tokenizer, save_tokenizer
from spar.common.errors import InputError
from spar.common.files import atomic_directory
from spar.common.limits import MAX_TILE, check_int_range
from spar.models.tiling import MIN_TILE
from spar.models.tokenizer import UnifiedTokenizer


class AutoencoderSpar(nn.Module):
    """An autoencoder around a `UnifiedTokenizer`; `from_pretrained` loads one, in evaluation mode and frozen.

    `config` has the fields that diffusers' pipelines read: `latent_channels`, `scaling_factor`, `sample_size`,
    `spatial_compression_ratio` (pixels of a latent cell's side) and the channels of the DC-AE, whose number also gives
    that ratio if it is a power of two.
    """

    def __init__(self, tokenizer: UnifiedTokenizer) -> None:
        super().__init__()
        sizes = tokenizer.config
        self.tokenizer = tokenizer
        self.tile: int | None = None
        self.spatial_compression_ratio = sizes.token_stride
        self.config = FrozenDict(
            in_channels=3,
            latent_channels=sizes.autoencoder.latent_channels,
            scaling_factor=float(tokenizer.latent_scale),
            sample_size=sizes.image_size,
            spatial_compression_ratio=sizes.token_stride,
            encoder_block_out_channels=list(sizes.autoencoder.channels),
            decoder_block_out_channels=list(sizes.autoencoder.channels),
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, *, torch_dtype: torch.dtype | None = None) -> "AutoencoderSpar":
        """Load the folder of a tokenizer, or the tokenizer of a SPAR folder, in `torch_dtype` (float32 by default).

        Raises:
            InputError: a missing, foreign or damaged folder.
        """
        folder = Path(path)
        if (folder / "tokenizer" / "config.json").is_file():
            folder = folder / "tokenizer"
        return cls(load_tokenizer(folder)).to(torch_dtype or torch.float32)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer alone as a folder, weights as they are.

        Raises:
            InputError: the path has other contents, or cannot be written.
        """
        scale = torch.tensor(self.config["scaling_factor"])  # `to` another type has rounded the tokenizer's own
        self.tokenizer.latent_scale = scale.to(self.device)
        check_replaceable(Path(path), f"{FORMAT}-tokenizer")
        with atomic_directory(Path(path)) as folder:
            save_tokenizer(self.tokenizer, folder)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def enable_tiling(self, tile: int = 32) -> None:
        """Decode latents of more than `tile` cells per side in tiles (`spar.models.tiling`)."""
        check_int_range("tile", tile, MIN_TILE, MAX_TILE)
        self.tile = tile

    def disable_tiling(self) -> None:
        self.tile = None

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """Pixels `[B, 3, H, W]` in [-1, 1] to `latent` `[B, D_p, h, w]`, not scaled.

        Raises:
            InputError: the sides are not multiples of `spatial_compression_ratio`.
        """
        stride = self.spatial_compression_ratio
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % stride or x.shape[3] % stride:
            raise InputError(f"expected pixels [B, 3, H, W] with sides in multiples of {stride}, got {tuple(x.shape)}")
        latent = self.tokenizer.encode((x + 1) / 2).z_f
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """A latent `[B, D_p, h, w]`, not scaled, to pixels `sample` `[B, 3, H, W]` around [-1, 1], not clamped."""
        sample = 2 * self.tokenizer.decode(z, self.tile) - 1
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict)
