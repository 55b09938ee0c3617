"""The state of a run on disk: safetensors and JSON, written aside and renamed; nothing is pickled.

A run is a folder: `recipe.json`, `metrics.jsonl`, and for each stage `STAGE/state/` (the newest resumable state) and
`STAGE/done/` (weights at its end). Random numbers and data order are functions of (seed, stage, step), so the step
number is the whole of that state. `meta.json` has the checksums of all files and its own: a damaged state is never
taken for a whole one, nor for none.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spar.checkpoints.safetensors_io import SafetensorsReader, TensorSource, check_finite, check_fit, describe_mismatch
from spar.common.config import from_dict, read_json, write_json
from spar.common.errors import InputError
from spar.common.files import swap_folders, usual_mode
from spar.training.distributed import SINGLE_PROCESS, DistributedContext, own_rows

META = "meta.json"
CHECKSUMS, SEAL = "files", "sha256"  # in meta.json: of every other file by name, and of meta.json itself
PIECE = 2**24  # numbers that are read at once
ROWS = "rows"  # in the header of a sharded file: {tensor: [first row, rows of the whole]}


@dataclass(frozen=True)
class TrainState:
    """Where a stage stands: `step` steps are done."""

    stage: str
    step: int
    seconds: float = 0.0


@dataclass(frozen=True)
class FoundState:
    """The newest whole state of a stage: its folder, how far it is, and the damaged newer ones with why they are."""

    path: Path
    state: TrainState
    passed: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()


def save_folder(
    target: Path, tensors: dict[str, dict[str, Tensor]], meta: dict, parallel: DistributedContext = SINGLE_PROCESS,
    *, keep: int = 1,
) -> None:  # fmt: skip
    """Write every group and `meta.json` into a folder that appears whole or not at all.

    The last `keep - 1` folders before it stay as `TARGET.1` and so on, the newest first.

    A group is `NAME.safetensors`, or where it is sharded among processes, one `NAME-RANK-of-WORLD.safetensors` each:
    every process writes its own rows, and nothing is gathered. All processes call this together.

    Raises:
        OSError: on every process, where it could not be written on one; what was there before stays.
    """
    aside, old = target.with_name(target.name + ".part"), target.with_name(target.name + ".old")
    with parallel.fail_together():
        if parallel.main:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
    with parallel.fail_together():
        written = [_write_group(aside, name, group, parallel) for name, group in tensors.items()]
        own = {path.name: checksum(path) for path in written if path is not None}
        write_json(aside / f"{CHECKSUMS}-{parallel.rank}.json", own)
    with parallel.fail_together():
        if parallel.main:
            parts = sorted(aside.glob(f"{CHECKSUMS}-*.json"))
            write_meta(aside, {**meta, CHECKSUMS: {k: v for part in parts for k, v in read_json(part).items()}})
            for part in parts:
                part.unlink()
            if keep > 1 and target.exists():
                _make_room(target, keep)
            swap_folders(aside, target, old)


def _make_room(target: Path, keep: int) -> None:
    """Rename the newest folder and those before it, so that `keep - 1` of them stay."""
    for number in range(keep - 1, 0, -1):
        newer = _older(target, number - 1)
        if newer.exists():
            shutil.rmtree(_older(target, number), ignore_errors=True)
            newer.rename(_older(target, number))


def _older(target: Path, number: int) -> Path:
    return target.with_name(f"{target.name}.{number}") if number else target


def write_meta(folder: Path, values: dict[str, Any]) -> None:
    """Write `meta.json` with its own checksum."""
    write_json(folder / META, {**values, SEAL: _seal(values)})
    _fsync(folder / META)


def read_meta(folder: Path) -> dict[str, Any]:
    """The fields of `meta.json`.

    Raises:
        InputError: it is missing, unreadable, or disagrees with its own checksum.
    """
    values = read_json(folder / META)
    seal = values.pop(SEAL, None)
    if seal != _seal(values):
        raise InputError(
            f"{folder / META} disagrees with its own checksum: it is damaged, or of an earlier version of spar, with "
            "which to finish its run"
        )
    return values


def _seal(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path) -> str | None:
    """Why a saved folder is not whole, or None."""
    try:
        listed = read_meta(folder).get(CHECKSUMS, {})
        for name, wanted in listed.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if checksum(folder / name) != wanted:
                return f"{name} disagrees with its checksum"
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None


def find_state(folder: Path) -> FoundState | None:
    """The newest state of a stage that is whole, among those that were kept; None where none was saved.

    Raises:
        InputError: there are states, but none is whole.
    """
    passed: list[str] = []
    damaged: list[Path] = []
    for path in _states(folder):
        reason = damage(path)
        if reason is None:
            return FoundState(path, _train_state(path), tuple(passed), tuple(damaged))
        passed.append(f"{path.name} ({reason})")
        damaged.append(path)
    if passed:
        raise InputError(
            f"{folder.parent}: no saved state is whole: {', '.join(passed)}; train the stage anew "
            f"(--stage {folder.parent.name}), or bring back a copy"
        )
    return None


def newest_state(folder: Path) -> TrainState | None:
    """How far the newest of a stage's saved states is, by its `meta.json` alone; None where none was saved.

    Raises:
        InputError: its `meta.json` is missing or damaged.
    """
    states = _states(folder)
    return _train_state(states[0]) if states else None


def _states(folder: Path) -> list[Path]:
    """The saved states of a stage, the newest first."""
    numbered = [path for path in folder.parent.glob(f"{folder.name}.*") if path.suffix[1:].isdigit()]
    newest = existing_checkpoint(folder)
    return [*([newest] if newest.exists() else []), *sorted(numbered, key=lambda path: int(path.suffix[1:]))]


def remove_states(folder: Path) -> None:
    """Remove all saved states of a stage, the oldest first."""
    discard([*reversed(_states(folder)), folder.with_name(folder.name + ".old"), folder])


def discard(folders: Sequence[Path]) -> None:
    """Remove folders; one that is broken off in the middle of it is no state any more, nor a damaged one."""
    for path in folders:
        trash = path.with_name(path.name + ".trash")
        shutil.rmtree(trash, ignore_errors=True)
        if path.exists():
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def _write_group(folder: Path, name: str, group: dict[str, Tensor], parallel: DistributedContext) -> Path | None:
    """This process's part of a group; what is not sharded is the main process's to write."""
    sharded = any(isinstance(value, DTensor) for value in group.values())
    if not (parallel.main or sharded):
        return None
    own = {key: _own_rows(value) for key, value in group.items() if parallel.main or isinstance(value, DTensor)}
    rows = {key: [start, group[key].shape[0]] for key, (_, start) in own.items() if isinstance(group[key], DTensor)}
    stored = {key: local.detach().contiguous().cpu() for key, (local, _) in own.items()}
    part = f"-{parallel.rank:05}-of-{parallel.world:05}" if sharded else ""
    path = folder / f"{name}{part}.safetensors"
    with usual_mode(path):
        save_file(stored, path, {ROWS: json.dumps(rows)} if sharded else None)
    _fsync(path)
    return path


def _own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """What this process holds of a tensor, and the number of its first row; FSDP shards rows."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh = tensor.device_mesh
    return tensor.to_local(), own_rows(tensor.shape[0], mesh.get_local_rank(), mesh.size()).start


def _fsync(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def existing_checkpoint(folder: Path) -> Path:
    """The folder itself, or the older one where a save was cut between its two renames."""
    old = folder.with_name(folder.name + ".old")
    return old if old.exists() and not folder.exists() else folder


def shards(folder: Path, name: str) -> list[Path]:
    """The files of a group: one, or one for each process that wrote it.

    Raises:
        InputError: none, or not all of those that belong together.
    """
    folder = existing_checkpoint(folder)
    parts = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
    if not parts:
        return [folder / f"{name}.safetensors"]
    world = int(parts[0].stem.rsplit("-", 1)[-1])
    expected = [folder / f"{name}-{rank:05}-of-{world:05}.safetensors" for rank in range(world)]
    if parts != expected:
        missing = sorted(path.name for path in {*expected} - {*parts})
        raise InputError(f"{folder}: expected the {world} parts of {name}, missing {', '.join(missing) or 'none'}")
    return parts


class GroupReader:
    """The tensors of one group of a saved state, read one at a time, also where several processes wrote their rows.

    `shapes` has every tensor, whole, on the meta device. Raises `InputError` for files that are missing or damaged.
    """

    def __init__(self, folder: Path, name: str) -> None:
        files = shards(folder, name)
        listed = read_meta(files[0].parent).get(CHECKSUMS, {})
        for path in files:
            if path.is_file() and checksum(path) != listed.get(path.name):
                raise InputError(f"{path} disagrees with its checksum in {META}: it is damaged; train its stage again")
        self.shapes: dict[str, Tensor] = {}
        self._pieces: dict[str, list[tuple[int, SafetensorsReader]]] = {}  # of each tensor, with their first rows
        for path in files:
            reader = SafetensorsReader(path)
            with safe_open(path, "pt") as file:  # (first row, rows of the whole) of every sharded tensor
                rows = json.loads((file.metadata() or {}).get(ROWS, "{}"))
            for key, piece in reader.shapes.items():
                start, *total = rows.get(key, [0])
                self.shapes[key] = piece.new_empty(*total, *piece.shape[1:]) if total else piece
                self._pieces.setdefault(key, []).append((start, reader))

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, whole, a floating one in `dtype` if given."""
        pieces = self._pieces[key]
        if len(pieces) == 1:
            return pieces[0][1].read(key, dtype)
        whole = self.read_rows(key, slice(0, len(self.shapes[key])))
        return whole.to(dtype) if dtype and whole.is_floating_point() else whole

    def read_rows(self, key: str, rows: slice) -> Tensor:
        """Read some rows of a tensor, from the files of all processes that wrote it."""
        outline = self.shapes[key]
        found = torch.empty((rows.stop - rows.start, *outline.shape[1:]), dtype=outline.dtype)
        for start, reader in self._pieces[key]:
            first, last = max(rows.start, start), min(rows.stop, start + len(reader.shapes[key]))
            if first < last:
                piece = reader.read_rows(key, slice(first - start, last - start))
                found[first - rows.start : last - rows.start] = piece
        return found


def load_group(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one group of a saved state, whole, also where several processes wrote them."""
    reader = GroupReader(folder, name)
    return {key: reader.read(key) for key in reader.shapes}


def group_keys(folder: Path, name: str) -> set[str]:
    """The names of a group's tensors, from the headers of its files; InputError as in `load_group`."""
    return {key for path in shards(folder, name) for key in SafetensorsReader(path).shapes}


def load_into(own: dict[str, Tensor], folder: Path, name: str) -> None:
    """Copy a saved group into tensors of the same names and shapes, each process its own rows.

    Raises:
        InputError: where the names or shapes differ; nothing is copied then.
    """
    given = GroupReader(folder, name)
    mismatch = describe_mismatch(own, given.shapes)
    if mismatch:
        raise InputError(f"{name}.safetensors in {folder} does not fit this stage: {mismatch}")
    copy_stored(own, given, {key: key for key in own}, folder)


@torch.no_grad()
def copy_stored(own: dict[str, Tensor], source: TensorSource, names: Mapping[str, str | None], where: object) -> None:
    """Copy stored tensors into tensors of the same shapes, some rows at a time, and each process its own rows.

    Args:
        names: the stored name for each of `own`; None keeps it as it is.
        where: what is read, for messages.

    Raises:
        InputError: numbers that are not finite, or files that are damaged.
    """
    for key, tensor in own.items():
        name = names[key]
        if name is None:
            continue
        local, start = _own_rows(tensor)
        if not local.dim():
            stored = source.read(name)
            check_finite({name: stored}, where)
            local.copy_(stored)
            continue
        each = max(1, PIECE * len(local) // max(1, local.numel()))
        for first in range(0, len(local), each):
            part = local[first : first + each]
            stored = source.read_rows(name, slice(start + first, start + first + len(part)))
            check_finite({name: stored}, where)
            part.copy_(stored)


def load_stored(module: nn.Module, source: TensorSource, where: object) -> None:
    """Load a module's tensors strictly, as `copy_stored`; InputError too where names or shapes differ."""
    own = module.state_dict()
    check_fit(own, source.shapes, where)
    copy_stored(own, source, {key: key for key in own}, where)


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], names: dict[int, str]) -> dict[str, Tensor]:
    """Flatten the state of optimizers to `PARAMETER|FIELD` tensors; `names` maps id(parameter) to its name."""
    flat = {}
    for parameter, fields in (item for optimizer in optimizers for item in optimizer.state.items()):
        for field, value in fields.items():
            flat[f"{names[id(parameter)]}|{field}"] = value
    return flat


def read_train_state(folder: Path) -> TrainState | None:
    """How far a stage's saved folder is, or None where there is no folder.

    Raises:
        InputError: a folder whose `meta.json` is missing or damaged.
    """
    path = existing_checkpoint(folder)
    return _train_state(path) if path.exists() else None


def _train_state(folder: Path) -> TrainState:
    known = {field: value for field, value in read_meta(folder).items() if field in TrainState.__dataclass_fields__}
    return from_dict(TrainState, known, str(folder / META), complete=True)
