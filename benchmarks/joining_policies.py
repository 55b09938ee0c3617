"""Three ways to serve requests that arrive while a batch runs, simulated with the costs of several machines.

`gathered`: those of one number of steps wait for the running batch's end and begin together, up to eight. `at once`:
every request joins the running batch at its next step. `by cost`: they join when `spar serve` lets them
(`spar.serving.joining`, which this calls). A step of n images takes `fixed + each * n` seconds, and so do their prompts
before, during which no step runs, and their decoding after. Arrivals are a Poisson process at a share of what full
batches of equal requests bring. The last line is JSON: medians and p95 over those of `gathered`.
"""

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spar.checkpoints.model_header import versions
from spar.serving.joining import BatchCosts, LinearCost
from spar.training.bundle import hardware_info

MAX_BATCH = 8
LOADS = (0.3, 0.5, 0.7)
STEPS = {"equal": (20,), "mixed": (10, 20, 40)}


@dataclass(frozen=True)
class Machine:
    """`fixed` and `each` in seconds of the prompts, a step and decoding."""

    prompts: tuple[float, float]
    step: tuple[float, float]
    decoding: tuple[float, float]

    def costs(self) -> BatchCosts:
        """What the server would have measured."""

        def known(line: tuple[float, float]) -> LinearCost:
            return LinearCost({rows: at(line, rows) for rows in (1, MAX_BATCH)})

        return BatchCosts(known(self.step), known(self.prompts))


MACHINES = {
    # The bundled model's parts, measured on one core of AVX2 in float32.
    "one core": Machine((0.1, 0.08), (0.018, 0.023), (0.009, 0.016)),
    # Two cores with bfloat16: the whole as benchmarks/results/serve_load.json has it, the shares of its parts as above.
    "two cores": Machine((0.036, 0.018), (0.0037, 0.0018), (0.01, 0.005)),
    # Assumed: a small model on a GPU, where a further image hardly counts, without layouts and with them; and a large
    # one, whose steps cost as much as their images.
    "small, no layouts": Machine((0.02, 0.002), (0.018, 0.001), (0.01, 0.003)),
    "small": Machine((0.15, 0.002), (0.018, 0.001), (0.01, 0.003)),
    "large": Machine((0.05, 0.01), (0.01, 0.04), (0, 0.05)),
}


def at(line: tuple[float, float], rows: int) -> float:
    return line[0] + line[1] * rows


def serve(machine: Machine, arrivals: list[float], steps: list[int], way: str) -> list[float]:
    """Seconds of each request from its arrival to its end."""
    now, coming, costs = 0.0, 0, machine.costs()
    queue, running, took = list[int](), dict[int, int](), list[float]()
    while len(took) < len(arrivals):
        while coming < len(arrivals) and arrivals[coming] <= now:
            queue.append(coming)
            coming += 1
        if not queue and not running:
            now = arrivals[coming]
            continue
        alike = [one for one in queue if way != "gathered" or steps[one] == steps[queue[0]]]
        new = alike[: MAX_BATCH - len(running)]
        waits = way == "gathered" or (
            way == "by cost" and not costs.worth_joining([*running.values()] or [1], [steps[one] for one in new])
        )
        if new and not (running and waits):
            now += at(machine.prompts, len(new))
            running |= {one: steps[one] for one in new}
            queue = [one for one in queue if one not in new]
        now += at(machine.step, len(running))
        running = {one: left - 1 for one, left in running.items()}
        ended = [one for one, left in running.items() if not left]
        if ended:
            now += at(machine.decoding, len(ended))
            took += [now - arrivals[one] for one in ended]
            running = {one: left for one, left in running.items() if left}
    return took


def measured(serve_one: Callable[[list[float], list[int]], list[float]], rate: float, kinds: tuple[int, ...],
             requests: int, rounds: int) -> dict[str, float]:  # fmt: skip
    """Median and p95 over several draws of the same arrivals for every way."""
    found = list[float]()
    for seed in range(rounds):
        drawn = random.Random(seed)
        arrivals = [*itertools.accumulate(drawn.expovariate(rate) for _ in range(requests))]
        found += serve_one(arrivals, [drawn.choice(kinds) for _ in arrivals])
    return {"p50": statistics.median(found), "p95": statistics.quantiles(found, n=20)[18]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for (kind, kinds), (name, machine), load in itertools.product(STEPS.items(), MACHINES.items(), LOADS):
        mean = statistics.mean(kinds)
        full = at(machine.prompts, MAX_BATCH) + mean * at(machine.step, MAX_BATCH) + at(machine.decoding, MAX_BATCH)
        ways = {
            way: measured(lambda arrivals, steps, way=way, machine=machine: serve(machine, arrivals, steps, way),
                          load * MAX_BATCH / full, kinds, args.requests, args.rounds)
            for way in ("gathered", "at once", "by cost")
        }  # fmt: skip
        own = ways.pop("gathered")
        ratios = {way: {cut: value / own[cut] for cut, value in one.items()} for way, one in ways.items()}
        results.setdefault(kind, {}).setdefault(name, {})[f"{load}"] = ratios
        shown = ", ".join(f"{way} p50 {one['p50']:.2f} p95 {one['p95']:.2f}" for way, one in ratios.items())
        print(f"{kind} steps, {name}, load {load}: {shown}", flush=True)
    result = {"benchmark": "joining_policies", "requests": args.requests, "rounds": args.rounds, "results": results}
    print(json.dumps({**result, "machine": hardware_info(), "versions": versions()}))


if __name__ == "__main__":
    main()
