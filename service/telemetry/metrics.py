"""
Prometheus metrics, in base units. The label `model` holds names of loaded models only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector as PrometheusCollector

from service.batching.batcher import BatchStats
from service.telemetry import logs
from service.telemetry.histogram import Histogram
from service.telemetry.nvml import Collector, Reading

SECONDS = tuple(1e-4 * 1.2**i for i in range(64))
"""Buckets of durations, geometric from 100 µs to 10 s: fine enough for a ratio of medians within
±1 %.
"""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)
"""Buckets of a batch's number of texts."""
TOKENS = tuple(2**i for i in range(3, 16))
"""Buckets of a batch's number of tokens, 8 to 32,768."""
CACHE_OUTCOMES = ("hit", "joined", "computed")
"""How a text is answered where answers are cached."""
COUNTED_FROM_ZERO = (200, 429, 500, 503, 504)
"""Statuses whose counters exist as soon as a model is loaded."""


class _Group(PrometheusCollector):
    """The metrics of one registry as a part of another one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """Return the metrics, for prometheus_client."""
        return self._registry.collect()


class Metrics:
    """All metrics of the service, in `registry` and as a page for a scraper.

    The callables are read at each scrape: texts in the queue, requests in progress, readings of
    GPUs, seconds of work in the queue, and bytes in the cache of answers.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        waiting: Callable[[], int] = lambda: 0,
        answering: Callable[[], int] = lambda: 0,
        readings: Callable[[], list[Reading]] = list,
        waiting_s: Callable[[], float] = lambda: 0.0,
        cache_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        # Histograms are nearly all of the page and write their own part of it. All other metrics
        # have a registry inside the other.
        self.registry, self._others = registry, CollectorRegistry()
        registry.register(_Group(self._others))

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"drbert_{name}_duration_seconds", text, SECONDS, registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"drbert_{name}_total", text, labels, registry=self._others)

        def gauge(name: str, text: str, value: Callable[[], float] | None = None) -> Gauge:
            metric = Gauge(f"drbert_{name}", text, registry=self._others)
            if value is not None:
                metric.set_function(value)
            return metric

        self.requests = counter("requests", "Requests answered, by status.", "model", "code")
        self._requests: dict[tuple[str, int], Counter] = {}
        self.request = seconds(
            "request", "From the start of tokenization until the answer is written."
        )
        self.tokenize = seconds("tokenize", "Tokenizing all texts of a request.")
        self.queue = seconds("queue", "A text's wait for the model.")
        self.inference = seconds("inference", "One model run.")
        self.batch_size = Histogram("drbert_batch_size", "Texts in a model run.", SIZES, registry)
        self.batch_tokens = Histogram(
            "drbert_batch_tokens", "Tokens in a model run, padding included.", TOKENS, registry
        )
        self.padding_tokens = counter(
            "padding_tokens", "Padding tokens computed to fill a batch.", "model"
        )
        self.tokens = counter("tokens", "Tokens of texts computed.", "model")
        self.truncated = counter("truncated", "Texts truncated to the model's length.", "model")
        self._cache_texts = counter(
            "cache_texts",
            "Texts by how they were answered with DRBERT_CACHE_MIB: hit (from the cache), joined"
            " (with an equal text that was computed at the time) or computed.",
            "model",
            "outcome",
        )
        self._cached: set[tuple[str, str]] = set()
        self.cache_bytes = gauge("cache_bytes", "Memory of the cache of answers.", cache_bytes)
        self.rejected = counter("rejected", "Requests refused before the model.", "reason")
        self.inflight = gauge("inflight_requests", "Requests being answered.", answering)
        self.queue_depth = gauge("queue_depth", "Texts in the queue.", waiting)
        self.queue_seconds = gauge(
            "queue_seconds",
            "Seconds that the engine needs for the texts in the queue, at the measured rate.",
            waiting_s,
        )
        self.ready = gauge("ready", "1 while the service accepts requests.")
        self.event_loop_lag = gauge(
            "event_loop_lag_seconds",
            "Largest delay of the event loop over the last 30 to 60 seconds.",
        )
        self.shadowed = counter(
            "shadow_texts",
            "Texts that a second model classified too, by outcome.",
            "model",
            "of",
            "outcome",
        )
        self.shadow_seconds = counter(
            "shadow_inference_seconds", "Engine time spent on shadow texts.", "model"
        )
        self._others.register(Collector(readings))
        self._others.register(LogCollector())
        ProcessCollector(registry=self._others)
        self.model_info = Info(
            "drbert_model", "Engine and artifact of each model.", ["model"], registry=self._others
        )
        self._histograms = (
            self.request,
            self.tokenize,
            self.queue,
            self.inference,
            self.batch_size,
            self.batch_tokens,
        )

    def page(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return (
            generate_latest(self._others)
            + "".join([histogram.page() for histogram in self._histograms]).encode()
        )

    def add_model(
        self, model: str, digest: str, encoder_digest: str, runtime: str, variant: str
    ) -> None:
        """Add the series of a loaded model, so that they start at zero."""
        labels = {
            "digest": digest,
            "encoder_digest": encoder_digest,
            "runtime": runtime,
            "variant": variant,
        }
        self.model_info.labels(model).info(labels)
        for series in self._histograms:
            series.labels(model)
        for counter in (self.padding_tokens, self.tokens, self.truncated):
            counter.labels(model)
        # Prometheus' rate() does not count the failure with which a series begins.
        for status in COUNTED_FROM_ZERO:
            self._counter(model, status)

    def remove_model(self, model: str) -> None:
        """Remove the series of an unloaded model."""
        for series in self._histograms:
            series.remove(model)
        for counter in (self.padding_tokens, self.tokens, self.truncated, self.model_info):
            counter.remove(model)
        for outcome in CACHE_OUTCOMES:
            if (model, outcome) in self._cached:
                self._cached.remove((model, outcome))
                self._cache_texts.remove(model, outcome)
        for name, status in [key for key in self._requests if key[0] == model]:
            del self._requests[name, status]
            self.requests.remove(name, str(status))

    def count_cached(self, model: str, outcome: str, texts: int) -> None:
        """Count texts by how they were answered where answers are cached."""
        self._cached.add((model, outcome))
        self._cache_texts.labels(model, outcome).inc(texts)

    def count_request(self, model: str, status: int) -> None:
        """Count an answered request."""
        self._counter(model, status).inc()

    def _counter(self, model: str, status: int) -> Counter:
        counter = self._requests.get((model, status))
        if counter is None:
            counter = self._requests[model, status] = self.requests.labels(model, str(status))
        return counter

    def add_batch(self, model: str, batch: BatchStats) -> None:
        """Count a batch under the model's name, which may differ from the batcher's key for it."""
        if not batch.is_background:
            queue = self.queue.labels(model)
            for queue_ns in batch.queue_ns:
                queue.observe(queue_ns / 1e9)
        self.inference.labels(model).observe(batch.inference_ns / 1e9)
        self.batch_size.labels(model).observe(len(batch.queue_ns))
        self.batch_tokens.labels(model).observe(batch.tokens + batch.padding_tokens)
        self.padding_tokens.labels(model).inc(batch.padding_tokens)
        self.tokens.labels(model).inc(batch.tokens)


class LogCollector:
    """Yields the number of lost log lines as a metric. The log itself does not know Prometheus."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the metric, for prometheus_client."""
        lines = CounterMetricFamily(
            "drbert_log_lines_dropped",
            "Log lines that were not written, by reason.",
            labels=["reason"],
        )
        for reason, count in logs.LOST.items():
            lines.add_metric([reason], count)
        yield lines
