"""`spar serve` under load: seconds from a cold start to the first image, images a second of one client and of eight,
and a long run of many clients, with errors, latencies and the server's memory. The last line is JSON.

Clients are threads that send the next request after each answer, with prompts of several lengths and their own seeds.
`--minutes 10` is the recorded run; the default is a short trial.
"""

import argparse
import http.client
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from spar.checkpoints.model_header import versions
from spar.training.bundle import hardware_info

PROMPTS = (
    "a blue star",
    "two yellow squares on a gray background",
    "a large red circle to the left of a small blue star",
    "three green rings",
    "a white cross above a black triangle",
    "a small pink circle and a large orange ring on a navy background",
)

LEAST, WAIT = 2, 120


class Load:
    """Clients against one server until `seconds` are over and LEAST images have come; what they saw."""

    def __init__(self, port: int, clients: int, seconds: float) -> None:
        self.port, self.statuses, self.latencies = port, Counter(), []
        self.seeds, self.lock = itertools.count(), threading.Lock()
        start = time.perf_counter()
        self.end = start + seconds
        threads = [threading.Thread(target=self.client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.per_second = self.statuses[200] / (time.perf_counter() - start)

    def client(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        while self.goes_on():
            seed, start = next(self.seeds), time.perf_counter()
            try:
                status = ask(connection, PROMPTS[seed % len(PROMPTS)], seed)
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
                connection.close()
            with self.lock:
                self.statuses[status] += 1
                if status == 200:
                    self.latencies.append(time.perf_counter() - start)
            if status == 429:
                time.sleep(0.5)
        connection.close()

    def goes_on(self) -> bool:
        """Whether to ask again; a percentile needs LEAST images, for which a slow machine gets WAIT seconds more."""
        now = time.perf_counter()
        return now < self.end or (len(self.latencies) < LEAST and now < self.end + WAIT)

    def result(self) -> dict:
        cuts = statistics.quantiles(self.latencies, n=20) if len(self.latencies) > 1 else [float("nan")] * 19
        statuses = {str(status): count for status, count in self.statuses.items()}
        return {"images_per_s": self.per_second, "p50_s": cuts[9], "p95_s": cuts[18], "statuses": statuses}


def ask(connection: http.client.HTTPConnection, prompt: str, seed: int) -> int:
    """One image; the status. The answer is read to its end."""
    body = json.dumps({"prompt": prompt, "seed": seed})
    connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


def memory(pid: int) -> float:
    """MiB that a process holds now, by Linux."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def batch_rows(port: int) -> float:
    """Rows of an average call of the pipeline so far."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    metrics = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return float(metrics["spar_batch_rows_sum"]) / float(metrics["spar_batch_rows_count"])


def watch(pid: int, samples: list[float], stop: threading.Event) -> None:
    while not stop.wait(1):
        samples.append(memory(pid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="of one client, and of eight")
    parser.add_argument("--clients", type=int, default=16, help="of the long run")
    parser.add_argument("--minutes", type=float, default=0.5, help="of the long run")
    parser.add_argument("--max-batch", type=int)
    args = parser.parse_args()
    command = [str(Path(sys.executable).with_name("spar")), "serve", "--port", "0", "--model", "spar"]
    command += ["--max-batch", str(args.max_batch)] if args.max_batch else []
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        port = int(server.stdout.readline().rsplit(":", 1)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        status, cold = ask(connection, PROMPTS[0], 0), time.perf_counter() - start
        print(f"first image after {cold:.1f} s (status {status})")
        Load(port, 8, 3)  # every size of batch once
        one, eight = (Load(port, clients, args.seconds) for clients in (1, 8))
        ratio = eight.per_second / one.per_second
        print(f"1 client: {one.per_second:.2f} images/s; 8 clients: {eight.per_second:.2f}, {ratio:.2f} times that")
        samples, stop = [memory(server.pid)], threading.Event()
        watcher = threading.Thread(target=watch, args=(server.pid, samples, stop))
        watcher.start()
        long = Load(port, args.clients, args.minutes * 60)
        stop.set()
        watcher.join()
        rows = batch_rows(port)
    finally:
        server.terminate()
        server.wait(60)
    # A server's first minute fills caches; what counts is whether it goes on growing.
    settled, last = statistics.median(samples[len(samples) // 4 :][:30]), statistics.median(samples[-30:])
    print(f"{args.clients} clients, {args.minutes:g} minutes: {long.result()}; memory {settled:.0f} to {last:.0f} MiB")
    result = {
        "benchmark": "serve_load", "first_image_s": cold, "one": one.result(), "eight": eight.result(), "ratio": ratio,
        "long": {"clients": args.clients, "minutes": args.minutes, **long.result()}, "batch_rows": rows,
        "memory_mib": {"settled": settled, "last": last, "most": max(samples)}, "memory_growth": last / settled - 1,
        "exit_status": server.returncode,
    }  # fmt: skip
    print(json.dumps({**result, "machine": hardware_info(), "versions": versions()}))


if __name__ == "__main__":
    main()
