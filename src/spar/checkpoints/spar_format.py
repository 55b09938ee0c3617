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

import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from spar import __version__
from spar.checkpoints.model_card import model_card
from spar.checkpoints.safetensors_io import INDEX, load_into_meta, write_tensors
from spar.common.config import from_dict, read_json, to_dict, write_json
from spar.common.errors import InputError
from spar.common.files import atomic_directory
from spar.models.autoencoder import PixelEncoder, build_autoencoder
from spar.models.config import SparConfig, TextConfig
from spar.models.encoder import SemanticEncoder
from spar.models.spar import SparModel
from spar.models.tokenizer import UnifiedTokenizer
from spar.processing.prompts import IMAGE_TOKEN

FORMAT, FORMAT_VERSION = "spar", 3
CARD = "README.md"
PARTS = ("language", "router", "connector", "denoiser")


@dataclass(frozen=True)
class SamplingConfig:
    """Default sampling of the model; part of it, since training determines it."""

    shift: float = 1.0
    method: str = "dpmsolver++"
    steps: int = 20
    guidance: float = 4.5
    max_prompt_tokens: int = 64


@dataclass(frozen=True)
class ModelBundle:
    """Contents of a SPAR folder.

    `pixel_encoder` and `teacher` are written if given; `load_pixel_encoder` and `load_teacher` read them.
    """

    model: SparModel
    text_tokenizer: Any
    sampling: SamplingConfig
    manifest: dict[str, Any] = field(default_factory=dict)
    pixel_encoder: PixelEncoder | None = None
    teacher: SemanticEncoder | None = None


def versions() -> dict[str, str]:
    """Versions of this package and of the model libraries."""
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "diffusers")}
    return {"spar": __version__, **libraries}


def save_tokenizer(tokenizer: UnifiedTokenizer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the unified tokenizer alone: image to latent and back, and the encoder for understanding."""
    write_tensors(tokenizer, folder / "model.safetensors", dtype)
    write_json(
        folder / "config.json",
        {
            "format": f"{FORMAT}-tokenizer",
            "format_version": FORMAT_VERSION,
            "versions": versions(),
            "latent_scale": float(tokenizer.latent_scale),
            "model": to_dict(tokenizer.config),
        },
    )


def load_tokenizer(folder: Path) -> UnifiedTokenizer:
    """Load the folder of `save_tokenizer`, in float32."""
    header = read_header(folder, f"{FORMAT}-tokenizer")
    with init_empty_weights():
        tokenizer = UnifiedTokenizer(from_dict(SparConfig, header["model"], complete=True))
    _load_tokenizer_weights(tokenizer, folder, header)
    return tokenizer.eval().requires_grad_(False)


def _load_tokenizer_weights(tokenizer: UnifiedTokenizer, folder: Path, header: dict[str, Any]) -> None:
    load_into_meta(tokenizer, folder / "model.safetensors", str(folder))
    tokenizer.latent_scale.fill_(header["latent_scale"])


def save_model(loaded: ModelBundle, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a whole SPAR folder; an existing folder is replaced only if it is a SPAR folder."""
    check_replaceable(folder, FORMAT)
    with atomic_directory(folder) as temporary:
        model = loaded.model
        save_tokenizer(model.tokenizer, temporary / "tokenizer", dtype)
        for part in PARTS:
            write_tensors(getattr(model, part), temporary / part / "model.safetensors", dtype)
        if loaded.pixel_encoder is not None:
            write_tensors(loaded.pixel_encoder, temporary / "pixel_encoder" / "model.safetensors", dtype)
        if loaded.teacher is not None:
            write_tensors(loaded.teacher, temporary / "teacher" / "model.safetensors", dtype)
        loaded.text_tokenizer.save_pretrained(temporary / "text_tokenizer")
        write_json(
            temporary / "config.json",
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "versions": versions(),
                "model": to_dict(model.config),
                "sampling": to_dict(loaded.sampling),
            },
        )
        write_json(temporary / "manifest.json", loaded.manifest)
        (temporary / CARD).write_text(build_model_card(loaded), encoding="utf-8")


def build_model_card(loaded: ModelBundle) -> str:
    """Text of the folder's model card."""
    model, words = loaded.model, loaded.text_tokenizer
    sizes = {name: sum(t.numel() for t in getattr(model, name).state_dict().values()) for name in ("tokenizer", *PARTS)}
    closed = len(set(words.get_vocab()) - set(words.all_special_tokens)) if words.unk_token_id is not None else None
    return model_card(model.config, loaded.manifest, sizes, prompt=loaded.sampling.max_prompt_tokens, words=closed)


def check_replaceable(folder: Path, kind: str) -> None:
    """Refuse a path that is neither an empty folder nor an older one of this kind, with InputError."""
    if folder.absolute().exists() and not _replaceable(folder, kind):
        what = kind.replace(FORMAT, "SPAR").replace("-", " ")
        raise InputError(f"{folder.absolute()} exists and is no {what} folder; expected an empty or new folder")


def _replaceable(folder: Path, kind: str) -> bool:
    """Whether an existing path is an empty folder or an older one of this kind."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        return read_json(folder / "config.json").get("format") == kind
    except InputError:
        return False


def load_model(folder: Path) -> ModelBundle:
    """Load a SPAR folder strictly, in float32 on the CPU; `InputError` names what is missing, foreign or damaged."""
    header = read_header(folder, FORMAT)
    config = from_dict(SparConfig, header["model"], complete=True)
    with init_empty_weights():
        model = SparModel(config)
    tokenizer = tokenizer_header(folder, header)
    _load_tokenizer_weights(model.tokenizer, folder / "tokenizer", tokenizer)
    for part in PARTS:
        load_into_meta(getattr(model, part), folder / part / "model.safetensors", str(folder / part))
    manifest = folder / "manifest.json"
    return ModelBundle(
        model=model.eval().requires_grad_(False),
        text_tokenizer=load_text_tokenizer(folder / "text_tokenizer", model.config.text),
        sampling=from_dict(SamplingConfig, header["sampling"], complete=True),
        manifest=read_json(manifest) if manifest.exists() else {},
    )


def read_config(folder: Path) -> SparConfig:
    """The configuration of a SPAR folder's model, without its weights."""
    return from_dict(SparConfig, read_header(folder, FORMAT)["model"], complete=True)


def has_pixel_encoder(folder: Path) -> bool:
    """Whether a SPAR folder contains E_p."""
    return _has_part(folder, "pixel_encoder")


def has_teacher(folder: Path) -> bool:
    """Whether a SPAR folder contains the semantic teacher of its tokenizer."""
    return _has_part(folder, "teacher")


def _has_part(folder: Path, part: str) -> bool:
    path = folder / part / "model.safetensors"
    return path.is_file() or path.with_name(path.name + INDEX).is_file()


def load_teacher(folder: Path) -> SemanticEncoder:
    """The semantic teacher of a SPAR folder, in float32: its own, or its encoder where it keeps none."""
    config = read_config(folder)
    if not has_teacher(folder):
        return load_tokenizer(folder / "tokenizer").encoder
    with init_empty_weights():
        encoder = SemanticEncoder(config.vision, config.text)
    load_into_meta(encoder, folder / "teacher" / "model.safetensors", str(folder / "teacher"))
    return encoder.eval().requires_grad_(False)


def load_pixel_encoder(folder: Path) -> PixelEncoder:
    """Load E_p of a SPAR folder, in float32."""
    config = read_config(folder)
    with init_empty_weights():
        encoder = PixelEncoder(build_autoencoder(config.autoencoder).encoder)
    load_into_meta(encoder, folder / "pixel_encoder" / "model.safetensors", str(folder / "pixel_encoder"))
    return encoder.eval().requires_grad_(False)


def load_text_tokenizer(folder: Path, config: TextConfig) -> Any:
    """Load a model's text tokenizer; InputError if it is damaged or of another model."""
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"tokenizer.json is missing in {folder}")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises a bare Exception on a damaged file
        raise InputError(f"{folder} holds no readable text tokenizer: {error}") from error
    own = (tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.eos_token_id, tokenizer.pad_token_id)
    wanted = (config.image_token_id, config.eos_token_id, config.pad_token_id)
    if own != wanted:
        raise InputError(f"{folder}: expected image, end and padding tokens with ids {wanted}, got {own}")
    return tokenizer


def read_header(folder: Path, expected: str) -> dict[str, Any]:
    """Read config.json of a folder and check its kind and version.

    Raises:
        InputError: a missing folder, an unreadable config.json, another format than `expected`, or another version.
    """
    if not folder.is_dir():
        raise InputError(f"expected a SPAR model folder, got {folder}, which {_what(folder)}")
    header = read_json(folder / "config.json")
    if header.get("format") != expected:
        raise InputError(f"{folder} is no {expected} folder: its config.json says format {header.get('format')!r}")
    version = header.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(f"{folder} has format version {version!r}; this spar reads version {FORMAT_VERSION}")
    for key in ("model",) if expected != FORMAT else ("model", "sampling"):
        if key not in header:
            raise InputError(f"{folder / 'config.json'}: expected a field {key!r}, got none")
    scale = header.get("latent_scale")
    if expected != FORMAT and not (isinstance(scale, float) and scale > 0):
        raise InputError(f"{folder / 'config.json'}: expected latent_scale above 0, got {scale!r}")
    return header


def tokenizer_header(folder: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Read the header of a SPAR folder's tokenizer, which has the folder's own sizes; raises as `read_header`."""
    tokenizer = read_header(folder / "tokenizer", f"{FORMAT}-tokenizer")
    if tokenizer["model"] != header["model"]:
        raise InputError(f"{folder}: the config.json of tokenizer/ gives other sizes than the model's own")
    return tokenizer


def _what(path: Path) -> str:
    return "is a file" if path.exists() else "does not exist"
