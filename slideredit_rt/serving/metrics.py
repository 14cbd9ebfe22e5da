"""Prometheus metrics of a service. Labels never contain text from requests."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slideredit_rt.serving.requests import Observer, Outcome
from slideredit_rt.serving.service import EditService

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def _mode(interactive: bool) -> str:
    return "preview" if interactive else "full"


class Metrics(Observer):
    """Observer of one service, with its own registry."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self._watched: EditService | None = None
        how, seconds = ("outcome", "mode"), _SECONDS
        self._requests = Counter("slideredit_requests", "Edits that ended, by outcome.", how, registry=own)
        self._request_seconds = Histogram(
            "slideredit_request_seconds", "Time from submission to end of an edit.", how, buckets=seconds, registry=own
        )
        self._images = Counter("slideredit_images", "Images of completed edits.", ("mode",), registry=own)
        self._batch = Histogram("slideredit_step_batch_size", "Images per engine step.", ("mode",), buckets=_ROWS, registry=own)
        self._step_seconds = Histogram(
            "slideredit_step_seconds", "Time of an engine step.", ("mode",), buckets=seconds, registry=own
        )
        self._encode_seconds = Histogram("slideredit_encode_seconds", "Time to encode an edit.", buckets=seconds, registry=own)
        self._decode_seconds = Histogram("slideredit_decode_seconds", "Time to decode images.", buckets=seconds, registry=own)
        self._cache = Counter(
            "slideredit_cache_lookups", "Lookups in the cache of encodings and latents.", ("kind", "result"), registry=own
        )
        self._http = Counter("slideredit_http_responses", "HTTP responses.", ("route", "status"), registry=own)

    def watch(self, service: EditService) -> None:
        """Read the service's queue at every scrape. Idempotent, so that several applications can share a service."""
        if self._watched is not service:
            self._watched = service
            self.registry.register(_Levels(service))

    def answered(self, route: str, status: int) -> None:
        """Count an HTTP response."""
        self._http.labels(route, str(status)).inc()

    def exposition(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)

    def step(self, rows: int, seconds: float, interactive: bool) -> None:
        self._batch.labels(_mode(interactive)).observe(rows)
        self._step_seconds.labels(_mode(interactive)).observe(seconds)

    def encoded(self, seconds: float) -> None:
        self._encode_seconds.observe(seconds)

    def decoded(self, images: int, seconds: float) -> None:
        self._decode_seconds.observe(seconds)

    def cache(self, kind: str, hit: bool) -> None:
        self._cache.labels(kind, "hit" if hit else "miss").inc()

    def finished(self, outcome: Outcome, images: int, interactive: bool, seconds: float) -> None:
        mode = _mode(interactive)
        self._requests.labels(outcome, mode).inc()
        self._request_seconds.labels(outcome, mode).observe(seconds)
        if outcome == "completed":
            self._images.labels(mode).inc(images)


class _Levels(Collector):
    """Gauges, read from the service at every scrape."""

    def __init__(self, service: EditService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        stats = self._service.stats()
        yield GaugeMetricFamily("slideredit_queued_images", "Images waiting for their first step.", stats.queued)
        yield GaugeMetricFamily(
            "slideredit_running_images", "Images between their first step and their decoding.", stats.running
        )
        yield GaugeMetricFamily("slideredit_cache_bytes", "Memory of the cached encodings and latents.", stats.cache_bytes)
        by_kind = GaugeMetricFamily("slideredit_cache_kind_bytes", "Memory of the cached values of a kind.", labels=["kind"])
        for kind, size in stats.cache_bytes_by_kind.items():
            by_kind.add_metric([kind], size)
        yield by_kind
        yield GaugeMetricFamily("slideredit_cache_entries", "Cached encodings and latents.", stats.cache_entries)
        yield GaugeMetricFamily("slideredit_queue_limit_images", "Images that may wait in the queue.", self._service.max_queue)
