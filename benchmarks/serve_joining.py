"""Requests that join the running batch at its next step, beside requests that are gathered into the next call.

The worker of `spar serve` gets the same requests in both ways, by turns, in one process. `--clients` clients share the
arrivals of a Poisson process at `--load` of what full batches would bring; far above 1, each client sends its next
request after an answer. The time of a request counts from its arrival. `mixed` has requests of half, all and twice the
steps, which only joined ones share. The last line is JSON; `p95_ratio` is joined over gathered, and below 1 where
joining is better.
"""

import argparse
import itertools
import json
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from spar.checkpoints.model_header import versions
from spar.inference.pipeline import SparPipeline
from spar.serving.batching import sampling_jobs
from spar.serving.jobs import ImageJob
from spar.serving.schema import GenerationRequest
from spar.serving.worker import Worker
from spar.training.bundle import hardware_info

PROMPTS = (
    "a blue star",
    "two yellow squares on a gray background",
    "a large red circle to the left of a small blue star",
    "three green rings",
)
WAYS = ("joined", "gathered")
KINDS = {"equal": (1,), "mixed": (0.5, 1, 2)}  # of the steps


def jobs_of(pipe: SparPipeline, way: str, number: int, steps: int) -> list[ImageJob]:
    """One request; a gathered one is a plain job of a call, which its own steps keep apart."""
    body = GenerationRequest(prompt=PROMPTS[number % len(PROMPTS)], seed=number, num_inference_steps=steps)
    jobs = sampling_jobs(pipe, body, pipe.output_size())
    if way == "joined":
        return jobs
    plain = [field.name for field in fields(ImageJob) if field.name != "future"]
    return [ImageJob(**{**{name: getattr(job, name) for name in plain}, "key": (job.key, steps)}) for job in jobs]


def run(pipe: SparPipeline, way: str, steps: list[int], rate: float, clients: int, seed: int) -> dict[str, Any]:
    """Seconds of each request from its arrival, and rows of an average step or call."""
    drawn, rows = random.Random(seed), list[int]()
    arrivals = [*itertools.accumulate(drawn.expovariate(rate) for _ in steps)]
    worker = Worker(pipe, max_queue=len(steps), observe=lambda _, count: rows.append(count))
    worker.start()
    start, numbers, lock = time.perf_counter(), iter(range(len(steps))), threading.Lock()

    def client() -> list[float]:
        found = []
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return found
            time.sleep(max(0, start + arrivals[number] - time.perf_counter()))
            jobs = jobs_of(pipe, way, number, steps[number])
            worker.submit(*jobs)
            for job in jobs:
                job.future.result()
            found.append(time.perf_counter() - start - arrivals[number])

    with ThreadPoolExecutor(clients) as pool:
        waited = [one for future in [pool.submit(client) for _ in range(clients)] for one in future.result()]
    per_second = len(steps) / (time.perf_counter() - start)
    worker.stop()
    return {"seconds": waited, "rows": statistics.mean(rows), "images_per_s": per_second}


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of the requests of several runs of one way."""
    seconds = [one for found in runs for one in found["seconds"]]
    cuts = statistics.quantiles(seconds, n=20)
    means = {name: statistics.mean(found[name] for found in runs) for name in ("rows", "images_per_s")}
    return {"p50_s": cuts[9], "p95_s": cuts[18], **means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=100, help="of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way")
    parser.add_argument("--load", type=float, default=0.7, help="of what full batches bring")
    parser.add_argument("--steps", type=int, help="by default the model's own")
    parser.add_argument("--kind", choices=KINDS, action="append", help="by default all")
    args = parser.parse_args()
    pipe = SparPipeline.from_pretrained(progress=False)
    steps, worker = args.steps or pipe.default_steps, Worker(pipe)
    for _ in range(2):  # the second time counts
        start = time.perf_counter()
        pipe.generate([PROMPTS[i % len(PROMPTS)] for i in range(worker.max_batch)], seed=0, num_inference_steps=steps)
    capacity = worker.max_batch / (time.perf_counter() - start)
    results: dict[str, Any] = {}
    for kind in args.kind or KINDS:
        shares = KINDS[kind]
        rate = args.load * capacity / statistics.mean(shares)
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for number in range(args.rounds):
            drawn = random.Random(number)
            counts = [max(1, round(steps * drawn.choice(shares))) for _ in range(args.requests)]
            for way in WAYS[:: 1 if number % 2 else -1]:
                found[way].append(run(pipe, way, counts, rate, args.clients, number))
        ways = {way: summary(runs) for way, runs in found.items()}
        joined, gathered = (ways[way] for way in WAYS)
        ratios = {f"{name}_ratio": joined[f"{name}_s"] / gathered[f"{name}_s"] for name in ("p50", "p95")}
        ratios["throughput_ratio"] = joined["images_per_s"] / gathered["images_per_s"]
        results[kind] = {**ways, **ratios}
        print(f"{kind} steps: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()), flush=True)
    settings = {name: getattr(args, name) for name in ("clients", "requests", "rounds", "load")}
    result = {"benchmark": "serve_joining", **settings, "steps": steps, "capacity_per_s": capacity, "results": results}
    print(json.dumps({**result, "machine": hardware_info(), "versions": versions()}))


if __name__ == "__main__":
    main()
