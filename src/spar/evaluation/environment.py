"""Settings of a result: the detector and its accuracy, the options, the model, the machine, versions and time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from datetime import UTC, datetime
from functools import cache
from typing import Any

from spar import __version__
from spar.common.cpu import cpu_name
from spar.common.device import dtype_name
from spar.evaluation.options import EvalOptions
from spar.worlds.shapes.detector import DETECTOR_VERSION, detector_accuracy

DETECTOR_SAMPLE = 200  # scenes on which the detector's own accuracy is measured with every result
_LIBRARIES = ("torch", "numpy", "transformers", "diffusers", "torchmetrics")


class Timer:
    """Wall seconds since its creation."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def seconds(self) -> float:
        return round(time.monotonic() - self.began, 2)


@cache
def detector_info() -> dict[str, Any]:
    """The detector's version and its accuracy on real and on degraded renders, measured once (about 1 s)."""
    return {
        "version": DETECTOR_VERSION,
        "accuracy": detector_accuracy(DETECTOR_SAMPLE),
        "accuracy_degraded": detector_accuracy(DETECTOR_SAMPLE, degrade=True),
        "n": DETECTOR_SAMPLE,
    }


def machine_info() -> dict[str, Any]:
    """The processor's name, the cores that this process may use, the accelerator if any, the system."""
    import torch

    facts = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def version_info() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that the scores depend on."""
    facts = {"python": platform.python_version(), "spar": __version__}
    for name in _LIBRARIES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def used_guidance(pipe: Any, options: EvalOptions, *, edits: bool = False) -> float | None:
    """The guidance of images of prompts, or of edits: the run's, else the model's own if it has one."""
    own = getattr(getattr(pipe, "bundle", None), "sampling", None)
    scales = [getattr(own, "edit_guidance", None) if edits else None, getattr(own, "guidance", None)]
    return options.sampling().get("guidance_scale", next((scale for scale in scales if scale is not None), None))


def run_settings(
    pipe: Any, options: EvalOptions, clock: Timer, *, sampled: bool, edits: bool = False, **more: Any
) -> dict[str, Any]:
    """The settings of a result.

    Args:
        pipe: the model; attributes that it lacks (dtype, manifest, its own sampling defaults) are recorded as None.
        options: of the run.
        clock: started with the run.
        sampled: whether the flow was sampled, so that steps and guidance apply.
        edits: whether images were edited, for which the model may have another guidance.
        more: settings of one benchmark only.
    """
    own = getattr(getattr(pipe, "bundle", None), "sampling", None)
    manifest = getattr(pipe, "manifest", None) or {}
    sampling = {
        "steps": options.sampling().get("num_inference_steps", getattr(own, "steps", None)),
        "guidance": used_guidance(pipe, options, edits=edits),
    }
    dtype = getattr(pipe, "dtype", None)
    return {
        "label": options.label,
        "model": {key: manifest[key] for key in ("name", "recipe", "seed", "commit") if key in manifest},
        "combinations": options.combinations,
        "seed": options.seed,
        **(sampling if sampled else {}),
        "limit": options.limit,
        "size": getattr(pipe, "image_size", None),
        "dtype": None if dtype is None else dtype_name(dtype),
        "device": str(getattr(pipe, "device", "")) or None,
        "batch": options.batch,
        **({"processes": processes} if (processes := getattr(pipe, "processes", 1)) > 1 else {}),
        **more,
        "interval": "95 % bootstrap, 1000 draws",
        "detector": detector_info(),
        "machine": machine_info(),
        "versions": version_info(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": clock.seconds(),
    }
