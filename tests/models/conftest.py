"""A model far smaller than `tiny`, and a way to make every weight random.

The libraries initialise biases and position embeddings to zero, norms and layer scales to one: weights under which
many a mistake is invisible.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from spar.models.config import SparConfig
from spar.recipes.tiny import TINY_MODEL


@pytest.fixture(scope="session")
def config() -> SparConfig:
    """16 visual tokens, 4 LLM layers with grouped keys, 2 ViT layers, 3 denoiser blocks."""
    return replace(
        TINY_MODEL,
        vision=replace(TINY_MODEL.vision, image_size=32, layers=2),
        denoiser=replace(TINY_MODEL.denoiser, layers=3, tap_block=2),
    )


@pytest.fixture(scope="session")
def randomize() -> Callable[..., nn.Module]:
    """Fill a module with random weights that keep activations near unit size; frozen, in evaluation mode."""

    def fill(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() > 1:
                    parameter.copy_(noise / min(parameter[0].numel(), 64) ** 0.5)
                elif name.endswith("bias"):  # torch draws these at random
                    parameter.copy_(0.3 * noise)
                else:
                    parameter.add_(0.3 * noise)
        return module.eval().requires_grad_(False)

    return fill


@pytest.fixture(scope="session")
def foreign() -> ModuleType:
    """`foreign.py` beside this file: tiny random checkpoints in the published formats."""
    spec = importlib.util.spec_from_file_location("foreign", Path(__file__).with_name("foreign.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
