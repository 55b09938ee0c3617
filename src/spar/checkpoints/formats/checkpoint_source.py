"""Sources of checkpoints: a local folder, or a Hub id at one commit, and their records in a manifest."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spar.checkpoints.formats.foreign_config import ForeignConfig
from spar.checkpoints.formats.key_map import TensorReader
from spar.checkpoints.formats.text_tokenizer import open_text_tokenizer, text_tokenizer_files
from spar.checkpoints.formats.torch_pickle import TorchPickleReader
from spar.checkpoints.safetensors_io import SafetensorsReader, has_tensors
from spar.common.errors import InputError, first_line
from spar.common.files import home_expanded

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
LOCAL = re.compile(rf"[.~/].*|.*({'|'.join(map(re.escape, (*PICKLED, '.safetensors')))})", re.DOTALL)


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint on this disk, which notes what is read of it for its `record`.

    `name` is the folder's own name or the Hub id, `commit` that of the Hub.
    """

    folder: Path
    name: str
    commit: str | None = None
    _read: set[Path] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def of_file(cls, file: Path) -> "CheckpointSource":
        """A file by itself."""
        return cls(file.parent, file.name)

    def config(self, name: str) -> ForeignConfig:
        """The fields of a file of JSON."""
        path = self.folder / name
        self._read.add(path)
        return ForeignConfig.read(path)

    def text_tokenizer(self) -> Any:
        """The folder's tokenizer, as `open_text_tokenizer`."""
        self._read.update(text_tokenizer_files(self.folder))
        return open_text_tokenizer(self.folder)

    def tensors(self, name: str) -> TensorReader:
        """The tensors of a file or of its shards; a pickled file is read as plain tensors alone."""
        path = self.folder / name
        reader = SafetensorsReader(path) if path.suffix == ".safetensors" else TorchPickleReader(path)
        self._read.update(reader.opened)
        return reader

    def weights(self, stem: str, subfolder: str = "") -> TensorReader:
        """The tensors of `STEM.safetensors`, in shards or not, or else of its bfloat16 variant."""
        folder = self.folder / subfolder
        for name in (f"{stem}.safetensors", f"{stem}.bf16.safetensors"):
            if has_tensors(folder / name):
                return self.tensors(str(Path(subfolder, name)))
        pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
        parts = sorted(path.name for path in folder.glob(f"{stem}*.safetensors"))
        found = f"only {', '.join(pickled[:3])}, which may run code when it is read" if pickled else "none"
        found = f"only {', '.join(parts[:3])}, without an index" if parts else found
        raise InputError(f"{folder}: expected weights as {stem}.safetensors, found {found}")

    def record(self) -> dict[str, Any]:
        """Record for a manifest: the Hub's commit, if there is one, and the hashes of all files that were read."""
        commit = {} if self.commit is None else {"commit": self.commit}
        sums = {name_as_text(path.relative_to(self.folder).as_posix()): _sha256(path) for path in sorted(self._read)}
        return {"source": name_as_text(self.name), **commit, "sha256": sums}


def name_as_text(name: str) -> str:
    """A file's name for a manifest: bytes that are no text, which Python keeps as lone surrogates, become "?"."""
    return name.encode(errors="replace").decode()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(
    source: str, patterns: tuple[str, ...], *, revision: str | None = None, what: str = "source", local: bool = True
) -> CheckpointSource:
    """Find a local folder, or the files of a Hub repository that match `patterns`, and download missing ones.

    Downloads, their resumption and the offline mode (HF_HUB_OFFLINE) are huggingface_hub's; no code is downloaded.

    Args:
        local: whether `source` may be a folder; else it is a Hub id, whatever is here.

    Raises:
        InputError: neither of the two, a revision of a local folder, or a failed download.
    """
    path = Path(home_expanded(source) if local else source)
    if local and path.is_dir():
        if revision is not None:
            raise InputError(f"{what}: a local folder has no revision, got {revision!r} for {source!r}")
        return CheckpointSource(path, path.resolve().name)
    if local and LOCAL.fullmatch(source) and not path.exists():
        raise InputError(f"{what}: there is no such folder or file, got {source!r}")
    if (local and path.exists()) or not REPOSITORY.fullmatch(source):
        raise InputError(f"{what}: expected a folder or a Hub id such as OWNER/NAME, got {source!r}")
    from huggingface_hub import constants, snapshot_download

    # Explicit, since huggingface_hub before 2.3 goes online for a commit whose list of files is not in the cache.
    offline = constants.HF_HUB_OFFLINE
    try:
        folder = Path(
            snapshot_download(source, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
        )
    except Exception as error:  # the Hub's own classes, those of the network and of the disk
        reason = first_line(error)
        raise InputError(f"{what}: {source} cannot be had from the Hub or its cache: {reason}") from error
    return CheckpointSource(folder, source, commit=folder.name)
