"""Available devices, and how fast they multiply."""

import time

import torch

from spar.common.cpu import cpu_name
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


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The given device, checked as in `check_device`; None is CUDA if available, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return check_device(device)


def device_name(device: torch.device) -> str:
    """A device and what it is: "cuda:1 (NVIDIA H200)"."""
    return f"{device} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name()})"


def measure_peak(device: str | torch.device, dtype: torch.dtype, side: int = 1024) -> float:
    """Operations a second of a product of square matrices, the best of five."""
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    seconds = []
    for _ in range(6):  # the first one is the warm-up
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds[1:])
