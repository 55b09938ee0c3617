"""Prometheus metrics of the server."""

import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class ServerMetrics:
    """One server's metrics, in their own registry. `waiting()` is the length of the queue."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("spar_requests", "Requests answered, or left by their client (499)",
                                ("route", "status"), registry=registry)  # fmt: skip
        self.seconds = Histogram("spar_request_seconds", "From a request's head to its end", ("route",),
                                 buckets=SECONDS, registry=registry)  # fmt: skip
        self.running = Gauge("spar_requests_running", "Requests that are being answered", registry=registry)
        self.batch_rows = Histogram("spar_batch_rows", "Rows of a step of the sampler, or of a call", buckets=ROWS,
                                    registry=registry)  # fmt: skip
        self.batch_seconds = Histogram("spar_batch_seconds", "Duration of a step of the sampler, or of a call",
                                       buckets=SECONDS, registry=registry)  # fmt: skip
        Gauge("spar_queue", "Rows and chats that wait", registry=registry).set_function(waiting)

    def observe(self, seconds: float, rows: int) -> None:
        self.batch_seconds.observe(seconds)
        self.batch_rows.observe(rows)

    @contextmanager
    def request(self, scope: MutableMapping[str, Any]) -> Iterator[Callable[[int], None]]:
        """Count one request; call the yielded function with its status."""
        status, start = 499, time.perf_counter()

        def set_status(value: int) -> None:
            nonlocal status
            status = value

        try:
            with self.running.track_inprogress():
                yield set_status
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.requests.labels(route, str(status)).inc()
            self.seconds.labels(route).observe(time.perf_counter() - start)

    def text(self) -> bytes:
        return generate_latest(self.registry)
