"""The state of a run on disk: safetensors and JSON, written aside and renamed; nothing is pickled.

A run is a folder: `recipe.json`, `metrics.jsonl`, and for each stage `STAGE/state/` (the newest resumable state) and
`STAGE/done/` (weights at its end). Random numbers and data order are functions of (seed, stage, step), so the step
number is the whole of that state.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from spar.config import from_dict, read_json, write_json
from spar.errors import InputError
from spar.models.weights import describe_mismatch, read_tensors


@dataclass(frozen=True)
class Progress:
    """Where a stage stands: `step` steps are done."""

    stage: str
    step: int
    seconds: float = 0.0


def save_folder(target: Path, tensors: dict[str, dict[str, Tensor]], meta: dict) -> None:
    """Write `NAME.safetensors` for each group and `meta.json` into a folder that appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, old = target.with_name(target.name + ".part"), target.with_name(target.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, group in tensors.items():
        stored = {key: value.detach().contiguous().cpu() for key, value in group.items()}
        save_file(stored, aside / f"{name}.safetensors")
    write_json(aside / "meta.json", meta)
    for file in aside.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def standing(folder: Path) -> Path:
    """The folder itself, or the older one where a save was cut between its two renames."""
    old = folder.with_name(folder.name + ".old")
    return old if old.exists() and not folder.exists() else folder


def load_group(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one group of a saved state."""
    return read_tensors(standing(folder) / f"{name}.safetensors")


def load_fitting(folder: Path, name: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a group whose names and shapes must be those of `own`, or `InputError`."""
    given = load_group(folder, name)
    mismatch = describe_mismatch(own, given)
    if mismatch:
        raise InputError(f"{name}.safetensors in {folder} does not fit this stage: {mismatch}")
    return given


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], names: dict[int, str]) -> dict[str, Tensor]:
    """Flatten the state of optimizers to `PARAMETER|FIELD` tensors; `names` maps id(parameter) to its name."""
    flat = {}
    for parameter, fields in (item for optimizer in optimizers for item in optimizer.state.items()):
        for field, value in fields.items():
            flat[f"{names[id(parameter)]}|{field}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    return flat


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], names: dict[int, str], folder: Path) -> None:
    """The inverse of `optimizer_tensors`, from a saved state; `InputError` where it is not exactly theirs."""
    flat = load_fitting(folder, "optimizer", optimizer_tensors(optimizers, names))
    for optimizer in optimizers:
        for parameter, fields in optimizer.state.items():
            for field in fields:
                fields[field] = flat[f"{names[id(parameter)]}|{field}"].to(parameter.device)


def read_progress(folder: Path) -> Progress | None:
    """How far a stage's saved state is, or None."""
    path = standing(folder) / "meta.json"
    if not path.exists():
        return None
    known = {field: value for field, value in read_json(path).items() if field in Progress.__dataclass_fields__}
    return from_dict(Progress, known, str(path), complete=True)
