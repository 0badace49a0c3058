"""
OpenTelemetry spans, sent by OTLP: one for each classification, with tokenizing, queue and inference
as its children.

Off unless DRBERT_TRACING is set, which requires the extra `tracing`. OpenTelemetry's own variables
name the receiver (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, …). A
caller's `traceparent` becomes the parent. No text, label or key is ever part of a span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from command import Unavailable, how_to_install

# Callers choose the path, so an attribute holds only its first characters.
PATH_CHARS = 200


@dataclass(slots=True)
class RequestStats:
    """Counts and times of one request. Fields of steps that it did not reach stay at 0."""

    model: str = ""
    """Name of the model; empty before it is known."""
    texts: int = 0
    """Number of texts in the request."""
    tokens: int = 0
    """Number of tokens of all texts."""
    tokenize_ns: int = 0
    """Nanoseconds of tokenizing."""
    queue_ns: int = 0
    """Nanoseconds in the queue."""
    inference_ns: int = 0
    """Nanoseconds of the engine."""
    batch_size: int = 0
    """Number of texts in the batch."""


class Tracing:
    """Records spans; Unavailable if OpenTelemetry is not installed."""

    def __init__(self, version: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise Unavailable(
                f"DRBERT_TRACING needs OpenTelemetry; {how_to_install('tracing')}."
            ) from None
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "drbert-serve", "service.version": version}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("drbert-serve", version)
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self, scope: Scope, stats: RequestStats, status: int, began_ns: int, ended_ns: int
    ) -> None:
        """Record the spans of a request that has ended; times are nanoseconds since 1970.

        The span's name has the route's template and not the path. Callers choose the path, and
        collectors keep a series for each name.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        headers, route = dict(scope["headers"]), scope["state"].get("route", scope["path"])
        carrier = {
            name: headers[name.encode()].decode("latin-1")
            for name in ("traceparent", "tracestate")
            if name.encode() in headers
        }
        attributes: dict[str, Any] = {
            "http.request.method": "POST",
            "http.route": route,
            "url.path": scope["path"][:PATH_CHARS],
            "http.response.status_code": status,
            "drbert.request_id": scope["state"]["request_id"],
            "drbert.model": stats.model,
            "drbert.texts": stats.texts,
            "drbert.tokens": stats.tokens,
            "drbert.batch_size": stats.batch_size,
        }
        span = self._tracer.start_span(
            f"POST {route}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=began_ns,
            attributes=attributes,
        )
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        at = ended_ns - stats.inference_ns - stats.queue_ns - stats.tokenize_ns
        phases = {
            "tokenize": stats.tokenize_ns,
            "queue": stats.queue_ns,
            "inference": stats.inference_ns,
        }
        for name, duration in phases.items():
            if duration:
                child = self._tracer.start_span(
                    name, context=set_span_in_context(span), start_time=at
                )
                child.end(at + duration)
            at += duration
        span.end(ended_ns)

    def close(self) -> None:
        """Send the spans that were not sent yet."""
        self._provider.shutdown()
