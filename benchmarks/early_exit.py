"""What early exit saves of the LLM's operations, and what it costs: the bundled SPAR model on Shapes-Gen.

The maps by which a token leaves the LLM (`spar.models.early_exit`) are fitted to layouts of training scenes, a tenth of
them without a text. A way is a threshold, the same at every exit, or "all after L": every token leaves after layer L.
Of each way: the saved share of the LLM's operations, how far the condition is from the full model's (norm of the
difference over the norm, a prompt's mean), the seconds of the condition, and the score of images of the same layouts
and seeds, whose difference from threshold 0, the full model, is paired by prompt. The last line is JSON; `--add` takes
an earlier result's ways into it, so that they can be run one by one.

    python benchmarks/early_exit.py
    python benchmarks/early_exit.py --way 0 > full.txt
    python benchmarks/early_exit.py --way 0.5 --way "all after 4" --add full.txt
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from growth import COUNTED, WORDS, axes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spar.checkpoints.bundled import bundled_folder
from spar.checkpoints.model_header import versions
from spar.evaluation.compare import compare, holm_corrected
from spar.evaluation.options import EvalOptions, image_seed, pixels
from spar.evaluation.results import Result, mean_score
from spar.evaluation.shapes_gen import GenPrompt, gen_prompts
from spar.inference.pipeline import SparPipeline
from spar.models.config import SparConfig
from spar.models.early_exit import ExitMap, ExitOutput, exit_operations, fit_exits, route_with_exits
from spar.models.router import RouterOutput
from spar.models.spar import Condition, SparModel
from spar.processing.prompts import IMAGE_TOKEN, TokenBatch
from spar.recipes import recipe
from spar.recipes.shapes.data import KIND_WEIGHTS, layout_order
from spar.reporting.routing_summary import token_class
from spar.training.bundle import hardware_info
from spar.worlds.shapes.captions import layout
from spar.worlds.shapes.dataset import scene_at
from spar.worlds.shapes.detector import detect, satisfies

FULL = "0"
THRESHOLDS = (FULL, "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8")
NEVER, ALWAYS = 0.0, 1.01
BATCH = 16
UNCONDITIONAL = 10  # one of so many prompts that the maps are fitted to has no text, as in training


class Routed:
    """A model whose tokens may leave the LLM; `last` is what they did in its last condition, its mask and prompt."""

    def __init__(self, model: SparModel, exits: Sequence[ExitMap]) -> None:
        self.model, self.exits, self.thresholds = model, exits, tuple[float, ...]()
        self.last: tuple[ExitOutput, Tensor, int] | None = None
        self.plain = model.route

    def __call__(self, embeddings: Tensor, mask: Tensor, prompt: int) -> RouterOutput:
        out = route_with_exits(self.model, self.exits, self.thresholds, embeddings, mask, prompt)
        self.last = out, mask, prompt
        return out.routed

    def at(self, thresholds: tuple[float, ...] | None) -> None:
        """Set the threshold of each exit; None is the model as it is."""
        self.thresholds = thresholds or ()
        self.model.route = self.plain if thresholds is None else self  # type: ignore[method-assign, assignment]


def ways(layers: Sequence[int]) -> dict[str, tuple[float, ...]]:
    """The thresholds of each exit, by the way's name."""
    exits = len(layers) - 1
    return {name: (float(name),) * exits for name in THRESHOLDS} | {
        f"all after {layer}": (NEVER,) * level + (ALWAYS,) * (exits - level)
        for level, layer in reversed([*enumerate(layers[:-1])])
    }


def training_layouts(count: int) -> list[str | None]:
    """Layouts of the first training scenes, as training has them."""
    texts: list[str | None] = []
    for index in range(count):
        scene = scene_at("train", index, KIND_WEIGHTS)
        order = layout_order(scene, np.random.default_rng((0, index)))
        texts.append(None if index % UNCONDITIONAL == UNCONDITIONAL - 1 else layout(scene, order))
    return texts


def sequences(pipe: SparPipeline, texts: Sequence[str | None]) -> Iterator[tuple[Tensor, Tensor]]:
    """What the LLM reads for the images of some layouts, in batches."""
    for start in range(0, len(texts), BATCH):
        tokens = pipe.prompts.layout(texts[start : start + BATCH])
        yield pipe.model.sequence(tokens.ids, tokens.mask, pipe.model.canvas(len(tokens.ids)))


def kinds(pipe: SparPipeline, tokens: TokenBatch, row: int, queries: int) -> list[str]:
    """The kind of each token of a row, padding left out, the queries last."""
    ids = tokens.ids[row][tokens.mask[row].bool()].tolist()
    pieces = pipe.bundle.text_tokenizer.convert_ids_to_tokens(ids)
    words = ["image" if piece == IMAGE_TOKEN else token_class(piece, "text") for piece in pieces]
    return words + ["query"] * queries


def condition(pipe: SparPipeline, tokens: TokenBatch) -> Condition:
    return pipe.model.condition(tokens.ids, tokens.mask, pipe.model.canvas(len(tokens.ids)))


def measure_conditions(
    pipe: SparPipeline, routed: Routed, layouts: Sequence[str], thresholds: tuple[float, ...], rounds: int
) -> dict[str, Any]:
    """Saved operations, error, depths and time of the conditions of some layouts."""
    full, spent, errors, depths = 0, 0, [], defaultdict[str, list[int]](list)
    for start in range(0, len(layouts), BATCH):
        tokens = pipe.prompts.layout(layouts[start : start + BATCH])
        routed.at(None)
        wanted = condition(pipe, tokens)
        routed.at(thresholds)
        found = condition(pipe, tokens)
        if routed.last is None:
            raise RuntimeError("the condition did not take the route with exits")
        out, mask, prompt = routed.last
        both = exit_operations(pipe.model.config.text, pipe.model.layers, out.depths, mask, prompt)
        full, spent = full + int(both[0].sum()), spent + int(both[1].sum())
        for row, real in enumerate(mask.bool()):
            apart = (found.states[row] - wanted.states[row])[real].norm() / wanted.states[row][real].norm()
            errors.append(float(apart))
            names = kinds(pipe, tokens, row, mask.shape[1] - prompt)
            for name, depth in zip(names, out.depths[row][real].tolist(), strict=True):
                depths[name].append(depth)
    every = np.concatenate([*depths.values()])
    seconds: dict[tuple[float, ...] | None, list[float]] = {None: [], thresholds: []}
    tokens = pipe.prompts.layout(layouts[:BATCH])
    for _ in range(rounds):
        for at, own in seconds.items():
            routed.at(at)
            begun = time.perf_counter()
            condition(pipe, tokens)
            own.append(time.perf_counter() - begun)
    pairs = zip(seconds[None], seconds[thresholds], strict=True)
    return {
        "operations": full, "saved": 1 - spent / full, "error": statistics.mean(errors),
        "left_after": {str(layer): float((every == layer).mean()) for layer in pipe.model.layers},
        "mean_layers": {name: statistics.mean(values) for name, values in sorted(depths.items())},
        "condition_times_faster": statistics.median(before / after for before, after in pairs),
    }  # fmt: skip


def draw(
    pipe: SparPipeline, prompts: Sequence[GenPrompt], layouts: Sequence[str], seeds: Sequence[int], steps: int
) -> list[bool]:
    """Whether the image of each prompt is right."""
    right: list[bool] = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        texts = [prompt.text for prompt in prompts[part]]
        out = pipe.generate(texts, seed=seeds[part], layout=layouts[part], num_inference_steps=steps)
        seen = [detect(pixels(image)) for image in out.images]
        right += [satisfies(one, prompt.claim)[0] for one, prompt in zip(seen, prompts[part], strict=True)]
    return right


def differences(prompts: Sequence[GenPrompt], found: dict[str, dict[str, Any]]) -> None:
    """Add to each way's outcomes their score, and the difference from the full model's, if it is there."""

    def result(right: Sequence[bool]) -> Result:
        pairs = zip(prompts, right, strict=True)
        records = [{"task": one.task, "prompt": one.text, "right": [is_right]} for one, is_right in pairs]
        return Result("shapes-gen", (), {}, {"prompts": records})

    tasks = np.array([prompt.task for prompt in prompts])
    for one in found.values():
        right = np.array(one["right"], float)
        score = mean_score("overall", *(right[tasks == task] for task in dict.fromkeys(tasks)))
        one |= {"score": score.value, "low": score.low, "high": score.high}
    if FULL not in found:
        return
    others = [name for name in found if name != FULL]
    exact = result(found[FULL]["right"])
    corrected = holm_corrected([compare(exact, result(found[name]["right"]))[0] for name in others])
    for name, one in zip(others, corrected, strict=True):
        found[name]["difference"] = {
            "value": one.value, "low": one.low, "high": one.high, "p": one.p, "verdict": one.verdict,
        }  # fmt: skip


def llm_share(config: SparConfig, prompt: int, steps: int) -> float:
    """The LLM's part of the operations of its two passes for an image and of the DiT's guided steps, by counting."""
    mask = torch.ones(1, prompt + config.connector.queries, dtype=torch.long)
    depths = torch.full_like(mask, config.text.layers)
    llm = int(exit_operations(config.text, (), depths, mask, prompt)[0].sum())
    (sampling,) = (axis for axis in axes(config, torch.device("meta"), 1) if axis.name == "steps, sampling")
    step = sampling.work(1)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        step()
    return llm / (llm + steps * counter.get_total_flops())  # guidance computes both for two prompts


def earlier(path: Path | None, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The ways of an earlier result of the same settings."""
    if path is None:
        return {}
    values = json.loads(path.read_text("utf-8").splitlines()[-1])
    if values["settings"] != settings:
        raise SystemExit(f"{path}: expected a result of {settings}, got one of {values['settings']}")
    return dict(values["results"])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", action="append", help="by default all; 0 is the full model")
    parser.add_argument("--fit", type=int, default=256, help="prompts that the maps are fitted to")
    parser.add_argument("--limit", type=int, default=25, help="prompts of each of the six tasks")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--add", type=Path, help="output of an earlier run, whose ways are taken from there")
    args = parser.parse_args()
    if min(args.fit, args.limit, args.steps, args.rounds) < 1:
        parser.error("expected at least one prompt to fit, prompt, step and round")
    settings = {"fit": args.fit, "limit": args.limit, "steps": args.steps, "seed": 0}
    found = earlier(args.add, settings)
    pipe = SparPipeline.from_pretrained(bundled_folder("spar"), device="cpu", dtype="float32", progress=False)
    known = ways(pipe.model.layers)
    if unknown := [name for name in args.way or () if name not in known]:
        parser.error(f"--way: expected one of {', '.join(known)}, got {unknown[0]}")
    routed = Routed(pipe.model, fit_exits(pipe.model, sequences(pipe, training_layouts(args.fit))))
    prompts = gen_prompts(EvalOptions(limit=args.limit))
    seeds = [image_seed(0, prompt.block, prompt.index) for prompt in prompts]
    layouts = pipe.write_layouts([prompt.text for prompt in prompts], seed=seeds)
    for name in args.way or known:
        one = measure_conditions(pipe, routed, layouts, known[name], args.rounds)
        routed.at(known[name])
        one["right"] = draw(pipe, prompts, layouts, seeds, args.steps)
        found[name] = one
        print(f"{name}: {one['saved']:.3f} saved, {one['error']:.3f}, {np.mean(one['right']):.3f}", flush=True)
    differences(prompts, found)
    length = round(pipe.prompts.layout(layouts).mask.sum(1).float().mean().item())
    shares = {
        name: llm_share(recipe(name).model, words, pipe.default_steps)
        for name, words in (("shapes", length), ("spar-1b", WORDS))
    }
    print(json.dumps({
        "benchmark": "early_exit", "settings": settings, "images": len(prompts),
        "results": {name: found[name] for name in known if name in found}, "llm_share": shares,
        "dtype": "float32", "batch": BATCH, "rounds": args.rounds, "threads": torch.get_num_threads(),
        "machine": hardware_info(), "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
