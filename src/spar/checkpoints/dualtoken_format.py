"""The DualToken folder: one subfolder per part, safetensors and JSON, loaded strictly.

config.json                                 model_type, format, versions, sizes of every part, sampling defaults
tokenizer/ language/ embedder/ pixel_head/ semantic_head/       model.safetensors each, in shards with an index if large
text_tokenizer/                             transformers' own files
tower_tokenizer/                            the same of the text tower, where it is another (optional)
manifest.json                               origin of the weights (optional)
README.md                                   the model card
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spar.checkpoints import model_header
from spar.checkpoints.formats.text_tokenizer import open_text_tokenizer
from spar.checkpoints.model_card import dualtoken_card
from spar.checkpoints.model_header import (
    check_prompt_tokens,
    check_replaceable,
    load_text_tokenizer,
    read_manifest,
    write_header,
)
from spar.checkpoints.safetensors_io import PartTensors, SafetensorsReader, TensorSource, load_into_meta, write_tensors
from spar.checkpoints.sized_build import sized_build, skeleton
from spar.common.config import from_file, to_dict, write_json
from spar.common.files import atomic_directory
from spar.models.dualtoken.config import DualTokenConfig
from spar.models.dualtoken.model import DualTokenModel
from spar.models.dualtoken.sampling import CodeSampling
from spar.processing.prompts import known_words

FORMAT, FORMAT_VERSION = "dualtoken", 1
CARD = "README.md"
TOWER_TOKENIZER = "tower_tokenizer"
PARTS = ("tokenizer", "language", "embedder", "pixel_head", "semantic_head")  # the first head of two codebooks alone


@dataclass(frozen=True)
class DualTokenBundle:
    """Contents of a DualToken folder.

    `max_prompt_tokens` is the longest prompt; `tower_tokenizer` the text tower's own, where it is not the LLM's.
    """

    model: DualTokenModel = field(repr=False)
    text_tokenizer: Any = field(repr=False)
    sampling: CodeSampling = CodeSampling()
    max_prompt_tokens: int = 64
    manifest: dict[str, Any] = field(default_factory=dict, repr=False)
    tower_tokenizer: Any | None = field(default=None, repr=False)


def save_dualtoken(
    loaded: DualTokenBundle, folder: Path, dtype: torch.dtype | None = None, weights: TensorSource | None = None
) -> None:
    """Write a whole folder, floating weights in `dtype`; an existing one is replaced only if it is of DualToken.

    Args:
        weights: of `model.`, where the modules' own are on the meta device: they are read as they are written.
    """
    check_replaceable(folder, FORMAT)
    with atomic_directory(folder) as temporary:
        for part in loaded.model.config.parts:
            own = None if weights is None else PartTensors(weights, f"model.{part}.")
            tensors = own or loaded.model.get_submodule(part).state_dict()
            write_tensors(tensors, temporary / part / "model.safetensors", dtype)
        loaded.text_tokenizer.save_pretrained(temporary / "text_tokenizer")
        if loaded.tower_tokenizer is not None:
            loaded.tower_tokenizer.save_pretrained(temporary / TOWER_TOKENIZER)
        write_header(
            temporary, FORMAT, FORMAT_VERSION, model=to_dict(loaded.model.config), sampling=to_dict(loaded.sampling),
            max_prompt_tokens=loaded.max_prompt_tokens,
        )  # fmt: skip
        write_json(temporary / "manifest.json", loaded.manifest)
        (temporary / CARD).write_text(build_dualtoken_card(loaded), encoding="utf-8")


def build_dualtoken_card(loaded: DualTokenBundle) -> str:
    """Text of the folder's model card."""
    model, tokenizer = loaded.model, loaded.text_tokenizer
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in model.config.parts}
    words = None if tokenizer.unk_token_id is None else len(known_words(tokenizer))
    return dualtoken_card(model.config, loaded.manifest, sizes, prompt=loaded.max_prompt_tokens, words=words)


def load_dualtoken(folder: Path) -> DualTokenBundle:
    """Load a DualToken folder strictly, in float32 on the CPU; `InputError` names what is missing or damaged."""
    header = read_header(folder)
    config, sampling = parse_config(folder, header), parse_sampling(folder, header)
    files = _readers(folder, config)
    model = sized_build(lambda: DualTokenModel(config), config, files)
    for part, one in files.items():
        load_into_meta(model.get_submodule(part), one)
    return DualTokenBundle(
        model=model.eval().requires_grad_(False),
        text_tokenizer=load_text_tokenizer(folder / "text_tokenizer", model.config.text),
        sampling=sampling,
        max_prompt_tokens=header["max_prompt_tokens"],
        manifest=read_manifest(folder),
        tower_tokenizer=open_text_tokenizer(folder / TOWER_TOKENIZER) if (folder / TOWER_TOKENIZER).is_dir() else None,
    )


def open_dualtoken(folder: Path) -> dict[str, SafetensorsReader]:
    """The stored weights of each part, which fit the folder's sizes; raises as `load_dualtoken`."""
    config = read_config(folder)
    files = _readers(folder, config)
    skeleton(lambda: DualTokenModel(config), config, files)
    return files


def _readers(folder: Path, config: DualTokenConfig) -> dict[str, SafetensorsReader]:
    return {part: SafetensorsReader(folder / part / "model.safetensors") for part in config.parts}


def read_config(folder: Path) -> DualTokenConfig:
    """The configuration of a DualToken folder's model, without its weights."""
    return parse_config(folder, read_header(folder))


def read_header(folder: Path) -> dict[str, Any]:
    """Read config.json of a DualToken folder; raises as `model_header.read_header`."""
    header = model_header.read_header(folder, FORMAT, FORMAT_VERSION, ("model", "sampling", "max_prompt_tokens"))
    if isinstance(header["sampling"], dict):
        header["sampling"].setdefault("layout", False)  # a later field
    return header


def parse_config(folder: Path, header: dict[str, Any]) -> DualTokenConfig:
    """The configuration in a header; `InputError` names the file and the field."""
    config = from_file(DualTokenConfig, header["model"], folder / "config.json")
    check_prompt_tokens(folder, header["max_prompt_tokens"], config.text)
    return config


def parse_sampling(folder: Path, header: dict[str, Any]) -> CodeSampling:
    """The sampling defaults in a header; raises as `parse_config`."""
    return from_file(CodeSampling, header["sampling"], folder / "config.json")
