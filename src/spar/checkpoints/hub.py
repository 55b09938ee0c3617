"""Folders of weights by their names: local, bundled with the installation, or on the Hub. An upload is checked first,
and is one commit.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from spar.checkpoints import dualtoken_format, lora_files
from spar.checkpoints.bundled import is_bundled, local_folder
from spar.checkpoints.formats.checkpoint_source import REPOSITORY, fetch
from spar.checkpoints.inspect import inspect
from spar.checkpoints.safetensors_io import INDEX
from spar.checkpoints.spar_format import PARTS, TRAINING_PARTS
from spar.common.config import read_json
from spar.common.errors import InputError, first_line

FOLDERS = ("", *(f"{part}/" for part in dict.fromkeys(("tokenizer", *PARTS, *TRAINING_PARTS, *dualtoken_format.PARTS))))
# Weights that are no longer in the folder are removed from the Hub: they might be loaded instead of newer ones.
WEIGHTS = tuple(f"{folder}model*.safetensors{end}" for folder in FOLDERS for end in ("", INDEX))
# Files of a model's folder: no others are uploaded.
ALLOWED_FILES = (
    *WEIGHTS,
    "README.md",
    "config.json",
    "manifest.json",
    "metrics.jsonl",
    "model_index.json",
    "tokenizer/config.json",
    "text_tokenizer/*.json",
    "text_tokenizer/*.jinja",
    "text_tokenizer/*.txt",
    f"{dualtoken_format.TOWER_TOKENIZER}/*.json",
    f"{dualtoken_format.TOWER_TOKENIZER}/*.jinja",
)

ADAPTER_FILES = (lora_files.CONFIG, lora_files.WEIGHTS, lora_files.DIFFUSERS_WEIGHTS)

ADDRESS = re.compile(r"hf:/+([\w.-]+/[\w.-]+?)(?:@([^/]+))?")  # a Path has one slash left of two


def model_folder(path: str | Path) -> Path:
    """A local folder: the path itself, a bundled model by its name if there is no such path, or the download of
    `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`.

    Raises:
        InputError: a bundled model that this installation lacks, another URL, or a failed download.
    """
    return local_folder(Path(path)) if not _is_address(path) else _download(path, ALLOWED_FILES, "model")


def hub_address(name: str | Path) -> str | Path:
    """`hf://OWNER/NAME` of OWNER/NAME, as diffusers and transformers name a repository, where no such path exists; a
    `Path` is a path.
    """
    known = isinstance(name, str) and re.fullmatch(rf"(?![.~])({REPOSITORY.pattern})(?:@[^/]+)?", name)
    return f"hf://{name}" if known and "/." not in str(name) and not Path(name).exists() else name


def adapter_files(path: str | Path) -> Path:
    """An adapter's folder or file: the path itself, or the download of `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`.

    Raises:
        InputError: another URL, or a failed download.
    """
    return Path(path) if not _is_address(path) else _download(path, ADAPTER_FILES, "adapter")


def _is_address(path: str | Path) -> bool:
    return str(path).startswith("hf:")


def _download(path: str | Path, files: tuple[str, ...], what: str) -> Path:
    found = ADDRESS.fullmatch(str(path))
    if not found:
        raise InputError(f"{what}: expected a folder or hf://OWNER/NAME or hf://OWNER/NAME@REVISION, got {str(path)!r}")
    return fetch(found[1], files, revision=found[2], what=what, local=False).folder


def model_name(path: str | Path, folder: Path) -> str:
    """The name of a model or an adapter in metadata: the folder's own name, the bundled model's, or the URL on the Hub
    with the downloaded commit.
    """
    if is_bundled(path):
        return str(path)
    found = ADDRESS.fullmatch(str(path))
    return f"hf://{found[1]}@{folder.name}" if found else folder.resolve().name


@dataclass(frozen=True)
class UploadPlan:
    """The files of a folder to upload, with their sizes in bytes, and the names of the others."""

    folder: Path
    format: str
    files: dict[str, int]
    ignored: list[str]


def plan_upload(folder: Path) -> UploadPlan:
    """Plan the upload of a model's folder, or of SPAR's tokenizer's alone, without the network.

    Raises:
        InputError: the folder cannot be loaded (`inspect`), or has links instead of files.
    """
    kind = inspect(folder).format
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    for name, path in names.items():
        if path.is_symlink():
            raise InputError(f"{folder}: expected plain files, but {name} is a link; save the model into a new folder")
    files = {name: path.stat().st_size for name, path in names.items() if path.is_file()}
    sent = {name: size for name, size in files.items() if any(_matches(name, pattern) for pattern in ALLOWED_FILES)}
    return UploadPlan(folder, kind, sent, sorted(files.keys() - sent.keys()))


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def check_repository(repository: str) -> None:
    """Refuse a name that is not a Hub id."""
    if not REPOSITORY.fullmatch(repository):
        raise InputError(f"REPO_ID: expected OWNER/NAME, got {repository!r}")


def push(plan: UploadPlan, repository: str, *, private: bool = True, message: str = "Weights of SPAR") -> str:
    """Upload the planned files to the model repository OWNER/NAME, in one commit, and return the commit's URL.

    A missing repository is created. Authentication is huggingface_hub's (`hf auth login`, or HF_TOKEN).

    Raises:
        InputError: the repository has another model, or is public although `private` is True, or the Hub refuses.
    """
    check_repository(repository)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        if private and not hub.model_info(repository).private:
            raise InputError(f"{repository} is public already; --public says that this is meant")
        if "config.json" in hub.list_repo_files(repository):
            kind = read_json(Path(hub.hf_hub_download(repository, "config.json"))).get("format")
            if kind != plan.format:
                raise InputError(f"{repository} holds another model (its config.json says format {kind!r})")
        commit = hub.upload_folder(
            repo_id=repository, folder_path=plan.folder, allow_patterns=list(plan.files),
            delete_patterns=list(WEIGHTS), commit_message=message,
        )
    except InputError:
        raise
    except OfflineModeIsEnabled as error:
        raise InputError("the Hub cannot be reached: HF_HUB_OFFLINE is set") from error
    except Exception as error:  # of the Hub, the network or the disk
        unknown = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        hint = "; hf auth login, or HF_TOKEN, says who asks" if unknown else ""
        reason = first_line(error, getattr(error, "server_message", None))
        raise InputError(f"the Hub does not take {repository}: {reason}{hint}") from error
    return commit.commit_url
