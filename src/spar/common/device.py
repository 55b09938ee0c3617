"""Available devices."""

import torch

from spar.common.errors import InputError


def check_device(device: str | torch.device) -> torch.device:
    """Refuse a device that torch does not know, that is not available, or that computes nothing ("meta")."""
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, ImportError, TypeError):  # each backend has its own way to be missing
        where = None
    if where is None or where.type == "meta":
        here = ["cpu"] + [name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available()]
        raise InputError(f"device: expected one that is here, got {str(device)!r} (here: {', '.join(here)})")
    return where
