"""Tensors in safetensors files, single or in shards with an index, read one at a time and always strictly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spar.common.config import read_json, write_json
from spar.common.errors import InputError
from spar.common.files import usual_mode

SHARD_BYTES = 4 * 2**30
INDEX = ".index.json"
# torch's types by safetensors' names for them.
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip


class TensorSource(Protocol):
    """Stored tensors that are read one at a time; `shapes` has every one, with its type, on the meta device."""

    shapes: dict[str, Tensor]

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, a floating one in `dtype` if given; it has its own memory."""

    def read_rows(self, key: str, rows: slice) -> Tensor:
        """Read some rows of a tensor, from `rows.start` to before `rows.stop`; they have their own memory."""


class SafetensorsReader:
    """The tensors of `NAME.safetensors`, or of the shards that `NAME.safetensors.index.json` lists.

    `shapes` has every tensor, with its type, on the meta device, `types` the names of their types in safetensors
    ("F32", "BF16"); `read` returns one tensor with its own memory. `files` are those of the tensors, `opened` these
    and the index. Raises `InputError` for files that are missing, damaged, differ from the index, or have tensors
    of a type or shape that torch does not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index = path.with_name(path.name + INDEX)
        listed = None if path.is_file() or not index.is_file() else _read_index(index)
        self.files = [path] if listed is None else [path.with_name(name) for name in dict.fromkeys(listed.values())]
        self.opened = self.files if listed is None else [index, *self.files]
        handles = [_open(file) for file in self.files]
        self._where = {key: handle for handle in handles for key in handle.keys()}  # noqa: SIM118
        if listed is not None:
            pairs = zip(self.files, handles, strict=True)
            stored = {(key, file.name) for file, handle in pairs for key in handle.keys()}  # noqa: SIM118
            if wrong := sorted(stored ^ set(listed.items())):
                raise InputError(
                    f"{index} and its shards disagree about {len(wrong)} tensors, {wrong[0][0]} among them"
                )
        self.shapes = {key: self._outline(key) for key in self._where}

    def _outline(self, key: str) -> Tensor:
        stored = self._where[key].get_slice(key)
        kind, shape = stored.get_dtype(), stored.get_shape()
        if kind not in TYPES:
            raise InputError(f"{self.path}: expected tensors of {', '.join(TYPES)}, got {key} of {kind}")
        try:
            return torch.empty(shape, dtype=TYPES[kind], device="meta")
        except (RuntimeError, TypeError, OverflowError):  # a side beyond 63 bits beside one of 0
            raise InputError(f"{self.path}: expected a shape of a tensor, got {key} of {tuple(shape)}") from None

    @property
    def types(self) -> dict[str, str]:
        return {key: handle.get_slice(key).get_dtype() for key, handle in self._where.items()}

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, a floating one in `dtype` if given; it is a copy, independent of the file."""
        try:
            tensor = self._where[key].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path} is damaged: {error}") from error
        return tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True)

    def read_rows(self, key: str, rows: slice) -> Tensor:
        """Read some rows of a tensor; they are a copy, independent of the file."""
        if rows.start >= rows.stop:
            return torch.empty((0, *self.shapes[key].shape[1:]), dtype=self.shapes[key].dtype)
        try:
            part: Tensor = self._where[key].get_slice(key)[rows.start : rows.stop]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path} is damaged: {error}") from error
        return part.clone()


class PartTensors:
    """Those tensors of a source whose names begin with a prefix, without it."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self._source, self._prefix = source, prefix
        found = source.shapes.items()
        self.shapes = {key.removeprefix(prefix): value for key, value in found if key.startswith(prefix)}

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, as the source."""
        return self._source.read(self._prefix + key, dtype)

    def read_rows(self, key: str, rows: slice) -> Tensor:
        """Read some rows of a tensor, as the source."""
        return self._source.read_rows(self._prefix + key, rows)


class JoinedTensors:
    """The tensors of several sources, each under its prefix, and others that stand in for stored ones.

    Args:
        sources: by their prefixes, which end with a dot.
        given: tensors by their whole names.
    """

    def __init__(self, sources: Mapping[str, TensorSource], given: Mapping[str, Tensor]) -> None:
        self._given = given
        self._where = {prefix + key: (one, key) for prefix, one in sources.items() for key in one.shapes}
        self.shapes = {name: one.shapes[key] for name, (one, key) in self._where.items()}
        self.shapes |= {name: torch.empty_like(value, device="meta") for name, value in given.items()}

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, as the source that has it."""
        if key in self._given:
            value = self._given[key]
            return value.to(dtype if dtype and value.is_floating_point() else value.dtype, copy=True)
        source, name = self._where[key]
        return source.read(name, dtype)

    def read_rows(self, key: str, rows: slice) -> Tensor:
        """Read some rows of a tensor, as the source that has it."""
        if key in self._given:
            return self._given[key][rows].clone()
        source, name = self._where[key]
        return source.read_rows(name, rows)


def has_tensors(path: Path) -> bool:
    """Whether `NAME.safetensors` is there, as one file or in shards."""
    return path.is_file() or path.with_name(path.name + INDEX).is_file()


def _read_index(index: Path) -> dict[str, str]:
    """The shard of each tensor, a plain file name in the index's folder."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index}: expected a weight_map from tensors to files, got {listed!r}")
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: expected names of files beside it, got {name!r}")
    return listed


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
    tensors: Mapping[str, Tensor] | TensorSource, path: Path, dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write tensors, floating ones in `dtype` if given; in shards with an index if they exceed `shard_bytes`.

    They are read, converted and copied to the CPU shard by shard.

    Raises:
        InputError: a number that is not finite, or not in `dtype`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        key: torch.empty_like(value, dtype=dtype if dtype and value.is_floating_point() else None, device="meta")
        for key, value in (tensors if isinstance(tensors, Mapping) else tensors.shapes).items()
    }
    read = tensors.__getitem__ if isinstance(tensors, Mapping) else tensors.read
    split = split_torch_state_dict_into_shards(
        stored, filename_pattern=f"{path.stem}{{suffix}}{path.suffix}", max_shard_size=shard_bytes
    )
    for name, keys in split.filename_to_tensors.items():
        shard = {key: read(key).detach().to("cpu", stored[key].dtype).contiguous() for key in keys}
        check_finite(shard, Path(path.parent.name, path.name))  # a folder that is written aside has a passing name
        try:
            with usual_mode(path.with_name(name)):
                save_file(shard, path.with_name(name))
        except SafetensorError as error:  # for example for a full disk
            raise OSError(str(error)) from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(path.with_name(path.name + INDEX), index)


def check_finite(tensors: dict[str, Tensor], where: object) -> None:
    """Refuse numbers that are not finite; InputError names the first tensor that has one."""
    for key, value in tensors.items():
        if not value.is_floating_point():
            continue
        numbers = value.float() if value.element_size() == 1 else value  # torch does not judge 8 bits
        if not bool(torch.isfinite(numbers).all()):
            kind = _kind(value)
            raise InputError(f"{where}: expected finite weights, got {key} with numbers that are not, in {kind}")


def describe_mismatch(own: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """One line on missing, unexpected and misshapen keys, and numbers of another kind; empty if all fit."""
    wrong = [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(own[key].shape)}"
        for key in sorted(own.keys() & given.keys())
        if own[key].shape != given[key].shape
    ]
    kinds = [
        f"{key} is {_kind(given[key])}, expected {_kind(own[key])}"
        for key in sorted(own.keys() & given.keys())
        if own[key].is_floating_point() != given[key].is_floating_point()
    ]
    groups = (
        ("missing", sorted(own.keys() - given.keys())),
        ("unexpected", sorted(given.keys() - own.keys())),
        ("of another shape", wrong),
        ("of another type", kinds),
    )
    return "; ".join(
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" for kind, keys in groups if keys
    )


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def check_fit(own: dict[str, Tensor], given: dict[str, Tensor], where: object) -> None:
    """Refuse tensors of other names or shapes than a model's own; one report lists all mismatches."""
    if mismatch := describe_mismatch(own, given):
        raise InputError(f"{where} does not fit this model: {mismatch}")


def load_into_meta(module: nn.Module, files: SafetensorsReader) -> None:
    """Load strictly into a module on the meta device: its weights become those of the files, in float32."""
    check_fit(module.state_dict(), files.shapes, files.path.parent)
    tensors = {key: files.read(key, torch.float32) for key in files.shapes}
    check_finite(tensors, files.path)
    module.load_state_dict(tensors, assign=True)
