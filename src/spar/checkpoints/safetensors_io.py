"""Tensors in safetensors files, single or in shards with an index, read one at a time and always strictly."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spar.common.config import read_json, write_json
from spar.common.errors import InputError

SHARD_BYTES = 4 * 2**30
INDEX = ".index.json"


class SafetensorsReader:
    """The tensors of `NAME.safetensors`, or of the shards that `NAME.safetensors.index.json` lists.

    `shapes` has every tensor on the meta device, `types` the names of their types in safetensors ("F32", "BF16");
    `read` returns one tensor with its own memory. Raises `InputError` for files that are missing, damaged or differ
    from the index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index = path.with_name(path.name + INDEX)
        self.files = [path] if path.is_file() or not index.is_file() else self._listed(index)
        self._handles = [_open(file) for file in self.files]
        self._where = {key: handle for handle in self._handles for key in handle.keys()}  # noqa: SIM118
        if len(self.files) > 1 or self.files[0] != path:
            self._check(index)
        self.shapes = {
            key: torch.empty(handle.get_slice(key).get_shape(), device="meta") for key, handle in self._where.items()
        }

    @property
    def types(self) -> dict[str, str]:
        return {key: handle.get_slice(key).get_dtype() for key, handle in self._where.items()}

    def _listed(self, index: Path) -> list[Path]:
        """The shards, each a plain file name in the index's folder."""
        names = self._map(index).values()
        strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if strange:
            raise InputError(f"{index}: expected names of files beside it, got {strange[0]!r}")
        return [index.with_name(name) for name in dict.fromkeys(names)]

    def _map(self, index: Path) -> dict[str, str]:
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise InputError(f"{index}: expected a weight_map from tensors to files, got {listed!r}")
        return listed

    def _check(self, index: Path) -> None:
        """Check that each tensor is in the file that the index gives, and in no other."""
        pairs = zip(self.files, self._handles, strict=True)
        stored = {(key, file.name) for file, handle in pairs for key in handle.keys()}  # noqa: SIM118
        wrong = sorted(stored ^ set(self._map(index).items()))
        if wrong:
            raise InputError(f"{index} and its shards disagree about {len(wrong)} tensors, {wrong[0][0]} among them")

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, a floating one in `dtype` if given; it is a copy, independent of the file."""
        try:
            tensor = self._where[key].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path} is damaged: {error}") from error
        return tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True)


def _open(path: Path) -> "safe_open":
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing in {path.parent}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file or of its shards; a missing or damaged one raises `InputError`."""
    files = SafetensorsReader(path)
    return {key: files.read(key) for key in files.shapes}


def write_tensors(
    module: nn.Module, path: Path, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a module's weights, floating ones in `dtype` if given; in shards if they exceed `shard_bytes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach() for key, value in module.state_dict().items()}
    kinds = {key: dtype if dtype and value.is_floating_point() else value.dtype for key, value in state.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for key, value in state.items():
        size = value.numel() * kinds[key].itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    if len(shards) == 1:
        _save({key: value.to("cpu", kinds[key]).contiguous() for key, value in state.items()}, path)
        return
    names = [f"{path.stem}-{i:05d}-of-{len(shards):05d}{path.suffix}" for i in range(1, len(shards) + 1)]
    for name, keys in zip(names, shards, strict=True):
        _save({key: state[key].to("cpu", kinds[key]).contiguous() for key in keys}, path.with_name(name))
    total = sum(value.numel() * kinds[key].itemsize for key, value in state.items())
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    write_json(path.with_name(path.name + INDEX), {"metadata": {"total_size": total}, "weight_map": weight_map})


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # for example for a full disk
        raise OSError(str(error)) from error


def describe_mismatch(own: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """One line on missing, unexpected and misshapen keys; empty if all fit."""
    wrong = [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(own[key].shape)}"
        for key in sorted(own.keys() & given.keys())
        if own[key].shape != given[key].shape
    ]
    groups = (
        ("missing", sorted(own.keys() - given.keys())),
        ("unexpected", sorted(given.keys() - own.keys())),
        ("of another shape", wrong),
    )
    return "; ".join(
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" for kind, keys in groups if keys
    )


def load_weights(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Load strictly into the module's own memory and types; one report lists all mismatches."""
    mismatch = describe_mismatch(module.state_dict(), tensors)
    if mismatch:
        raise InputError(f"{where} does not fit this model: {mismatch}")
    module.load_state_dict(tensors)


def load_into_meta(module: nn.Module, path: Path, where: str, dtype: torch.dtype | None = torch.float32) -> None:
    """Load strictly into a module on the meta device: its weights become those of the file.

    Floating ones are in `dtype`, or as stored if it is None.
    """
    files = SafetensorsReader(path)
    mismatch = describe_mismatch(module.state_dict(), files.shapes)
    if mismatch:
        raise InputError(f"{where} does not fit this model: {mismatch}")
    module.load_state_dict({key: files.read(key, dtype) for key in files.shapes}, assign=True)
