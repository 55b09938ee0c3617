"""What the folders of all systems share: `config.json` with format, versions and sizes, the text tokenizer, origins."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spar import __version__
from spar.checkpoints.formats.text_tokenizer import open_text_tokenizer
from spar.common.config import read_json, write_json
from spar.common.errors import InputError
from spar.common.files import is_temporary
from spar.models.config import TextConfig
from spar.processing.prompts import IMAGE_TOKEN

TITLES = {"spar": "SPAR", "dualtoken": "DualToken"}  # of the systems, by their `model_type`
MODEL_TYPE = "model_type"
MAX_SCALE = 1e6  # of latents, which it brings to unit size: beyond it float32 overflows soon


def versions() -> dict[str, str]:
    """Versions of this package and of the model libraries."""
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "diffusers")}
    return {"spar": __version__, **libraries}


def title(kind: str) -> str:
    """A format in words: its system's name, and what of it."""
    system, *part = kind.split("-")
    return " ".join([TITLES.get(system, system), *part])


def write_header(folder: Path, kind: str, version: int, **fields: Any) -> None:
    """Write the config.json that `read_header` reads."""
    header = {MODEL_TYPE: kind.split("-")[0], "format": kind, "format_version": version, "versions": versions()}
    write_json(folder / "config.json", {**header, **fields})


def read_header(folder: Path, kind: str, version: int, required: Sequence[str] = ("model",)) -> dict[str, Any]:
    """Read config.json of a folder and check its kind and version.

    Raises:
        InputError: a missing folder, an unreadable config.json, another format than `kind`, another version, or a
            missing field.
    """
    check_is_folder(folder, kind)
    header = read_json(folder / "config.json")
    if header.get("format") != kind:
        raise InputError(f"{folder} is no {kind} folder: its config.json says format {header.get('format')!r}")
    own = header.get("format_version")
    if type(own) is not int or own != version:
        raise InputError(f"{folder} has format version {own!r}; this spar reads version {version}")
    for key in required:
        if key not in header:
            raise InputError(f"{folder / 'config.json'}: expected a field {key!r}, got none")
    return header


def check_is_folder(folder: Path, kind: str) -> None:
    """Refuse a path that is no folder; InputError."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"expected a {title(kind.split('-')[0])} model folder, got {folder}, which {found}")


def model_type(folder: Path) -> str:
    """The system of a model's folder, as its config.json says; folders from before that field are of SPAR.

    Raises:
        InputError: a missing folder, an unreadable config.json, or a system that this version does not know. Of the
            folder of a run it names the model in it.
    """
    check_is_folder(folder, "spar")
    if not (folder / "config.json").exists() and (folder / "model" / "config.json").is_file():
        raise InputError(f"config.json is missing in {folder}: expected the folder of its model, {folder / 'model'}")
    header = read_json(folder / "config.json")
    found = header.get(MODEL_TYPE, "spar")
    if not isinstance(found, str) or found not in TITLES:
        raise InputError(f"{folder}: expected a model_type of {', '.join(TITLES)} in config.json, got {found!r}")
    return found


def check_replaceable(folder: Path, kind: str) -> None:
    """Refuse a path that is neither an empty folder nor an older one of this kind, with InputError.

    What a process that was killed has left in the folder is nothing.
    """
    folder = folder.absolute()
    if not folder.exists() or (folder.is_dir() and all(is_temporary(path) for path in folder.iterdir())):
        return
    try:
        replaceable = read_json(folder / "config.json").get("format") == kind
    except InputError:
        replaceable = False
    if not replaceable:
        raise InputError(f"{folder} exists and is no {title(kind)} folder; expected an empty or new folder")


def check_latent_scale(scale: Any, where: object, name: str) -> float:
    """The factor that brings latents to unit variance; InputError for what cannot, with its place and name."""
    known = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not known or not 0 < scale < MAX_SCALE:
        raise InputError(f"{where}: expected {name} above 0, got {scale!r} (at most {MAX_SCALE:g})")
    return float(scale)


def check_prompt_tokens(folder: Path, longest: object, config: TextConfig) -> None:
    """Refuse a longest prompt that is no number of tokens which the LLM can take, with InputError."""
    most = config.max_seq_len
    if type(longest) is not int or not 1 <= longest <= most:
        where = folder / "config.json"
        raise InputError(f"{where}: expected max_prompt_tokens of at least 1 and at most {most}, got {longest!r}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The origin of a folder's weights; empty where none is written."""
    manifest = folder / "manifest.json"
    return read_json(manifest) if manifest.exists() else {}


def load_text_tokenizer(folder: Path, config: TextConfig) -> Any:
    """Load a model's text tokenizer; InputError if it is damaged or of another model."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"tokenizer.json is missing in {folder}")
    tokenizer = open_text_tokenizer(folder)
    own = (tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.eos_token_id, tokenizer.pad_token_id)
    wanted = (config.image_token_id, config.eos_token_id, config.pad_token_id)
    if own != wanted:
        raise InputError(f"{folder}: expected image, end and padding tokens with ids {wanted}, got {own}")
    return tokenizer
