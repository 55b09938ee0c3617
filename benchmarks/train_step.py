"""Steps of tokenizer-3 and unified-2 of a recipe at full size, with random weights and images of noise.

Prints images a second, the share of the device's peak (MFU) and the peak memory, with the estimate of `spar plan`. The
operations are those that `spar plan` counts, with recomputed ones counted once. On a CPU the peak is that of a large
matrix product in the same run. The last line is JSON.

    python benchmarks/train_step.py --recipe spar-1b --batch 1            # a CPU, about 20 GB
    python benchmarks/train_step.py --recipe spar-1b --batch 64 --device cuda --activation-checkpointing
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from spar.checkpoints.model_header import versions
from spar.common.device import native_dtype
from spar.data.batches import Captioned
from spar.processing.prompts import TokenBatch
from spar.recipes import recipe
from spar.training.bundle import hardware_info
from spar.training.config import StageConfig, freeze
from spar.training.data import CaptionData
from spar.training.distributed import DistributedContext, ParallelismConfig, wrap_modules
from spar.training.estimate import GPUS, HardwareConfig, estimate
from spar.training.loop import train_step
from spar.training.objectives.base import StepContext
from spar.training.objectives.common import image_side
from spar.training.objectives.tokenizer import TokenizerObjective
from spar.training.optimizer import build_optimizers

STAGES = ("tokenizer-3", "unified-2")
WORDS = 64
# Parts that a stage does not touch; a run holds them all the same, and so does the plan's figure.
UNUSED = {
    "tokenizer-3": ("model.language", "model.router", "model.connector", "model.denoiser", "alignment_head"),
    "unified-2": ("teacher", "pixel_encoder", "discriminator", "dense_head"),
}


def noise(stage: StageConfig, side: int, device: torch.device) -> Iterator[list[Captioned]]:
    """Batches of images of noise, from a loader that keeps up."""
    while True:
        pixels = torch.rand(stage.batch, 3, side, side, device=device)
        yield [Captioned(keys=np.full(stage.batch, -1), pixels=pixels, texts=("",) * stage.batch)]


class Prompts:
    """Token rows of a fixed length."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def generation(self, words: list[str | None]) -> TokenBatch:
        ids = torch.randint(10, min(1000, self.vocabulary), (len(words), WORDS))
        return TokenBatch(ids, torch.ones_like(ids))


def matmul_peak(device: torch.device, dtype: torch.dtype | None = None) -> float:
    """Operations a second of a large matrix product, the best of five; by default of the type that is used here."""
    size, best = (4096 if device.type == "cpu" else 16384), float("inf")
    a, b = (torch.randn(size, size, device=device, dtype=dtype or native_dtype(device)) for _ in range(2))
    for _ in range(6):
        settle(device)
        start = time.perf_counter()
        a @ b
        settle(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(name: str, stage_name: str, args: argparse.Namespace, peak: float) -> dict:
    base, device = recipe(name), torch.device(args.device)
    stage = replace(base.stage(stage_name), batch=args.batch, ema=0.0)
    if isinstance(stage.objective, TokenizerObjective):  # the perceptual networks need downloads
        stage = replace(stage, objective=replace(stage.objective, perceptual=0.0))
    else:
        stage = replace(stage, data=CaptionData())
    chosen = replace(base, stages=tuple(stage if s.name == stage_name else s for s in base.stages))
    (planned,) = estimate(
        chosen,
        HardwareConfig(gpus=1, sharded=False, activation_checkpointing=args.activation_checkpointing),
        (stage_name,),
    )
    (plain,) = estimate(chosen, HardwareConfig(gpus=1, sharded=False), (stage_name,))
    torch.manual_seed(0)
    with device:
        modules = chosen.build({})
    for part in UNUSED[stage_name]:  # so that a step fits into the memory of a small machine
        parent, _, name = part.rpartition(".")
        if hasattr(modules.get_submodule(parent), name):
            setattr(modules.get_submodule(parent), name, nn.Identity())
    modules = modules.to(device).train()
    freeze(modules, stage)
    parallel = DistributedContext(
        device=device,
        config=ParallelismConfig(activation_checkpointing=args.activation_checkpointing, compile=args.compile),
    )
    ctx = StepContext(modules, Prompts(chosen.model.text.vocab_size), chosen, stage, device, parallel=parallel)
    frame, optimizers = wrap_modules(modules, parallel), build_optimizers(modules, stage)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, batches = [], noise(stage, image_side(chosen, stage), device)
    for step in range(args.steps + 1):  # the first one allocates and compiles
        settle(device)
        start = time.perf_counter()
        train_step(replace(ctx, step=step), frame, next(batches), optimizers, first=step == 0)
        settle(device)
        times.append(time.perf_counter() - start)
    if args.profile:
        with torch.profiler.profile() as profile:
            train_step(replace(ctx, step=args.steps + 1), frame, next(batches), optimizers, first=False)
            settle(device)
        order = f"self_{device.type}_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=args.profile, max_name_column_width=60))
    best = min(times[1:] or times)
    used = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the process, over all stages so far
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated()
    found = {
        "stage": stage_name, "batch": args.batch, "seconds": best, "images_per_second": args.batch / best,
        "mfu": plain.flops / best / peak, "tflop_a_step": plain.flops / 1e12, "peak_memory_gib": used / 2**30,
        "planned_gib": (planned.memory) / 2**30, "times": times,
    }  # fmt: skip
    print(f"{stage_name}: {best:.2f} s, {found['images_per_second']:.3f} images/s, MFU {found['mfu']:.2f}, "
          f"{found['peak_memory_gib']:.1f} GiB (planned {found['planned_gib']:.1f}, 4 of them a reserve)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="spar-1b")
    parser.add_argument("--stage", action="append", choices=STAGES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpu", choices=sorted(GPUS), help="whose peak MFU is a share of; by default the measured one")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", type=int, default=0, help="print so many of the costliest operations")
    args = parser.parse_args()
    measured = matmul_peak(torch.device(args.device))
    peak = GPUS[args.gpu][0] if args.gpu else measured
    rows = [measure(args.recipe, stage, args, peak) for stage in args.stage or STAGES]
    print(json.dumps({
        "benchmark": "train_step", "recipe": args.recipe, "device": args.device,
        "activation_checkpointing": args.activation_checkpointing, "compile": args.compile, "peak_tflops": peak / 1e12,
        "measured_matmul_tflops": measured / 1e12, "results": rows, "machine": hardware_info(), "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
