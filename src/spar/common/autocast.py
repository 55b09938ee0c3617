"""Autocast on any device: disabling it, and whether it is enabled."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> AbstractContextManager[None]:
    """Disable autocast for operations on tensors such as this one; torch's meta device has none."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def under_autocast(like: Tensor) -> bool:
    """Whether matrix products on tensors such as this one change their type."""
    return not like.is_meta and torch.is_autocast_enabled(like.device.type)
