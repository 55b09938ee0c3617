"""What the sampler's approximations save, and what they cost: the bundled SPAR model on Shapes-Gen, each way in turn.

Every way draws the same prompts with the same seeds. Seconds are those inside the denoiser, the part that the ways
change (median over rounds in which the ways take turns, 16 images at once), and of the whole call; blocks are those
that ran, as a share of those of the exact way; the difference from the exact images is the mean absolute one of pixels,
of 255. The last line is JSON, with the matmul peak of the run.

    python benchmarks/approximations.py --limit 50 --rounds 5
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from train_step import matmul_peak

from spar.checkpoints.bundled import bundled_folder
from spar.checkpoints.model_header import versions
from spar.common.device import dtype_name
from spar.evaluation.matching import fidelity_score
from spar.evaluation.options import EvalOptions, image_seed, pixels
from spar.evaluation.results import mean_score
from spar.evaluation.shapes_gen import GenPrompt, gen_prompts
from spar.inference.pipeline import SparPipeline
from spar.training.bundle import hardware_info
from spar.worlds.shapes.detector import detect, satisfies

EXACT = "exact"
WAYS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "10 steps": {"num_inference_steps": 10},
    "6 steps": {"num_inference_steps": 6},
    "guidance 0.3:1": {"guidance_interval": (0.3, 1.0)},
    "guidance 0.6:1": {"guidance_interval": (0.6, 1.0)},
    "cache 0.1": {"step_cache": 0.1},
    "cache 0.2": {"step_cache": 0.2},
    "10 steps, guidance 0.6:1": {"num_inference_steps": 10, "guidance_interval": (0.6, 1.0)},
    "10 steps, guidance 0.6:1, cache 0.2": {
        "num_inference_steps": 10, "guidance_interval": (0.6, 1.0), "step_cache": 0.2,
    },
}  # fmt: skip
BATCH = 16


class Watch:
    """Seconds inside a pipeline's denoiser, and the rows for which its blocks ran."""

    def __init__(self, pipe: SparPipeline) -> None:
        self.seconds, self.rows = 0.0, 0
        denoiser = pipe.model.denoiser
        real = denoiser.forward

        def forward(*given: Any) -> Any:
            begun = time.perf_counter()
            out = real(*given)
            self.seconds += time.perf_counter() - begun
            return out

        denoiser.forward = forward  # type: ignore[method-assign]
        for block in denoiser.network.transformer_blocks:
            block.register_forward_pre_hook(self._count)

    def _count(self, block: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self.rows += len(given[0])

    def take(self) -> tuple[float, int]:
        """What was seen since the last call."""
        seen = self.seconds, self.rows
        self.seconds, self.rows = 0.0, 0
        return seen


def draw(pipe: SparPipeline, prompts: list[GenPrompt], way: dict[str, Any]) -> np.ndarray:
    """The images `[N, 64, 64, 3]` of all prompts, by seeds of their own."""
    made = []
    for start in range(0, len(prompts), BATCH):
        chunk = prompts[start : start + BATCH]
        seeds = [image_seed(0, prompt.block, prompt.index) for prompt in chunk]
        made += pipe.generate([prompt.text for prompt in chunk], seed=seeds, **way).images
    return np.stack([pixels(image) for image in made])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=50, help="prompts of each of the six tasks")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.limit < 1 or args.rounds < 1:
        parser.error(f"expected at least one prompt and one round, got {args.limit} and {args.rounds}")
    peak = matmul_peak(torch.device("cpu"))
    pipe = SparPipeline.from_pretrained(bundled_folder("spar"), device="cpu", progress=False)
    watch, prompts = Watch(pipe), gen_prompts(EvalOptions(limit=args.limit))
    found: dict[str, dict[str, Any]] = {}
    exact = np.zeros(0)
    for name, way in WAYS.items():
        watch.take()
        images = draw(pipe, prompts, way)
        _, rows = watch.take()
        exact = images if name == EXACT else exact
        seen = [detect(image) for image in images]
        right = [satisfies(one, prompt.claim)[0] for one, prompt in zip(seen, prompts, strict=True)]
        score = mean_score("overall", np.array(right, float))
        found[name] = {
            "score": score.value, "low": score.low, "high": score.high, "images": len(prompts), "block_rows": rows,
            "fidelity": fidelity_score(seen, 0).value if any(one.objects for one in seen) else 0.0,
            "change_of_255": float(np.abs(images.astype(int) - exact).mean()),
        }
        print(f"{name}: {found[name]}", flush=True)
    inside: dict[str, list[float]] = {name: [] for name in WAYS}
    whole: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(args.rounds):
        for name, way in WAYS.items():
            begun = time.perf_counter()
            draw(pipe, prompts[:BATCH], way)
            whole[name].append(time.perf_counter() - begun)
            inside[name].append(watch.take()[0])
    all_rows = found[EXACT]["block_rows"]
    for name, one in found.items():
        one["blocks"] = one.pop("block_rows") / all_rows
        one["denoiser_seconds"], one["seconds"] = statistics.median(inside[name]), statistics.median(whole[name])
        for kind, taken in (("denoiser_times_faster", inside), ("times_faster", whole)):
            pairs = zip(taken[EXACT], taken[name], strict=True)
            one[kind] = statistics.median(before / after for before, after in pairs)
    print(json.dumps({
        "benchmark": "approximations", "ways": {name: list(map(str, way.items())) for name, way in WAYS.items()},
        "batch": BATCH, "rounds": args.rounds, "results": found, "dtype": dtype_name(pipe.dtype),
        "threads": torch.get_num_threads(), "peak_gflops": peak / 1e9, "machine": hardware_info(),
        "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
