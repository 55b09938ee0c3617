"""Inspection of a SPAR folder by its headers alone: every tensor's name and shape is checked, none is read."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from spar.checkpoints.model_card import recorded_scores
from spar.checkpoints.safetensors_io import SafetensorsReader, describe_mismatch
from spar.checkpoints.spar_format import (
    FORMAT,
    PARTS,
    SamplingConfig,
    has_pixel_encoder,
    has_teacher,
    load_text_tokenizer,
    read_header,
    tokenizer_header,
)
from spar.common.config import from_dict, read_json
from spar.common.errors import InputError
from spar.models.autoencoder import PixelEncoder, build_autoencoder
from spar.models.config import SparConfig
from spar.models.encoder import SemanticEncoder
from spar.models.spar import SparModel
from spar.models.tokenizer import UnifiedTokenizer

TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class PartInfo:
    """One part's weights: number of parameters, bytes of its files, and stored types (the most frequent first)."""

    name: str
    parameters: int
    bytes: int
    types: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """A folder: a whole model, or a tokenizer alone (`sampling` is None, `manifest` empty)."""

    format: str
    format_version: int
    versions: dict[str, str]
    config: SparConfig
    sampling: SamplingConfig | None
    manifest: dict[str, Any]
    parts: tuple[PartInfo, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters of the model, without E_p and the teacher, which only training reads."""
        return sum(part.parameters for part in self.parts if part.name not in ("pixel_encoder", "teacher"))

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The manifest's scores by benchmark; values that are not numbers are dropped."""
        return recorded_scores(self.manifest)


def inspect(folder: Path) -> Inspection:
    """Inspect a SPAR folder, or the folder of a tokenizer alone.

    Raises:
        InputError: the folder cannot be loaded; damaged tensor values are not detected.
    """
    alone = f"{FORMAT}-tokenizer"
    whole = not folder.is_dir() or read_json(folder / "config.json").get("format") != alone
    header = read_header(folder, FORMAT if whole else alone)
    config = from_dict(SparConfig, header["model"], complete=True)
    with init_empty_weights():
        model = SparModel(config) if whole else UnifiedTokenizer(config)
    if not whole:
        parts = [_part("tokenizer", model, folder / "model.safetensors")]
    else:
        tokenizer_header(folder, header)
        load_text_tokenizer(folder / "text_tokenizer", config.text)
        names = ("tokenizer", *PARTS)
        parts = [_part(name, getattr(model, name), folder / name / "model.safetensors") for name in names]
    if whole and has_pixel_encoder(folder):
        with init_empty_weights():
            encoder = PixelEncoder(build_autoencoder(config.autoencoder).encoder)
        parts.append(_part("pixel_encoder", encoder, folder / "pixel_encoder" / "model.safetensors"))
    if whole and has_teacher(folder):
        with init_empty_weights():
            teacher = SemanticEncoder(config.vision, config.text)
        parts.append(_part("teacher", teacher, folder / "teacher" / "model.safetensors"))
    manifest, versions = folder / "manifest.json", header.get("versions")
    return Inspection(
        format=header["format"],
        format_version=header["format_version"],
        versions=versions if isinstance(versions, dict) else {},
        config=config,
        sampling=from_dict(SamplingConfig, header["sampling"], complete=True) if whole else None,
        manifest=read_json(manifest) if whole and manifest.exists() else {},
        parts=tuple(parts),
    )


def _part(name: str, module: nn.Module, path: Path) -> PartInfo:
    files = SafetensorsReader(path)
    mismatch = describe_mismatch(module.state_dict(), files.shapes)
    if mismatch:
        raise InputError(f"{path.parent} does not fit this model: {mismatch}")
    counts: Counter[str] = Counter()
    for key, kind in files.types.items():
        counts[TYPES.get(kind, kind.lower())] += files.shapes[key].numel()
    sizes = sum(file.stat().st_size for file in files.files)
    return PartInfo(name, counts.total(), sizes, tuple(kind for kind, _ in counts.most_common()))
