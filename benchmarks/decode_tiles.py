"""Decoding in tiles against decoding as a whole: memory and time of DC-AE's decoder at full size, and the change.

Memory is the peak of a separate process minus its memory before the decoding; weights are random, bfloat16 where the
CPU has it. The change is measured on the bundled model: the mean difference of 128 x 128 images, of 255. The last line
is JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from spar.checkpoints.model_header import versions
from spar.common.device import native_dtype
from spar.inference.pipeline import SparPipeline
from spar.models.autoencoder import PixelDecoder, build_autoencoder
from spar.models.tiling import decode_in_tiles
from spar.recipes import recipe
from spar.training.bundle import hardware_info


def held(field: str) -> float:
    """GiB of this process by Linux: VmRSS now, VmHWM at most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


def decode(cells: int, tile: int) -> None:
    """Run one decoding in a separate process; print its seconds and memory as JSON."""
    torch.manual_seed(0)
    config = recipe("spar-1b").model.autoencoder
    dtype = native_dtype(torch.device("cpu"))
    decoder = PixelDecoder(build_autoencoder(config).decoder).to(dtype).eval()
    latent = torch.randn(1, config.latent_channels, cells, cells, dtype=dtype)
    with torch.inference_mode():
        decoder(latent[..., :2, :2])
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before, start = held("VmRSS"), time.perf_counter()
        decoder(latent) if not tile else decode_in_tiles(decoder, latent, tile)
        print(json.dumps({"seconds": time.perf_counter() - start, "gib": held("VmHWM") - before}))


def change() -> float:
    """Mean difference of the bundled model's images, tiled and whole, of 255."""
    prompts = ["a red circle on a beige background", "a blue star and a green ring", "three yellow squares"]
    shown = [
        SparPipeline.from_pretrained(decode_tile=tile).generate(prompts, height=128, width=128, seed=[0, 1, 2]).images
        for tile in (None, 8)
    ]
    pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in zip(*shown, strict=True)]
    return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=32, help="latent cells a side; 32 are 1024 pixels")
    parser.add_argument("--tile", type=int, default=16)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        decode(args.cells, args.only)
        return
    rows = {}
    for name, tile in (("whole", 0), ("tiles", args.tile)):
        command = [sys.executable, __file__, "--cells", str(args.cells), "--only", str(tile)]
        rows[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name}: {rows[name]['seconds']:.1f} s, {rows[name]['gib']:.2f} GiB beyond the weights")
    result = {
        "benchmark": "decode_tiles", "cells": args.cells, "tile": args.tile, **rows, "mean_difference_of_255": change(),
        "memory_ratio": rows["tiles"]["gib"] / rows["whole"]["gib"],
        "time_ratio": rows["tiles"]["seconds"] / rows["whole"]["seconds"],
    }  # fmt: skip
    print(json.dumps({**result, "machine": hardware_info(), "versions": versions()}))


if __name__ == "__main__":
    main()
