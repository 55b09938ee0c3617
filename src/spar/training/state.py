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

from spar.config import read_json, write_json
from spar.models.checkpoint import read_tensors


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
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def load_group(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one group of a saved state."""
    return read_tensors(folder / f"{name}.safetensors")


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], names: dict[int, str]) -> dict[str, Tensor]:
    """Flatten the state of optimizers to `PARAMETER|FIELD` tensors; `names` maps id(parameter) to its name."""
    flat = {}
    for parameter, fields in (item for optimizer in optimizers for item in optimizer.state.items()):
        for field, value in fields.items():
            flat[f"{names[id(parameter)]}|{field}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    return flat


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], names: dict[int, str], flat: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        name, field = key.rsplit("|", 1)
        by_name.setdefault(name, {})[field] = value
    for optimizer in optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            fields = by_name.get(names[id(parameter)])
            if fields is not None:
                optimizer.state[parameter] = {
                    field: value.to(parameter.device if field != "step" else "cpu") for field, value in fields.items()
                }


def read_progress(folder: Path) -> Progress | None:
    """How far a stage's saved state is, or None."""
    folder = folder if folder.exists() else folder.with_name(folder.name + ".old")
    if not (folder / "meta.json").exists():
        return None
    meta = read_json(folder / "meta.json")
    return Progress(meta["stage"], meta["step"], meta.get("seconds", 0.0))
