"""How time, memory and operations grow with the image's side, the batch, the queries, the steps and a chat.

Random weights of a recipe's size, on the CPU in float32. Each size of an axis is run in rounds of all sizes; seconds
are the median, memory is the most bytes of tensors that live at once beyond those that were there before. The exponent
of a quantity is the slope of its logarithm over that of the axis, over the upper half of the sizes, where fixed costs
count least. Beside it stands the one that the network's structure has in the limit. The last line is JSON.

    python benchmarks/growth.py --recipe shapes
    python benchmarks/growth.py --recipe spar-1b --counted    # without times and LLM, on no device
"""

import argparse
import json
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary
from train_step import matmul_peak

from spar.checkpoints.model_header import versions
from spar.flow.sampler import FlowSampler
from spar.models.attention import attention_bias
from spar.models.config import SparConfig
from spar.models.spar import Condition, SparModel
from spar.recipes import recipe
from spar.training.bundle import hardware_info

Run = Callable[[], object]
Shape = Sequence[int]


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


# torch's counter does not know the CPU's own kernel.
COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
WORDS = 32  # tokens of a prompt


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while they live; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # what was there before is not counted
                self.known.setdefault(tensor.untyped_storage(), True)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return made

    def _freed(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Axis:
    """One quantity that grows.

    Attributes:
        name: what grows; of `side` the exponents are over the number of pixels.
        sizes: its values.
        work: gives what is run at a size.
        expected: the exponent of time and operations in the limit.
        why: in a few words.
    """

    name: str
    sizes: Sequence[int]
    work: Callable[[int], Run]
    expected: float
    why: str
    amounts: Sequence[float] = field(default=())

    @property
    def scale(self) -> Sequence[float]:
        return self.amounts or self.sizes


def axes(config: SparConfig, device: torch.device, largest: int) -> list[Axis]:
    """What grows of a model of a size, up to `largest` times."""
    with device:
        model = SparModel(config).eval().requires_grad_(False)
    grid, stride, channels = config.grid, config.token_stride, config.autoencoder.latent_channels
    tokens = torch.randint(10, min(1000, config.text.vocab_size), (1, WORDS), device=device)
    length = WORDS + config.connector.queries
    states = torch.randn(1, length, config.denoiser.caption_channels, device=device)
    condition = Condition(states, torch.ones(1, length, dtype=torch.long, device=device), states[..., :1])

    def velocity(rows: int, side: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        read = model.precompute_key_values(condition.repeat(rows))
        return lambda x, t: model.velocity(x, t, read).velocity

    def step(rows: int, side: int) -> Run:
        latent, times = torch.randn(rows, channels, side, side, device=device), torch.full((rows,), 0.5, device=device)
        run = velocity(rows, side)
        return lambda: run(latent, times)

    def encode(side: int) -> Run:
        pixels = torch.rand(1, 3, side, side, device=device)
        return lambda: model.tokenizer.encode(pixels)

    def decode(side: int) -> Run:
        latent = torch.randn(1, channels, side // stride, side // stride, device=device)
        return lambda: model.tokenizer.decode(latent)

    def steps(count: int) -> Run:
        noise, read = torch.randn(1, channels, grid, grid, device=device), velocity(1, grid)

        def run() -> None:
            sampler = FlowSampler()
            sampler.join(noise, count)
            sampler.run(read)

        return run

    def queries(count: int) -> Run:
        with device:
            own = SparModel(replace(config, connector=replace(config.connector, queries=count))).eval()
        return lambda: own.condition(tokens, torch.ones_like(tokens))

    def chat(length: int) -> Run:
        words = torch.randn(1, length, config.text.hidden_size, device=device)
        mask = torch.ones(1, length, dtype=torch.long, device=device)
        positions = torch.arange(length, device=device)[None]
        bias = attention_bias(mask, words, causal=True)
        return lambda: model.language(words, bias, positions, past_key_values=model.language.empty_kv_cache())

    doubled = [2**k for k in range(largest.bit_length())]
    sides = [config.image_size * n // 2 for n in (1, 2, 3, 4, 6) if n <= 2 * largest]
    pixels = [side**2 for side in sides]
    linear = "convolutions and linear attention"
    softmax = config.denoiser.self_attention == "softmax"
    limit = (2, "softmax attention of the DiT") if softmax else (1, linear)
    longest = config.text.max_positions or 4096
    chats = [length for length in (64, 128, 256, 512, 1024, 2048, 4096) if length <= min(longest, 256 * largest)]
    asked = [32 * n for n in doubled if 32 * n + WORDS <= longest]
    found = [
        Axis("side, encode", sides, encode, 2, "softmax attention of the encoder and the pixel stream", pixels),
        Axis("side, decode", sides, decode, 1, linear, pixels),
        Axis("side, step", sides, lambda side: step(1, side // stride), *limit, pixels),
        Axis("batch, step", doubled, lambda rows: step(rows, grid), 1, "each row by itself"),
        Axis("steps, sampling", doubled, steps, 1, "one pass a step"),
    ]
    if device.type == "meta":  # the LLM reads its positions' numbers
        return found
    return [
        *found,
        Axis("queries, condition", asked, queries, 2, "softmax attention of LLM and connector"),
        Axis("chat's tokens, reading", chats, chat, 2, "softmax attention of the LLM"),
    ]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The slope of log values over log sizes, over the upper half of the sizes (three at least)."""
    first = min(len(sizes) // 2, len(sizes) - 3) if len(sizes) > 3 else 0
    if len(sizes) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(sizes[first:]), np.log(values[first:]), 1)[0])


def measure(axis: Axis, rounds: int, *, counted: bool) -> dict[str, object]:
    """Operations and memory of each size, and unless it is only `counted` its seconds."""
    runs, tflop, gib = [axis.work(size) for size in axis.sizes], [], []
    seconds: list[list[float]] = [[] for _ in runs]
    for run in runs:
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            run()
        tflop.append(counter.get_total_flops() / 1e12)
    for _ in range(0 if counted else rounds):
        for own, run in zip(seconds, runs, strict=True):
            begun = time.perf_counter()
            run()
            own.append(time.perf_counter() - begun)
    for run in runs:
        with LiveBytes() as live:
            run()
        gib.append(live.peak / 2**30)
    times = [statistics.median(own) for own in seconds if own]
    found: dict[str, list[float]] = {"tflop": tflop, "seconds": times, "gib": gib}
    measured = {name: values for name, values in found.items() if values}
    return {
        "sizes": list(axis.sizes), "expected": axis.expected, "why": axis.why, **measured,
        "exponents": {name: exponent(axis.scale, values) for name, values in measured.items()},
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="shapes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=16, help="the largest batch, times 32 queries, and steps")
    parser.add_argument("--counted", action="store_true", help="no times, no LLM, no device")
    args = parser.parse_args()
    if args.rounds < 1 or args.largest < 1:
        parser.error(f"expected at least one round and one size, got {args.rounds} and {args.largest}")
    torch.manual_seed(0)
    device, rows = torch.device("meta" if args.counted else "cpu"), dict[str, Mapping[str, object]]()
    for axis in axes(recipe(args.recipe).model, device, args.largest):
        rows[axis.name] = measure(axis, args.rounds, counted=args.counted)
        print(f"{axis.name}: {rows[axis.name]['exponents']}, expected {axis.expected}", flush=True)
    peak = None if args.counted else matmul_peak(torch.device("cpu"), torch.float32) / 1e9
    print(json.dumps({
        "benchmark": "growth", "recipe": args.recipe, "dtype": "float32", "rounds": args.rounds, "seed": 0,
        "results": rows, "peak_gflops": peak, "threads": torch.get_num_threads(), "machine": hardware_info(),
        "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
