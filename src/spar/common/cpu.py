"""What the kernel says of the processor."""

import functools
import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # the last one is ARM's name


def _fields() -> list[tuple[str, str]]:
    """Names and values of the lines of /proc/cpuinfo; none where there is no such file."""
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in text.splitlines())]


def cpu_name() -> str:
    """The processor's name."""
    names = [value for key, value in _fields() if key == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def bfloat16_instructions() -> list[str]:
    """The instructions by which the processor multiplies bfloat16 in hardware."""
    flags = {flag for key, value in _fields() if key in ("flags", "Features") for flag in value.split()}
    return [name for name in BFLOAT16_INSTRUCTIONS if name in flags]


@functools.cache
def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware by AMX or AVX-512 BF16; ARM's has not been measured."""
    return bool({"amx_bf16", "avx512_bf16"} & {*bfloat16_instructions()})
