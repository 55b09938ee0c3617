"""How long a recipe takes on this machine: a few steps of every stage on the recipe's own data, times its steps.

A stage's step is the mean of the later half of those that are timed, since steps of a stage may be of several kinds.
Features of frozen parts are kept after their first use, which so few steps do not show: a whole run is faster by that.
The peak is that of a large matrix product in the same run. The last line is JSON.

    python benchmarks/recipe_minutes.py --recipe shapes --compile
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from train_step import matmul_peak

from spar.checkpoints.model_header import versions
from spar.recipes import recipe
from spar.training.bundle import hardware_info
from spar.training.distributed import ParallelismConfig
from spar.training.trainer import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="shapes")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    base = recipe(args.recipe)
    spent: dict[str, list[float]] = defaultdict(list)

    def note(stage: str, step: int, steps: int, values: Mapping[str, float]) -> None:
        spent[stage].append(values["seconds"])

    stages = tuple(replace(stage, steps=args.steps, warmup=1) for stage in base.stages)
    peak = matmul_peak(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        train(
            replace(base, stages=stages, log_every=1), Path(folder) / "run", device="cpu", report=note,
            parallelism=ParallelismConfig(compile=args.compile),
        )  # fmt: skip
    rows = {}
    for stage in base.stages:
        gone = spent[stage.name]
        steps = [later - earlier for earlier, later in zip(gone, gone[1:], strict=False)]
        seconds = statistics.fmean(steps[len(steps) // 2 :])
        rows[stage.name] = {"seconds": seconds, "steps": stage.steps, "minutes": seconds * stage.steps / 60}
        print(f"{stage.name}: {seconds:.3f} s a step, {stage.steps} steps in {rows[stage.name]['minutes']:.0f} minutes")
    minutes = sum(row["minutes"] for row in rows.values())
    print(f"all: {minutes:.0f} minutes at {peak / 1e9:.0f} GFLOP/s")
    print(json.dumps({
        "benchmark": "recipe_minutes", "recipe": args.recipe, "compile": args.compile, "steps_timed": args.steps,
        "minutes": minutes, "peak_gflops": peak / 1e9, "results": rows, "machine": hardware_info(),
        "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
