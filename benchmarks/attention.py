"""Explicit attention against torch's fused kernel, forward and backward, at the lengths of the shapes recipe.

It justifies `spar.models.attention.attention`. The last line is JSON; ratios above 1 favour the explicit form.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spar.common.device import native_dtype
from spar.models.attention import attention
from spar.training.bundle import hardware_info

SHAPES = {  # heads, queries, keys, width of a head; batch 32
    "denoiser, cross": (7, 256, 44, 32),
    "pixel stream": (5, 64, 64, 32),
    "vision tower": (4, 257, 257, 32),
}


def seconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...], repeats: int) -> float:
    """The fastest of `repeats` forward and backward passes, in bfloat16 where the CPU has it."""
    heads, queries, keys, width = shape
    best, dtype = float("inf"), native_dtype(torch.device("cpu"))
    for _ in range(repeats + 1):
        q, k, v = (
            torch.randn(32, heads, n, width, dtype=dtype, requires_grad=True) for n in (queries, keys, keys)
        )
        start = time.perf_counter()
        attention(q, k, v).sum().backward()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    rows = {}
    for name, shape in SHAPES.items():
        explicit, fused = seconds(attention, shape, repeats), seconds(F.scaled_dot_product_attention, shape, repeats)
        rows[name] = {"explicit_ms": explicit * 1e3, "fused_ms": fused * 1e3, "ratio": fused / explicit}
        print(f"{name}: explicit {explicit * 1e3:.1f} ms, fused {fused * 1e3:.1f} ms")
    print(
        json.dumps({"benchmark": "attention", "torch": torch.__version__, "machine": hardware_info(), "results": rows})
    )


if __name__ == "__main__":
    main()
