"""The unified tokenizer as one of diffusers' autoencoders.

It replaces `AutoencoderDC`: `encode(x).latent`, `decode(z).sample`, pixels in [-1, 1], and a latent that is multiplied
by `config.scaling_factor` before a network denoises it. It is deterministic and has no `latent_dist`.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from safetensors import SafetensorError
from torch import Tensor

from spar.checkpoints.formats.checkpoint_source import fetch
from spar.checkpoints.hub import ADDRESS, model_folder
from spar.checkpoints.spar_format import load_tokenizer
from spar.common.config import from_dict, read_json, to_dict
from spar.common.errors import InputError
from spar.common.limits import MAX_TILE, check_int_range
from spar.inference.base import read_dtype
from spar.inference.diffusers_keywords import refuse_keywords, with_revision
from spar.models.config import SparConfig
from spar.models.tiling import MIN_TILE
from spar.models.tokenizer import UnifiedTokenizer

TILE = 32  # cells per side
WEIGHTS = "diffusion_pytorch_model"  # diffusers' name of a model's files
ASIDE = ".saving"  # where a model's files are written first
MISFITS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def _take_places(new: Path, folder: Path, variant: str | None) -> None:
    """Put the files of a folder in the places of a model's; of its older files those of the same variant go."""
    mark = f".{re.escape(variant)}" if variant else ""
    own = re.compile(rf"{WEIGHTS}(?:{mark}(?:-\d+-of-\d+)?\.safetensors|\.safetensors\.index{mark}\.json)")
    config = folder / "config.json"
    config.unlink(missing_ok=True)
    for path in folder.iterdir():
        if own.fullmatch(path.name):
            path.unlink()
    for path in sorted(new.iterdir(), key=lambda one: one.name == config.name):
        path.replace(folder / path.name)


class AutoencoderSpar(ModelMixin, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]  # two types of config_name
    """An autoencoder around a `UnifiedTokenizer`; `from_pretrained` loads one, in evaluation mode and frozen.

    `config` has besides `sizes` and `scaling_factor` the fields that diffusers' pipelines read:
    `latent_channels`, `sample_size`, `spatial_compression_ratio` (pixels of a latent cell's side) and the channels of
    the DC-AE, whose number also gives that ratio if it is a power of two.

    Args:
        sizes: those of a whole model, the fields of `spar.models.config.SparConfig`.
        scaling_factor: what a latent is multiplied by before a network denoises it.
    """

    @register_to_config
    def __init__(self, sizes: Mapping[str, Any], scaling_factor: float = 1.0) -> None:
        super().__init__()
        if not isinstance(sizes, Mapping):
            raise InputError(f"sizes: expected those of a model, got {type(sizes).__name__}; see from_tokenizer")
        config = from_dict(SparConfig, dict(sizes))
        self.tokenizer = UnifiedTokenizer(config)
        self.tokenizer.latent_scale.fill_(scaling_factor)
        self.spatial_compression_ratio = config.token_stride
        self.use_slicing, self.use_tiling, self.tile = False, False, TILE

    @property
    def config(self) -> FrozenDict:
        sizes = self.tokenizer.config
        derived = {
            "in_channels": 3,
            "latent_channels": sizes.autoencoder.latent_channels,
            "sample_size": sizes.image_size,
            "spatial_compression_ratio": sizes.token_stride,
            "encoder_block_out_channels": list(sizes.autoencoder.channels),
            "decoder_block_out_channels": list(sizes.autoencoder.channels),
        }
        own: Mapping[str, Any] = self._internal_dict  # type: ignore[has-type]
        return FrozenDict({**own, **derived})

    @classmethod
    def from_tokenizer(cls, tokenizer: UnifiedTokenizer) -> "AutoencoderSpar":
        """The autoencoder around a tokenizer, which it shares."""
        with torch.device("meta"):
            made = cls(sizes=to_dict(tokenizer.config), scaling_factor=float(tokenizer.latent_scale))
        made.tokenizer = tokenizer
        return made.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | Path, *, subfolder: str | None = None, torch_dtype: torch.dtype | str | None = None,
        **keywords: Any,
    ) -> Any:  # fmt: skip
        """Load a SPAR folder's tokenizer, the folder of a tokenizer alone, or what `save_pretrained` wrote.

        Args:
            path: a folder, the name of a bundled model, `hf://OWNER/NAME` or OWNER/NAME on the Hub.
            subfolder: the part of a diffusers pipeline's folder, such as "vae".
            torch_dtype: type of the weights, float32 by default; `dtype` is the same.
            keywords: diffusers', for what `save_pretrained` wrote; never a pickle.

        Raises:
            InputError: a missing, foreign or damaged folder, or a keyword that has no effect on a SPAR folder.
            OSError: diffusers' own, of what `save_pretrained` wrote and has lost a file since.
        """
        dtype = keywords.pop("dtype", None) or torch_dtype
        dtype = torch.float32 if dtype is None else read_dtype(dtype)
        name = with_revision(path, keywords.pop("revision", None))
        address = ADDRESS.fullmatch(str(name))
        if address:  # by its configuration it is diffusers' or ours
            header = f"{subfolder}/config.json" if subfolder else "config.json"
            config = fetch(address[1], (header,), revision=address[2], what="model").folder / header
        else:
            folder = model_folder(name) / (subfolder or "")
            config = folder / "config.json"
        if config.is_file() and read_json(config).get("_class_name") == cls.__name__:
            if address:
                return cls._from_diffusers(address[1], subfolder, dtype, {**keywords, "revision": address[2]})
            return cls._from_diffusers(str(folder), None, dtype, keywords)
        refuse_keywords(keywords, path)
        if address:
            folder = model_folder(name) / (subfolder or "")
        if (folder / "tokenizer" / "config.json").is_file():
            folder = folder / "tokenizer"
        made = cls.from_tokenizer(load_tokenizer(folder))
        return torch.nn.Module.to(made, dtype)  # diffusers' own `to` warns of any type

    @classmethod
    def _from_diffusers(
        cls, path: str, subfolder: str | None, dtype: torch.dtype, keywords: dict[str, Any]
    ) -> "AutoencoderSpar | tuple[AutoencoderSpar, dict[str, Any]]":
        """What `save_pretrained` wrote, with all its weights and no others."""
        index = Path(path) / f"{WEIGHTS}.safetensors.index.json"
        if index.is_file() and not all(str(name).endswith(".safetensors") for name in _shards(index)):
            raise InputError(f"{index}: expected files of safetensors alone")
        wants_info = keywords.pop("output_loading_info", False)
        options = {**keywords, "use_safetensors": True, "torch_dtype": dtype, "output_loading_info": True}
        loaded: Any = super().from_pretrained(path, subfolder=subfolder, **options)
        made, info = loaded
        if wrong := [f"{kind} {', '.join(map(str, info[kind]))}" for kind in MISFITS if info.get(kind)]:
            raise InputError(f"{path} does not fit {cls.__name__}: {'; '.join(wrong)[:500]}")
        made.tokenizer.latent_scale.fill_(made.config.scaling_factor)  # the file's own has the weights' type
        made.requires_grad_(False)
        return (made, info) if wants_info else made

    def save_pretrained(
        self, save_directory: str | os.PathLike[Any], is_main_process: bool = True, save_function: Any = None,
        safe_serialization: bool = True, variant: str | None = None, max_shard_size: int | str = "10GB",
        push_to_hub: bool = False, use_flashpack: bool = False, **keywords: Any,
    ) -> None:  # fmt: skip
        """Write the autoencoder in diffusers' form, weights as they are; arguments are diffusers'.

        The files are written aside first and take the old ones' places at the end; others in the folder stay. While
        they do, `config.json` is missing, so that no mixture of two models can be loaded.

        Raises:
            InputError: the path has something else, is a file, cannot be written, or a pickle would be written.
        """
        folder = Path(save_directory)
        if not safe_serialization:
            raise InputError("safe_serialization: expected True, got False: a pickle may run code when it is loaded")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"expected a folder, got the file {folder}")
        header = folder / "config.json"
        own = header.is_file() and read_json(header).get("_class_name") == type(self).__name__
        if not own and folder.is_dir() and (header.exists() or any(folder.glob(f"{WEIGHTS}*"))):
            raise InputError(f"{folder} has another model than {type(self).__name__}: it stays as it is")
        if not is_main_process:
            return
        if push_to_hub:
            keywords.setdefault("repo_id", folder.absolute().name)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ASIDE
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            super().save_pretrained(
                str(temporary), True, save_function, True, variant, max_shard_size, push_to_hub, use_flashpack,
                **keywords,
            )  # fmt: skip
            _take_places(temporary, folder, variant)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write {folder}: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def enable_tiling(
        self, tile_sample_min_height: int | None = None, tile_sample_min_width: int | None = None,
        tile_sample_stride_height: float | None = None, tile_sample_stride_width: float | None = None, *,
        tile: int | None = None,
    ) -> None:  # fmt: skip
        """Decode latents of more than a tile in tiles (`spar.models.tiling`); encoding has none.

        Args:
            tile_sample_min_height: pixels of a tile's side, as `AutoencoderDC` has it.
            tile_sample_min_width: equal to the height: tiles are square.
            tile_sample_stride_height: none: tiles overlap by a quarter.
            tile_sample_stride_width: none.
            tile: in place of pixels the cells of a side, 32 by default.

        Raises:
            InputError: tiles that are too small, too large, not square or not of whole cells, or a stride.
        """
        if tile_sample_stride_height is not None or tile_sample_stride_width is not None:
            raise InputError("tile_sample_stride: expected none, since tiles overlap by a quarter")
        pixels = {one for one in (tile_sample_min_height, tile_sample_min_width) if one is not None}
        if len(pixels) > 1 or (pixels and tile is not None):
            raise InputError(f"expected one side of square tiles, got {tile} cells, and pixels {sorted(pixels)}")
        for side in pixels:
            if side % self.spatial_compression_ratio:
                stride = self.spatial_compression_ratio
                raise InputError(f"tile_sample_min: expected a multiple of {stride}, got {side}")
            tile = side // self.spatial_compression_ratio
        tile = TILE if tile is None else tile
        check_int_range("tile", tile, MIN_TILE, MAX_TILE)
        self.use_tiling, self.tile = True, tile

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """Pixels `[B, 3, H, W]` in [-1, 1] to `latent` `[B, D_p, h, w]`, not scaled.

        Raises:
            InputError: the sides are not multiples of `spatial_compression_ratio`.
        """
        stride = self.spatial_compression_ratio
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % stride or x.shape[3] % stride:
            raise InputError(f"expected pixels [B, 3, H, W] with sides in multiples of {stride}, got {tuple(x.shape)}")
        latent = self._sliced(lambda rows: self.tokenizer.encode((rows + 1) / 2).z_f, x)
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """A latent `[B, D_p, h, w]`, not scaled, to pixels `sample` `[B, 3, H, W]` around [-1, 1], not clamped."""
        tile = self.tile if self.use_tiling else None
        sample = self._sliced(lambda rows: 2 * self.tokenizer.decode(rows, tile) - 1, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _sliced(self, compute: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """What `compute` gives for the rows, one by one where slicing is on."""
        return torch.cat([compute(row) for row in rows.split(1)]) if self.use_slicing else compute(rows)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict)


def _shards(index: Path) -> list[Any]:
    """The files of an index."""
    shards = read_json(index).get("weight_map")
    return list(shards.values()) if isinstance(shards, dict) else [None]
