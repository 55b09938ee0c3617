"""The DualToken folder: one subfolder per part, safetensors and JSON, loaded strictly.

config.json                                 model_type, format, versions, sizes of every part, sampling defaults
tokenizer/ language/ embedder/ pixel_head/ semantic_head/       model.safetensors each, in shards with an index if large
text_tokenizer/                             transformers' own files
manifest.json                               origin of the weights (optional)
README.md                                   the model card
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from spar.checkpoints.model_header import (
    check_replaceable,
    load_text_tokenizer,
    read_header,
    read_manifest,
    write_header,
)
from spar.checkpoints.safetensors_io import load_into_meta, write_tensors
from spar.common.config import from_dict, to_dict, write_json
from spar.common.errors import InputError
from spar.common.files import atomic_directory
from spar.models.dualtoken.config import DualTokenConfig
from spar.models.dualtoken.model import DualTokenModel
from spar.models.dualtoken.sampling import CodeSampling

FORMAT, FORMAT_VERSION = "dualtoken", 1
PARTS = ("tokenizer", "language", "embedder", "pixel_head", "semantic_head")


@dataclass(frozen=True)
class DualTokenBundle:
    """Contents of a DualToken folder; `max_prompt_tokens` is the longest prompt."""

    model: DualTokenModel
    text_tokenizer: Any
    sampling: CodeSampling = CodeSampling()
    max_prompt_tokens: int = 64
    manifest: dict[str, Any] = field(default_factory=dict)


def save_dualtoken(loaded: DualTokenBundle, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a whole folder, floating weights in `dtype`; an existing one is replaced only if it is of DualToken."""
    check_replaceable(folder, FORMAT)
    with atomic_directory(folder) as temporary:
        for part in PARTS:
            tensors = loaded.model.get_submodule(part).state_dict()
            write_tensors(tensors, temporary / part / "model.safetensors", dtype)
        loaded.text_tokenizer.save_pretrained(temporary / "text_tokenizer")
        write_header(
            temporary, FORMAT, FORMAT_VERSION, model=to_dict(loaded.model.config), sampling=to_dict(loaded.sampling),
            max_prompt_tokens=loaded.max_prompt_tokens,
        )  # fmt: skip
        write_json(temporary / "manifest.json", loaded.manifest)


def load_dualtoken(folder: Path) -> DualTokenBundle:
    """Load a DualToken folder strictly, in float32 on the CPU; `InputError` names what is missing or damaged."""
    header = read_header(folder, FORMAT, FORMAT_VERSION, ("model", "sampling", "max_prompt_tokens"))
    with init_empty_weights(include_buffers=False):
        model = DualTokenModel(from_dict(DualTokenConfig, header["model"], complete=True))
    for part in PARTS:
        load_into_meta(model.get_submodule(part), folder / part / "model.safetensors")
    longest = header["max_prompt_tokens"]
    if type(longest) is not int or longest < 1:
        raise InputError(f"{folder / 'config.json'}: expected max_prompt_tokens of at least 1, got {longest!r}")
    return DualTokenBundle(
        model=model.eval().requires_grad_(False),
        text_tokenizer=load_text_tokenizer(folder / "text_tokenizer", model.config.text),
        sampling=from_dict(CodeSampling, header["sampling"], complete=True),
        max_prompt_tokens=longest,
        manifest=read_manifest(folder),
    )


def read_dualtoken_config(folder: Path) -> DualTokenConfig:
    """The configuration of a DualToken folder's model, without its weights."""
    return from_dict(DualTokenConfig, read_header(folder, FORMAT, FORMAT_VERSION)["model"], complete=True)
