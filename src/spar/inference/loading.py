"""The pipeline of a model's folder, whichever system it is of."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch

from spar.checkpoints.hub import model_folder
from spar.checkpoints.model_header import TITLES, model_type
from spar.common.errors import InputError
from spar.inference.base import Pipeline, choose_device_and_dtype

# Of each system its pipeline; a module is imported when a model of its system is loaded.
PIPELINES = {
    "spar": ("spar.inference.pipeline", "SparPipeline"),
    "dualtoken": ("spar.inference.dualtoken", "DualTokenPipeline"),
}


def load_pipeline(path: str | Path | None = None, **settings: Any) -> Pipeline:
    """The pipeline of a folder, or of `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`; without a path, of the bundled
    weights.

    Args:
        settings: those of the system's own `from_pretrained`, which has them explained.

    Raises:
        InputError: a folder of no known system, or a setting that its system does not have; and as `from_pretrained`.
    """
    system = "spar" if path is None else model_type(model_folder(path))
    module, name = PIPELINES[system]
    load = getattr(importlib.import_module(module), name).from_pretrained
    return load(path, **_own_settings(load, system, settings))


def open_bundle(system: str, bundle: Any, device: str | torch.device | None = None) -> Pipeline:
    """The pipeline of a model that a training has made, of the system that its recipe's `kind` names.

    Raises:
        InputError: an unavailable device.
    """
    where, dtype = choose_device_and_dtype(device, None)
    module, name = PIPELINES[system]
    found: Pipeline = getattr(importlib.import_module(module), name)(bundle, dtype, where, progress=False)
    return found


def tasks_of(system: str) -> tuple[str, ...]:
    """The tasks that the pipeline of a system has, without a model."""
    module, name = PIPELINES[system]
    return getattr(importlib.import_module(module), name).tasks


def _own_settings(load: Any, system: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a system's `from_pretrained` has; InputError for another one that is not at SPAR's default."""
    known = inspect.signature(load).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
        return settings
    module, name = PIPELINES["spar"]
    defaults = inspect.signature(getattr(importlib.import_module(module), name).from_pretrained).parameters
    for key, value in settings.items():
        if key not in known and not (key in defaults and value == defaults[key].default):
            raise InputError(f"{key}: {TITLES[system]} has no such setting, got {value!r}")
    return {key: value for key, value in settings.items() if key in known}
