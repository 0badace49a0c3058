"""
Spans for OpenTelemetry, sent by OTLP: one for each classification, with the time in tokens, queue
and engine as its children.

Off unless DRBERT_TRACING is set, and then the extra `tracing` has to be installed. Where spans go
is told by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER, …). A caller's `traceparent` is taken up. No text, label or key is ever part of
a span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from command import Unavailable

# Callers choose the path, so an attribute holds no more of it.
PATH_CHARS = 200


@dataclass(slots=True)
class Noted:
    """What a request turned out to be, as far as it got."""

    model: str = ""
    texts: int = 0
    tokens: int = 0
    tokenize_ns: int = 0
    queue_ns: int = 0
    inference_ns: int = 0
    batch_size: int = 0


class Tracing:
    def __init__(self, version: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise Unavailable(
                "DRBERT_TRACING needs OpenTelemetry: pip install 'drbert-serve[tracing]'."
            ) from None
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "drbert-serve", "service.version": version}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("drbert-serve", version)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, scope: Scope, noted: Noted, status: int, began_ns: int, ended_ns: int) -> None:
        """Makes the spans of a request that has ended; times are nanoseconds since 1970.

        The span's name holds the route's template and not the path: callers choose the path, and
        collectors keep series by name.
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
            "drbert.model": noted.model,
            "drbert.texts": noted.texts,
            "drbert.tokens": noted.tokens,
            "drbert.batch_size": noted.batch_size,
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
        at = ended_ns - noted.inference_ns - noted.queue_ns - noted.tokenize_ns
        for name, took in (
            ("tokenize", noted.tokenize_ns),
            ("queue", noted.queue_ns),
            ("inference", noted.inference_ns),
        ):
            if took:
                child = self._tracer.start_span(
                    name, context=set_span_in_context(span), start_time=at
                )
                child.end(at + took)
            at += took
        span.end(ended_ns)

    def close(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()
