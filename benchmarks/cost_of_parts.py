"""What the dual stream and the routing cost: time at inference, parameters, and operations of a training step.

Each part is left out in turn of the same recipe with random weights: the pixel stream, the semantic stream, and routing
(the connector then reads the LLM's last layer). Encoding an image, decoding it, and making a prompt's condition are
timed in rounds, so that each ratio is of one minute; the median is shown. The operations of a step of tokenizer-3 and
of unified-2 are the plan's. The last line is JSON; ratios above 1 are what the whole costs beside the reduced one.

    python benchmarks/cost_of_parts.py --recipe shapes --batch 16
    python benchmarks/cost_of_parts.py --recipe spar-1b --dtype native --batch 1    # full size, five minutes
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from train_step import matmul_peak

from spar.checkpoints.model_header import versions
from spar.common.device import dtype_name, native_dtype
from spar.models.config import SparConfig
from spar.models.spar import SparModel
from spar.recipes import recipe
from spar.training.bundle import hardware_info
from spar.training.config import StageConfig
from spar.training.estimate import HardwareConfig, estimate
from spar.training.objectives.tokenizer import TokenizerObjective
from spar.training.objectives.unified import UnifiedObjective

WORDS = 32  # tokens of a prompt


def variants(model: SparConfig) -> dict[str, SparConfig]:
    """The whole model and those that lack a part."""
    return {
        "whole": model,
        "no pixel stream": replace(model, streams=replace(model.streams, pixel_stream=False)),
        "no semantic stream": replace(model, streams=replace(model.streams, semantic_stream=False, fusion="mlp")),
        "last layer": replace(model, router=replace(model.router, kind="last")),
    }


def work(model: SparModel, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed of a model."""
    side, text = model.config.image_size, model.config.text
    pixels = torch.rand(batch, 3, side, side).to(dtype)
    tokens = torch.randint(10, min(1000, text.vocab_size), (batch, WORDS))
    latent = model.tokenizer.encode(pixels).z_f
    return {
        "encode": lambda: model.tokenizer.encode(pixels),
        "decode": lambda: model.tokenizer.decode(latent),
        "condition": lambda: model.condition(tokens, torch.ones_like(tokens)),
    }


def operations(name: str) -> dict[str, dict[str, float]]:
    """TFLOP of a step of two stages, by variant."""
    base = recipe(name)
    stages, hardware = tuple(map(without_own_terms, base.stages)), HardwareConfig(gpus=1, sharded=False)
    found = {}
    for label, model in variants(base.model).items():
        planned = estimate(replace(base, model=model, stages=stages), hardware, ("tokenizer-3", "unified-2"))
        found[label] = {one.stage.name: one.flops / 1e12 for one in planned}
    return found


def without_own_terms(stage: StageConfig) -> StageConfig:
    """A stage without the terms that only one part has: the pixel stream's target, the router's balance."""
    if isinstance(stage.objective, TokenizerObjective):
        return replace(stage, objective=replace(stage.objective, native=0.0))
    if isinstance(stage.objective, UnifiedObjective):
        return replace(stage, objective=replace(stage.objective, balance=0.0))
    return stage


def timed(base: SparConfig, batch: int, rounds: int, dtype: torch.dtype) -> tuple[dict[str, int], dict]:
    """Parameters by variant, and seconds of every round by (variant, work); the whole is timed again beside each."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    parameters = {}
    for label, config in variants(base).items():
        models = {label: config, **({} if label == "whole" else {f"whole beside {label}": base})}
        jobs = {}
        for name, one in models.items():
            torch.manual_seed(0)
            model = SparModel(one).to(dtype).eval()
            parameters[name] = sum(parameter.numel() for parameter in model.parameters())
            jobs |= {(name, what): job for what, job in work(model, batch, dtype).items()}
        for turn in range(rounds + 1):
            for key, job in jobs.items():
                start = time.perf_counter()
                job()
                if turn:  # the first one allocates
                    seconds[key].append(time.perf_counter() - start)
    return parameters, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="shapes")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "native"), default="float32")
    args = parser.parse_args()
    base, cpu = recipe(args.recipe), torch.device("cpu")
    dtype = native_dtype(cpu) if args.dtype == "native" else getattr(torch, args.dtype)
    peak = matmul_peak(cpu, dtype)
    with torch.inference_mode():
        parameters, seconds = timed(base.model, args.batch, args.rounds, dtype)
    steps, rows = operations(args.recipe), {}
    for label in variants(base.model):
        row = {"parameters": parameters[label], "tflop_a_step": steps[label]}
        for name in ("encode", "decode", "condition"):
            spent = statistics.median(seconds[label, name])
            row[name] = {"seconds": spent}
            if label != "whole":
                row[name]["ratio"] = statistics.median(seconds[f"whole beside {label}", name]) / spent
        rows[label] = row
        shown = ", ".join(f"{name} {row[name]['seconds'] * 1e3:.1f} ms" for name in ("encode", "decode", "condition"))
        print(f"{label}: {parameters[label] / 1e6:.2f} M parameters, {shown}")
    print(json.dumps({
        "benchmark": "cost_of_parts", "recipe": args.recipe, "batch": args.batch, "dtype": dtype_name(dtype),
        "peak_gflops": peak / 1e9, "results": rows, "machine": hardware_info(), "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
