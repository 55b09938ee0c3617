"""Available devices, and how fast they multiply."""

import functools
import logging
import time
from typing import Any

import torch

from spar.common.cpu import cpu_name, has_native_bfloat16
from spar.common.errors import InputError, first_line

log = logging.getLogger("spar.common")

MISSING = (RuntimeError, AssertionError, ImportError, TypeError)  # each backend has its own way to be missing


def device_failure(device: torch.device) -> str | None:
    """Why no number can be computed on a device and read back, or None: a GPU may be there that torch has no code for,
    and "meta" computes nothing.
    """
    try:
        float(torch.ones((), device=device) + 1)
    except MISSING as error:
        return first_line(error)
    return None


def check_device(device: str | torch.device) -> torch.device:
    """Refuse a device that torch does not know, that is not available, or that computes nothing ("meta")."""
    where: torch.device | None
    try:
        where = torch.device(device)
        failure = device_failure(where)
    except MISSING:
        where, failure = None, "no device"
    if where is None or failure:
        here = ["cpu"] + [name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available()]
        reason = f"; {failure}" if where is not None and where.type in here else ""
        raise InputError(f"device: expected one that is here, got {str(device)!r} (here: {', '.join(here)}{reason})")
    return where


def read_move(*arguments: Any, **keywords: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the type among the arguments of a module's `to`; InputError for other arguments."""
    try:
        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **keywords)
    except (RuntimeError, TypeError) as error:
        given = ", ".join([*map(repr, arguments), *(f"{name}={value!r}" for name, value in keywords.items())])
        expected = "to: expected a device, a type such as torch.bfloat16, or both"
        raise InputError(f"{expected}, got {given} ({first_line(error)})") from error
    return device, dtype


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The given device, checked as in `check_device`; None is CUDA if it is available and computes, else the CPU."""
    if device is not None:
        return check_device(device)
    if torch.cuda.is_available():
        where = torch.device("cuda")
        failure = device_failure(where)
        if failure is None:
            return where
        _warn_of_gpu(failure)
    return torch.device("cpu")


@functools.cache
def _warn_of_gpu(failure: str) -> None:
    """Say once why the GPU is not taken."""
    log.warning("the CPU is used, since the GPU does not compute (%s); spar doctor says what to do", failure)


def device_name(device: torch.device) -> str:
    """A device and what it is: "cuda:1 (NVIDIA H200)"."""
    return f"{device} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name()})"


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32: a CPU without took 100 times as long."""
    if device.type == "cuda":
        fast = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and has_native_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """A type's name: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def measure_peak(device: str | torch.device, dtype: torch.dtype, side: int = 1024) -> float:
    """Operations a second of a product of square matrices, the best of five."""
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    seconds = []
    for _ in range(6):  # the first one is the warm-up
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds[1:])
