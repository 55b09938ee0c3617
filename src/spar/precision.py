"""Devices that are here, and where a network steps out of autocast on any of them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from spar.errors import InputError


def check_device(device: str | torch.device) -> torch.device:
    """Refuse a device that torch does not know, that is not here, or that computes nothing ("meta")."""
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, ImportError, TypeError):  # each backend has its own way to be missing
        where = None
    if where is None or where.type == "meta":
        here = ["cpu"] + [name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available()]
        raise InputError(f"device: expected one that is here, got {str(device)!r} (here: {', '.join(here)})")
    return where


def without_autocast(like: Tensor) -> AbstractContextManager[None]:
    """No autocast for operations on tensors such as this one; torch's meta device has none to leave."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def under_autocast(like: Tensor) -> bool:
    """Whether matrix products on tensors such as this one change their type."""
    return not like.is_meta and torch.is_autocast_enabled(like.device.type)
