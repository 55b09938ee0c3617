"""The bundled model and a training step on an idle CPU, and with one and two busy processes.

Each way of waiting runs in its own process: `openmp`, the library's default; `passive`, OMP_WAIT_POLICY; `one thread`;
`spar`, the command line's setting (`spar.common.threads`). Seconds, medians. The last line is JSON;
`ratio` is `openmp` over `spar`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

BUSY = (0, 1, 2)
WAYS = {
    "openmp": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "spar": {},
}
WORK = ("image", "images_8", "answer", "train_tiny_step")


def median(function: Callable[[], object], repeats: int) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(way: str, repeats: int) -> dict[str, float]:
    """Run in a separate process, since torch reads the way's variables when it loads."""
    if way == "spar":
        from spar.common.threads import limit_spinning

        limit_spinning()
    from spar.inference import pipeline

    if way != "spar":
        pipeline.threads_for = lambda work: nullcontext()
    pipe = pipeline.SparPipeline.from_pretrained(device="cpu")
    image = pipe.generate("a red circle", seed=0).images[0]
    return {
        "image": median(lambda: pipe.generate("a red circle", seed=0), repeats),
        "images_8": median(lambda: pipe.generate(["a red circle"] * 8, seed=0), max(1, repeats // 2)),
        "answer": median(lambda: pipe.understand(image, "how many objects are there?"), 3 * repeats),
        "train_tiny_step": train_step(repeats),
    }


def train_step(repeats: int) -> float:
    """Seconds of a step of `shapes`' unified stage at the bundle's size, without its data."""
    import torch

    from spar.common.cpu import has_native_bfloat16
    from spar.inference.pipeline import SparPipeline

    model = SparPipeline.from_pretrained(dtype=torch.float32, device="cpu").model.denoiser.requires_grad_(True)
    config = model.config
    latent, time_ = torch.randn(16, 16, 8, 8), torch.rand(16)
    states, mask = torch.randn(16, 32, config.caption_channels), torch.ones(16, 32, dtype=torch.long)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_native_bfloat16()):
            out = model(latent, time_, states, mask, torch.zeros_like(latent)).velocity
        out.float().square().mean().backward()

    return median(step, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--busy", type=int, nargs="*", default=BUSY)
    parser.add_argument("--way", choices=WAYS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.repeats)))
        return
    from spar.checkpoints.model_header import versions
    from spar.training.bundle import hardware_info

    results: dict[str, dict[str, dict[str, float]]] = {}
    for busy in args.busy:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            for way, variables in WAYS.items():
                command = [sys.executable, str(Path(__file__)), "--way", way, "--repeats", str(args.repeats)]
                environment = {**os.environ, **variables}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                results.setdefault(str(busy), {})[way] = json.loads(done.stdout.splitlines()[-1])
                print(busy, way, results[str(busy)][way], flush=True)
        finally:
            for other in others:
                other.kill()
    ratio = {busy: {name: ways["openmp"][name] / ways["spar"][name] for name in WORK} for busy, ways in results.items()}
    found = {"benchmark": "busy_cpu", "seconds": results, "ratio": ratio}
    print(json.dumps({**found, "machine": hardware_info(), "versions": versions()}))


if __name__ == "__main__":
    main()
