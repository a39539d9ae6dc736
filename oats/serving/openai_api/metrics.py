"""The counters and histograms of ``/metrics``, for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from oats.serving.request_queue import RequestQueue

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One registry for each server, so that two servers in one process do not share counts."""

    def __init__(self, queue: RequestQueue) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        timed = {**own, "buckets": _SECONDS}
        self.requests = Counter("oats_requests", "Requests answered.", ["endpoint", "status"], **own)
        self.prompt_tokens = Counter("oats_prompt_tokens", "Tokens of prompts.", **own)
        generated = "Tokens generated, also of cancelled requests."
        self.generated_tokens = Counter("oats_generated_tokens", generated, **own)
        self.cancelled = Counter("oats_cancelled", "Generations stopped because the client left.", **own)
        first = "From the request to its first text, waiting included."
        self.first_token = Histogram("oats_time_to_first_token_seconds", first, **timed)
        self.duration = Histogram("oats_request_seconds", "From the request to its end.", **timed)
        waiting = Gauge("oats_requests_waiting", "Requests in the queue.", **own)
        waiting.set_function(lambda: queue.waiting)
        running = Gauge("oats_requests_running", "Requests being generated.", **own)
        running.set_function(lambda: queue.running)
