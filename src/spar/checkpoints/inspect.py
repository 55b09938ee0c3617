"""Inspection of a model's folder by its headers alone: every tensor's name and shape is checked, none is read."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from spar.checkpoints import dualtoken_format
from spar.checkpoints.model_card import recorded_scores
from spar.checkpoints.model_header import load_text_tokenizer, model_type, read_manifest
from spar.checkpoints.safetensors_io import SafetensorsReader
from spar.checkpoints.sized_build import skeleton
from spar.checkpoints.spar_format import (
    FORMAT,
    PARTS,
    TOKENIZER_FORMAT,
    TRAINING_PARTS,
    SamplingConfig,
    has_part,
    parse_config,
    parse_sampling,
    read_header,
    tokenizer_header,
)
from spar.common.config import read_json
from spar.models.config import SparConfig
from spar.models.dualtoken.config import DualTokenConfig
from spar.models.dualtoken.model import DualTokenModel
from spar.models.dualtoken.sampling import CodeSampling
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
    config: SparConfig | DualTokenConfig
    sampling: SamplingConfig | CodeSampling | None
    manifest: dict[str, Any]
    parts: tuple[PartInfo, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters of the model, without E_p and the teacher, which only training reads."""
        return sum(part.parameters for part in self.parts if part.name not in TRAINING_PARTS)

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The manifest's scores by benchmark; values that are not numbers are dropped."""
        return recorded_scores(self.manifest)


def inspect(folder: Path) -> Inspection:
    """Inspect a folder of any system, or the folder of SPAR's tokenizer alone.

    Raises:
        InputError: the folder cannot be loaded; damaged tensor values are not detected.
    """
    return INSPECTIONS[model_type(folder)](folder)


def _inspect_spar(folder: Path) -> Inspection:
    whole = read_json(folder / "config.json").get("format") != TOKENIZER_FORMAT
    header = read_header(folder, FORMAT if whole else TOKENIZER_FORMAT)
    config = parse_config(folder, header)
    if not whole:
        return _inspection(header, config, None, {}, _alone("tokenizer", UnifiedTokenizer, config, folder))
    tokenizer_header(folder, header)
    sampling = parse_sampling(folder, header, config)
    load_text_tokenizer(folder / "text_tokenizer", config.text)
    parts = _parts(lambda: SparModel(config), config, {name: folder / name for name in ("tokenizer", *PARTS)})
    for name, build in TRAINING_PARTS.items():
        if has_part(folder, name):
            parts += _alone(name, build, config, folder / name)
    return _inspection(header, config, sampling, read_manifest(folder), parts)


def _inspect_dualtoken(folder: Path) -> Inspection:
    header = dualtoken_format.read_header(folder)
    config, sampling = dualtoken_format.parse_config(folder, header), dualtoken_format.parse_sampling(folder, header)
    load_text_tokenizer(folder / "text_tokenizer", config.text)
    folders = {name: folder / name for name in config.parts}
    parts = _parts(lambda: DualTokenModel(config), config, folders)
    return _inspection(header, config, sampling, read_manifest(folder), parts)


INSPECTIONS = {"spar": _inspect_spar, "dualtoken": _inspect_dualtoken}


def _inspection(
    header: dict[str, Any], config: Any, sampling: Any, manifest: dict[str, Any], parts: list[PartInfo]
) -> Inspection:
    versions = header.get("versions")
    return Inspection(
        format=header["format"],
        format_version=header["format_version"],
        versions=versions if isinstance(versions, dict) else {},
        config=config,
        sampling=sampling,
        manifest=manifest,
        parts=tuple(parts),
    )


def _parts(build: Callable[[], nn.Module], config: Any, folders: dict[str, Path]) -> list[PartInfo]:
    """The parts of a network, which its files in their folders fit."""
    files = {name: SafetensorsReader(folder / "model.safetensors") for name, folder in folders.items()}
    skeleton(build, config, files)
    return [_part(name, one) for name, one in files.items()]


def _alone(name: str, build: Callable[[SparConfig], nn.Module], config: SparConfig, folder: Path) -> list[PartInfo]:
    """A network that is one part, as `_parts`."""
    files = SafetensorsReader(folder / "model.safetensors")
    skeleton(lambda: build(config), config, {"": files})
    return [_part(name, files)]


def _part(name: str, files: SafetensorsReader) -> PartInfo:
    counts: Counter[str] = Counter()
    for key, kind in files.types.items():
        counts[TYPES.get(kind, kind.lower())] += files.shapes[key].numel()
    sizes = sum(file.stat().st_size for file in files.files)
    return PartInfo(name, counts.total(), sizes, tuple(kind for kind, _ in counts.most_common()))
