"""What GET /metrics shows, in Prometheus's format."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from launch.serving.service import SearchService

__all__ = ["MeasureRequests", "Metrics", "ServiceCollector"]

PATHS = frozenset({"/", "/search", "/compare", "/swap", "/health", "/metrics", "/docs", "/openapi.json"})
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "endex_requests", "Requests by path and status.", ("path", "status"), registry=self.registry
        )
        self.request_seconds = Histogram(
            "endex_request_seconds",
            "Seconds from a request's first byte to its answer's last.",
            ("path",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_queries = Histogram(
            "endex_batch_queries",
            "Queries that shared a forward pass and a search.",
            ("index",),
            buckets=QUERIES,
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "endex_batch_seconds",
            "Seconds of encoding and searching a batch.",
            ("index",),
            buckets=SECONDS,
            registry=self.registry,
        )


class ServiceCollector(Collector):
    """Reads queue, generation and size of the served indexes when they are asked for."""

    def __init__(self, services: Sequence[SearchService]) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        """Yield the values of now."""
        queue = GaugeMetricFamily("endex_queue_requests", "Requests that wait.", labels=["index"])
        generation = GaugeMetricFamily(
            "endex_index_generation",
            "Which index answers, counted from 1; 0 while loading.",
            labels=["index"],
        )
        ntotal = GaugeMetricFamily("endex_index_ntotal", "Documents of the index.", labels=["index"])
        swaps = CounterMetricFamily("endex_swaps", "Loads of an index.", labels=["index", "result"])
        for service in self._services:
            queue.add_metric([service.name], len(service.batcher))
            current = service.live.current if service.live.ready else None
            generation.add_metric([service.name], current.number if current else 0)
            ntotal.add_metric([service.name], len(current.searcher.document_ids) if current else 0)
            for result, count in service.live.swaps.items():
                swaps.add_metric([service.name, result], count)
        yield from (queue, generation, ntotal, swaps)


class MeasureRequests:
    """ASGI middleware: counts requests and their seconds."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and note its status and seconds."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()  # an exception becomes a 500 further out

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            path = (
                scope["path"] if scope["path"] in PATHS else "other"
            )  # any number of paths would fill memory
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.request_seconds.labels(path).observe(time.perf_counter() - start)
