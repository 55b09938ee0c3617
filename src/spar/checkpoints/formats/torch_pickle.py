"""Tensors in a file of torch.save (`.pt`, `.pth`), only for conversions and Inception's weights: torch's
reader of plain tensors, size-capped.

`weights_only` admits no code; the cap and the check of the contents keep a hostile file from filling the memory.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spar.common.errors import InputError, first_line

MAX_BYTES = 16 * 2**30
NESTED = ("state_dict", "model", "module")  # keys of the weights in files of training scripts


class TorchPickleReader:
    """As `SafetensorsReader`, for one file: `path`, `opened`, `shapes` and `read`."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self.path, self.opened = path, [path]
        self._tensors = _tensors_of(_load(path, max_bytes), path)
        self.shapes = {key: torch.empty_like(value, device="meta") for key, value in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        """Read one tensor as a copy."""
        return self._tensors[key].clone()


def _load(path: Path, max_bytes: int) -> Any:
    """Read a file with torch's reader of plain tensors, within the cap for its packed and unpacked size."""
    try:
        packed = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else []
        size = max(path.stat().st_size, sum(item.file_size for item in packed))
        if size > max_bytes:
            raise InputError(f"{path}: expected at most {max_bytes} bytes, got {size}")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=bool(packed))
    except InputError:
        raise
    except Exception as error:  # the reader raises nearly anything on what it does not admit
        raise InputError(f"{path} holds more than plain tensors, or is damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What torch objects to, without its advice to run what is in the file."""
    text, advice, _ = str(error).partition("\n\nCheck the documentation")
    last = text.rpartition("\n")[2] if advice else text
    return first_line(error, last.rpartition("WeightsUnpickler error: ")[2]).partition(". ")[0]


def _tensors_of(data: Any, path: Path) -> dict[str, Tensor]:
    """The state dictionary itself, or the nested one."""
    for name in NESTED:
        if isinstance(data, dict) and isinstance(data.get(name), dict):
            data = data[name]
    if not isinstance(data, dict) or not data:
        got = "an empty one" if data == {} else type(data).__name__
        raise InputError(f"{path}: expected a dictionary of tensors, got {got}")
    if others := [key for key, value in data.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path}: expected a dictionary of tensors, got others too, such as {others[0]!r}")
    return {str(key): value for key, value in data.items()}
