"""
What Prometheus is told. Base units; the label `model` only ever holds loaded names.
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

# Geometric, ×1.2 from 100 µs to 10 s: fine enough for a ratio of medians within ±1 %.
SECONDS = tuple(1e-4 * 1.2**i for i in range(64))
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)
TOKENS = tuple(2**i for i in range(3, 16))
COUNTED_FROM_ZERO = (200, 429, 500, 503, 504)


class _Group(PrometheusCollector):
    """The metrics of one registry as a part of another one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        return self._registry.collect()


class Metrics:
    """All metrics, by `registry`, and the page that a scraper reads."""

    def __init__(
        self,
        registry: CollectorRegistry,
        waiting: Callable[[], int] = lambda: 0,
        answering: Callable[[], int] = lambda: 0,
        readings: Callable[[], list[Reading]] = list,
        waiting_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"drbert_{name}_duration_seconds", text, SECONDS, self.registry)

        # Histograms are nearly all of the page, and write their own part of it; everything else has
        # a registry within the other.
        self.registry, self._others = registry, CollectorRegistry()
        registry.register(_Group(self._others))
        registry = self._others
        self.requests = Counter(
            "drbert_requests_total",
            "Requests answered, by status.",
            ["model", "code"],
            registry=registry,
        )
        self._requests: dict[tuple[str, int], Counter] = {}
        self.request = seconds("request", "From a request's first byte read to its answer.")
        self.tokenize = seconds("tokenize", "Turning a request's texts into tokens.")
        self.queue = seconds("queue", "A text's wait for the model.")
        self.inference = seconds("inference", "One model run.")
        self.batch_size = Histogram(
            "drbert_batch_size", "Texts in a model run.", SIZES, self.registry
        )
        self.batch_tokens = Histogram(
            "drbert_batch_tokens", "Tokens in a model run, padding counted.", TOKENS, self.registry
        )
        self.padding_tokens = Counter(
            "drbert_padding_tokens_total",
            "Tokens computed only to fill a batch.",
            ["model"],
            registry=registry,
        )
        self.tokens = Counter(
            "drbert_tokens_total", "Tokens of texts computed.", ["model"], registry=registry
        )
        self.truncated = Counter(
            "drbert_truncated_total",
            "Texts that were cut to the model's length.",
            ["model"],
            registry=registry,
        )
        self.rejected = Counter(
            "drbert_rejected_total",
            "Requests refused before the model.",
            ["reason"],
            registry=registry,
        )
        self.inflight = Gauge(
            "drbert_inflight_requests", "Requests being answered.", registry=registry
        )
        self.inflight.set_function(answering)
        self.queue_depth = Gauge("drbert_queue_depth", "Texts that wait.", registry=registry)
        self.queue_depth.set_function(waiting)
        self.queue_seconds = Gauge(
            "drbert_queue_seconds",
            "Seconds of the engine that the texts take that wait, by the measured rate.",
            registry=registry,
        )
        self.queue_seconds.set_function(waiting_s)
        self.ready = Gauge("drbert_ready", "1 while the service takes requests.", registry=registry)
        self.event_loop_lag = Gauge(
            "drbert_event_loop_lag_seconds",
            "How late the event loop woke at the worst, over the last half minute or two.",
            registry=registry,
        )
        self.shadowed = Counter(
            "drbert_shadow_texts_total",
            "Texts that a second model answered too, by what became of it.",
            ["model", "of", "outcome"],
            registry=registry,
        )
        self.shadow_seconds = Counter(
            "drbert_shadow_inference_seconds_total",
            "Time of the engine spent on them.",
            ["model"],
            registry=registry,
        )
        registry.register(Collector(readings))
        registry.register(LogCollector())
        ProcessCollector(registry=registry)
        self.model_info = Info(
            "drbert_model", "What serves each model.", ["model"], registry=registry
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
        """All metrics in Prometheus' text format."""
        return (
            generate_latest(self._others)
            + "".join([histogram.page() for histogram in self._histograms]).encode()
        )

    def add_model(
        self, model: str, digest: str, encoder_digest: str, runtime: str, variant: str
    ) -> None:
        """Names a loaded model and makes its series, so that they start at zero."""
        facts = {
            "digest": digest,
            "encoder_digest": encoder_digest,
            "runtime": runtime,
            "variant": variant,
        }
        self.model_info.labels(model).info(facts)
        for series in self._histograms:
            series.labels(model)
        for counter in (self.padding_tokens, self.tokens, self.truncated):
            counter.labels(model)
        # A rate sees nothing of a series that begins with its first failure.
        for status in COUNTED_FROM_ZERO:
            self._counter(model, status)

    def remove_model(self, model: str) -> None:
        """Forgets the series of a model that is gone: the label holds the names of loaded ones
        only.
        """
        for series in self._histograms:
            series.remove(model)
        for counter in (self.padding_tokens, self.tokens, self.truncated, self.model_info):
            counter.remove(model)
        for own in [own for own in self._requests if own[0] == model]:
            del self._requests[own]
            self.requests.remove(model, str(own[1]))

    def count_request(self, model: str, status: int) -> None:
        self._counter(model, status).inc()

    def _counter(self, model: str, status: int) -> Counter:
        counter = self._requests.get((model, status))
        if counter is None:
            counter = self._requests[model, status] = self.requests.labels(model, str(status))
        return counter

    def add_batch(self, model: str, batch: BatchStats) -> None:
        """Counts a batch for the model of that name; what the batcher calls it is its own."""
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
    """Counts the lines that the log lost; the log itself knows nothing of Prometheus."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        lines = CounterMetricFamily(
            "drbert_log_lines_dropped",
            "Log lines that were not written, by reason.",
            labels=["reason"],
        )
        for reason, count in logs.LOST.items():
            lines.add_metric([reason], count)
        yield lines
