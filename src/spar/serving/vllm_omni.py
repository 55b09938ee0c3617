"""SPAR in vLLM-Omni (0.30), whose diffusers backend opens a SPAR folder as the `DiffusionPipeline` that it is.

vLLM-Omni calls `register` in each of its processes (entry point `vllm_omni.general_plugins`).
"""

import importlib
from typing import Any

from spar.common.errors import InputError


class SparCapabilities:
    """What vLLM-Omni reads under the name of the pipeline's class."""

    # No first request: its words are not in a closed vocabulary, and an error of it ends the server.
    dummy_run_num_frames = 0
    color_format = "RGB"

    def __init__(self, **_: Any) -> None:
        raise InputError("SPAR in vLLM-Omni: expected --diffusion-load-format diffusers, got another format")


def register() -> None:
    """Tell diffusers and vLLM-Omni of SPAR's pipeline; more than one call is as one."""
    importlib.import_module("spar.inference.diffusers_pipeline")  # which names its class in diffusers
    registry = importlib.import_module("vllm_omni.diffusion.registry")
    registry.register_diffusion_model("SparDiffusionPipeline", __name__, SparCapabilities.__name__)
