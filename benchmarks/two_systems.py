"""What the bundled models of the two systems cost: size, start, time of each task, memory. The last line is JSON.

Each model runs in a process of its own, so that its peak memory is its own. Seconds are the median of the runs after a
first one; images are of the model's own size and defaults, alone and in a batch. Tasks that a system does not define
are left out.

    python benchmarks/two_systems.py --runs 5
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from spar.checkpoints.bundled import BUNDLED_MODELS, bundled_folder
from spar.common.device import dtype_name

PROMPT, INSTRUCTION, QUESTION = "a large red circle", "change the background to navy", "what color is the background?"


def measure(name: str, runs: int, batch: int) -> dict[str, Any]:
    """Of one model, in this process."""
    start = time.perf_counter()
    from spar.checkpoints.model_header import versions
    from spar.inference.loading import load_pipeline
    from spar.training.bundle import hardware_info

    pipe = load_pipeline(bundled_folder(name), device="cpu", progress=False)
    loaded = time.perf_counter() - start
    side = pipe.image_size
    images = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))
        for seed in range(batch)
    ]
    tasks: dict[str, Callable[[int], Any]] = {
        "generate": lambda n: pipe.generate([PROMPT] * n, seed=0),
        "edit": lambda n: pipe.edit(images[:n], [INSTRUCTION] * n, seed=0),
        "understand": lambda n: pipe.understand(images[:n], [QUESTION] * n, max_new_tokens=1),
        "reconstruct": lambda n: pipe.reconstruct(images[:n]),
    }
    seconds: dict[str, dict[str, float]] = {}
    for task, run in tasks.items():
        if task not in pipe.tasks:
            continue
        seconds[task] = {}
        for count in (1, batch):
            run(count)
            taken = []
            for _ in range(runs):
                begun = time.perf_counter()
                run(count)
                taken.append(time.perf_counter() - begun)
            seconds[task][str(count)] = round(statistics.median(taken) / count, 5)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "system": pipe.system, "parameters": pipe.parameters, "dtype": dtype_name(pipe.dtype),
        "load_seconds": round(loaded, 2), "seconds_per_image": seconds, "peak_gib": round(peak / 2**30, 3),
        "machine": hardware_info(), "versions": versions(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--one", choices=BUNDLED_MODELS, help="this model alone, in this process")
    args = parser.parse_args()
    if args.runs < 1 or args.batch < 1:
        parser.error(f"expected at least one run and one image, got {args.runs} and {args.batch}")
    if args.one:
        print(json.dumps(measure(args.one, args.runs, args.batch)))
        return
    found = {}
    for name in BUNDLED_MODELS:
        command = [sys.executable, __file__, "--one", name, "--runs", str(args.runs), "--batch", str(args.batch)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {found[name]}", flush=True)
    first, second = (found[name]["seconds_per_image"] for name in BUNDLED_MODELS)
    ratios = {
        task: {count: round(second[task][count] / value, 3) for count, value in values.items()}
        for task, values in first.items() if task in second
    }  # fmt: skip
    print(json.dumps({
        "benchmark": "two_systems", "runs": args.runs, "batch": args.batch, "results": found,
        "seconds_dualtoken_over_spar": ratios,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
