"""The SPAR folder: one subfolder per part, safetensors and JSON, loaded strictly; the tokenizer alone is a folder too.

config.json               format, versions, sizes of every part, sampling defaults
tokenizer/                config.json (sizes, latent scale), model.safetensors
language/ router/ connector/ denoiser/      model.safetensors each, in shards with an index if large
pixel_encoder/            model.safetensors: E_p, for training the tokenizer (optional)
teacher/                  model.safetensors: E_s before the tokenizer's training, its semantic teacher (optional)
text_tokenizer/           transformers' own files
manifest.json             origin of the weights (optional)
README.md                 the model card (optional)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spar.checkpoints import model_header
from spar.checkpoints.model_card import model_card
from spar.checkpoints.model_header import (
    check_latent_scale,
    check_prompt_tokens,
    check_replaceable,
    load_text_tokenizer,
    read_manifest,
    versions,
    write_header,
)
from spar.checkpoints.safetensors_io import (
    PartTensors,
    SafetensorsReader,
    TensorSource,
    has_tensors,
    load_into_meta,
    write_tensors,
)
from spar.checkpoints.sized_build import sized_build, skeleton
from spar.common import limits
from spar.common.config import from_file, to_dict, write_json
from spar.common.errors import InputError
from spar.common.files import atomic_directory
from spar.common.limits import check_int_range, check_range
from spar.flow.sampler import MAX_SHIFT, METHODS, MIN_SHIFT
from spar.models.autoencoder import PixelEncoder, build_autoencoder
from spar.models.config import SparConfig
from spar.models.encoder import SemanticEncoder
from spar.models.spar import SparModel
from spar.models.tokenizer import UnifiedTokenizer
from spar.processing.prompts import known_words

FORMAT, FORMAT_VERSION = "spar", 3
# Fields that a configuration got after folders of this version had been written, and what those folders do.
LATER_FIELDS = {
    ("connector", "reference"): "replaced",
    ("denoiser", "reference_states"): False,
    ("denoiser", "self_attention"): "linear",
    ("streams", "semantic_layers"): 0,
    ("understanding", "geometry"): "crop",
    ("understanding", "max_tiles"): 1,
}
CARD = "README.md"
# What diffusers reads of a folder: the class of `spar.inference.diffusers_pipeline`, and that all weights are its own.
MODEL_INDEX = "model_index.json"
DIFFUSERS_INDEX = {
    "_class_name": "SparDiffusionPipeline", "network": ["spar.inference.diffusers_pipeline", "SparNetwork"]
}  # fmt: skip
TOKENIZER_FORMAT = f"{FORMAT}-tokenizer"
PARTS = ("language", "router", "connector", "denoiser")
# The optional parts, which only training reads.
TRAINING_PARTS: dict[str, Callable[[SparConfig], Any]] = {
    "pixel_encoder": lambda config: PixelEncoder(build_autoencoder(config.autoencoder).encoder),
    "teacher": lambda config: SemanticEncoder(config.vision, config.text),
}


@dataclass(frozen=True)
class SamplingConfig:
    """Default sampling of the model; part of it, since training determines it.

    `layout`: whether its LLM first writes where everything lies (`SparPipeline.generate`); `edit_layout`: what an edit
    changes, and where (`SparPipeline.edit`). `edit_guidance`: of edits, None for that of generation.
    """

    shift: float = 1.0
    method: str = "dpmsolver++"
    steps: int = 20
    guidance: float = 4.5
    max_prompt_tokens: int = 64
    layout: bool = False
    edit_layout: bool = False
    edit_guidance: float | None = None

    def __post_init__(self) -> None:
        check_range("shift", self.shift, MIN_SHIFT, MAX_SHIFT)
        if self.method not in METHODS:
            raise InputError(f"method: expected {' or '.join(METHODS)}, got {self.method!r}")
        check_int_range("steps", self.steps, 1, limits.MAX_STEPS)
        check_range("guidance", self.guidance, 0, limits.MAX_GUIDANCE)
        check_range("edit_guidance", self.edit_guidance, 0, limits.MAX_GUIDANCE)
        check_int_range("max_prompt_tokens", self.max_prompt_tokens, 1)

    def __str__(self) -> str:
        edits = "" if self.edit_guidance is None else f" (edits {self.edit_guidance:g})"
        return f"{self.steps} steps, guidance {self.guidance:g}{edits}, {self.method}"


@dataclass(frozen=True)
class ModelBundle:
    """Contents of a SPAR folder.

    `pixel_encoder` and `teacher` are written if given; `load_training_part` and `load_teacher` read them.
    """

    model: SparModel = field(repr=False)
    text_tokenizer: Any = field(repr=False)
    sampling: SamplingConfig
    manifest: dict[str, Any] = field(default_factory=dict, repr=False)
    pixel_encoder: PixelEncoder | None = field(default=None, repr=False)
    teacher: SemanticEncoder | None = field(default=None, repr=False)


def save_tokenizer(
    tokenizer: UnifiedTokenizer, folder: Path, dtype: torch.dtype | None = None, weights: TensorSource | None = None
) -> None:
    """Write the unified tokenizer alone: image to latent and back, and the encoder for understanding.

    `weights` stand in for its own, where these are on the meta device.
    """
    write_tensors(weights or tokenizer.state_dict(), folder / "model.safetensors", dtype)
    scale = float(tokenizer.latent_scale)
    write_header(folder, TOKENIZER_FORMAT, FORMAT_VERSION, latent_scale=scale, model=to_dict(tokenizer.config))


def load_tokenizer(folder: Path) -> UnifiedTokenizer:
    """Load the folder of `save_tokenizer`, in float32."""
    header = read_header(folder, TOKENIZER_FORMAT)
    config, files = parse_config(folder, header), SafetensorsReader(folder / "model.safetensors")
    tokenizer = sized_build(lambda: UnifiedTokenizer(config), config, {"": files})
    load_into_meta(tokenizer, files)
    tokenizer.latent_scale.fill_(header["latent_scale"])
    return tokenizer.eval().requires_grad_(False)


def save_model(
    loaded: ModelBundle, folder: Path, dtype: torch.dtype | None = None, weights: TensorSource | None = None
) -> None:
    """Write a whole SPAR folder; an existing folder is replaced only if it is a SPAR folder.

    Args:
        weights: of `model.` and the training parts, where the modules' own are on the meta device: they are read as
            they are written.
    """
    check_replaceable(folder, FORMAT)

    def read(name: str) -> TensorSource | None:
        return None if weights is None else PartTensors(weights, f"{name}.")

    with atomic_directory(folder) as temporary:
        model = loaded.model
        save_tokenizer(model.tokenizer, temporary / "tokenizer", dtype, read("model.tokenizer"))
        parts = {part: (f"model.{part}", getattr(model, part)) for part in PARTS}
        parts |= {part: (part, getattr(loaded, part)) for part in TRAINING_PARTS}
        for part, (name, module) in parts.items():
            if module is not None:
                write_tensors(read(name) or module.state_dict(), temporary / part / "model.safetensors", dtype)
        loaded.text_tokenizer.save_pretrained(temporary / "text_tokenizer")
        sizes, sampling = to_dict(model.config), to_dict(loaded.sampling)
        write_header(temporary, FORMAT, FORMAT_VERSION, model=sizes, sampling=sampling)
        write_json(temporary / "manifest.json", loaded.manifest)
        write_json(temporary / MODEL_INDEX, {**DIFFUSERS_INDEX, "_diffusers_version": versions()["diffusers"]})
        (temporary / CARD).write_text(build_model_card(loaded), encoding="utf-8")


def build_model_card(loaded: ModelBundle) -> str:
    """Text of the folder's model card."""
    model, tokenizer = loaded.model, loaded.text_tokenizer
    sizes = {name: sum(t.numel() for t in getattr(model, name).state_dict().values()) for name in ("tokenizer", *PARTS)}
    words = None if tokenizer.unk_token_id is None else len(known_words(tokenizer))
    return model_card(model.config, loaded.manifest, sizes, prompt=loaded.sampling.max_prompt_tokens, words=words)


def load_model(folder: Path) -> ModelBundle:
    """Load a SPAR folder strictly, in float32 on the CPU; `InputError` names what is missing, foreign or damaged."""
    header = read_header(folder, FORMAT)
    config, scale = parse_config(folder, header), read_latent_scale(folder)
    sampling, files = parse_sampling(folder, header, config), _readers(folder)
    model = sized_build(lambda: SparModel(config), config, files)
    for part, one in files.items():
        load_into_meta(model.get_submodule(part), one)
    model.tokenizer.latent_scale.fill_(scale)
    return ModelBundle(
        model=model.eval().requires_grad_(False),
        text_tokenizer=load_text_tokenizer(folder / "text_tokenizer", model.config.text),
        sampling=sampling,
        manifest=read_manifest(folder),
    )


def open_model(folder: Path) -> dict[str, SafetensorsReader]:
    """The stored weights of each part of the model, which fit the folder's sizes; raises as `load_model`."""
    config, files = read_config(folder), _readers(folder)
    skeleton(lambda: SparModel(config), config, files)
    return files


def _readers(folder: Path) -> dict[str, SafetensorsReader]:
    return {part: SafetensorsReader(folder / part / "model.safetensors") for part in ("tokenizer", *PARTS)}


def read_latent_scale(folder: Path) -> float:
    """The factor that brings the model's latents to unit variance; raises as `load_model`."""
    scale: float = tokenizer_header(folder, read_header(folder, FORMAT))["latent_scale"]
    return scale


def open_teacher(folder: Path) -> TensorSource:
    """The stored weights of the semantic teacher that `load_teacher` loads."""
    if has_part(folder, "teacher"):
        return open_training_part(folder, "teacher")
    return PartTensors(open_model(folder)["tokenizer"], "encoder.")


def read_config(folder: Path) -> SparConfig:
    """The configuration of a SPAR folder's model, without its weights."""
    return parse_config(folder, read_header(folder, FORMAT))


def read_sampling(folder: Path) -> SamplingConfig:
    """The sampling defaults of a SPAR folder; raises as `load_model`."""
    header = read_header(folder, FORMAT)
    return parse_sampling(folder, header, parse_config(folder, header))


def parse_config(folder: Path, header: dict[str, Any]) -> SparConfig:
    """The configuration in a header; `InputError` names the file and the field."""
    return from_file(SparConfig, header["model"], folder / "config.json")


def parse_sampling(folder: Path, header: dict[str, Any], config: SparConfig) -> SamplingConfig:
    """The sampling defaults in a header; `InputError` for values that no sampling of this model can have."""
    sampling = from_file(SamplingConfig, header["sampling"], folder / "config.json")
    check_prompt_tokens(folder, sampling.max_prompt_tokens, config.text)
    return sampling


def has_part(folder: Path, part: str) -> bool:
    """Whether a SPAR folder contains one of TRAINING_PARTS."""
    return has_tensors(folder / part / "model.safetensors")


def load_training_part(folder: Path, part: str) -> Any:
    """Load one of TRAINING_PARTS of a SPAR folder, in float32."""
    config, files = read_config(folder), SafetensorsReader(folder / part / "model.safetensors")
    module = sized_build(lambda: TRAINING_PARTS[part](config), config, {"": files})
    load_into_meta(module, files)
    return module.eval().requires_grad_(False)


def open_training_part(folder: Path, part: str) -> SafetensorsReader:
    """The stored weights of one of TRAINING_PARTS, which fit the folder's sizes."""
    config, files = read_config(folder), SafetensorsReader(folder / part / "model.safetensors")
    skeleton(lambda: TRAINING_PARTS[part](config), config, {"": files})
    return files


def load_teacher(folder: Path) -> SemanticEncoder:
    """The semantic teacher of a SPAR folder, in float32: its own, or its encoder where it keeps none."""
    if has_part(folder, "teacher"):
        return load_training_part(folder, "teacher")
    read_header(folder, FORMAT)
    return load_tokenizer(folder / "tokenizer").encoder


def read_header(folder: Path, expected: str) -> dict[str, Any]:
    """Read config.json of a folder and check its kind and version.

    Raises:
        InputError: a missing folder, an unreadable config.json, another format than `expected`, or another version.
    """
    fields = ("model",) if expected != FORMAT else ("model", "sampling")
    header = model_header.read_header(folder, expected, FORMAT_VERSION, fields)
    if expected != FORMAT:
        check_latent_scale(header.get("latent_scale"), folder / "config.json", "latent_scale")
    if isinstance(header["model"], dict):
        header["model"].setdefault("understanding", {})  # the part itself came later
    if isinstance(header.get("sampling"), dict):
        later = {"layout": False, "edit_layout": False, "edit_guidance": None}
        header["sampling"] = {**later, **header["sampling"]}
    for (part, name), value in LATER_FIELDS.items():
        fields_of = header["model"].get(part) if isinstance(header["model"], dict) else None
        if isinstance(fields_of, dict):
            fields_of.setdefault(name, value)
    return header


def tokenizer_header(folder: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Read the header of a SPAR folder's tokenizer, which has the folder's own sizes; raises as `read_header`."""
    tokenizer = read_header(folder / "tokenizer", TOKENIZER_FORMAT)
    if tokenizer["model"] != header["model"]:
        raise InputError(f"{folder}: the config.json of tokenizer/ gives other sizes than the model's own")
    return tokenizer
