"""OpenTelemetry spans as a collector receives them."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from service.artifact import Artifact
from tests.service.test_server import running

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Yield the address of an OTLP endpoint and the requests that it received."""
    received: list[ExportTraceServiceRequest] = []

    class Receive(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = ExportTraceServiceRequest()
            sent.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            received.append(sent)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Receive) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


def test_each_classification_is_a_span_with_its_stages_and_without_its_text(
    artifact: Artifact, collector: tuple[str, list[ExportTraceServiceRequest]]
) -> None:
    endpoint, received = collector
    with running(
        f"reviews={artifact.directory}", DRBERT_TRACING="true", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint
    ) as (url, process):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
        request = urllib.request.Request(
            f"{url}/classify", json.dumps({"input": ["good zanzibar", "bad"]}).encode(), headers
        )
        urllib.request.urlopen(request, timeout=30).close()
        with pytest.raises(urllib.error.HTTPError) as none:
            urllib.request.urlopen(f"{url}/classify", b"zanzibar", timeout=30)
        none.value.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0  # The spans are sent before it ends.
    resources = [resource for request in received for resource in request.resource_spans]
    spans = [
        span for resource in resources for scope in resource.scope_spans for span in scope.spans
    ]
    by_name = {span.name: span for span in spans if span.trace_id.hex() == TRACE}
    assert by_name.keys() == {"POST /classify", "tokenize", "queue", "inference"}
    whole = by_name["POST /classify"]
    assert whole.parent_span_id.hex() == PARENT
    facts = {pair.key: pair.value.string_value or pair.value.int_value for pair in whole.attributes}
    assert facts["drbert.model"] == "reviews"
    assert facts["drbert.request_id"] == "mine"
    assert (facts["drbert.texts"], facts["drbert.tokens"], facts["http.response.status_code"]) == (
        2,
        7,
        200,
    )
    for child in ("tokenize", "queue", "inference"):
        assert by_name[child].parent_span_id == whole.span_id
        assert (
            whole.start_time_unix_nano
            <= by_name[child].start_time_unix_nano
            <= by_name[child].end_time_unix_nano
            <= whole.end_time_unix_nano
        )
    [refused] = [span for span in spans if span.trace_id.hex() != TRACE]
    assert {pair.key: pair.value.int_value for pair in refused.attributes}[
        "http.response.status_code"
    ] == 400
    assert {pair.key: pair.value.string_value for pair in resources[0].resource.attributes}[
        "service.name"
    ] == "drbert-serve"
    assert b"zanzibar" not in b"".join(request.SerializeToString() for request in received)


def test_spans_have_the_names_of_routes_not_of_paths(
    artifact: Artifact, collector: tuple[str, list[ExportTraceServiceRequest]]
) -> None:
    endpoint, received = collector
    paths_by_route = {
        "/models/{model}": (
            "/models/reviews",
            "/models/nothing-of-ours",
            f"/models/{'long' * 1_000}",
        ),
        "/v1/models/{model}:predict": ("/v1/models/reviews:predict", "/v1/models/another:predict"),
        "/v2/models/{model}/infer": ("/v2/models/reviews/infer", "/v2/models/a%20b/infer"),
        "/v2/models/{model}/versions/{version}/infer": (
            "/v2/models/reviews/versions/1/infer",
            "/v2/models/reviews/versions/elsewhere/infer",
        ),
        "/predict": ("/predict", "/predict?any=thing"),
        "/": ("/",),
        "/v1/classify": ("/v1/classify",),
    }
    with running(
        f"reviews={artifact.directory}", DRBERT_TRACING="true", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint
    ) as (url, process):
        for path in itertools.chain.from_iterable(paths_by_route.values()):
            with suppress(urllib.error.HTTPError):
                urllib.request.urlopen(f"{url}{path}", b'{"inputs": "good"}', timeout=30).close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    spans = [
        span
        for request in received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    whole = [span for span in spans if span.name not in ("tokenize", "queue", "inference")]
    assert Counter(span.name for span in whole) == {
        f"POST {route}": len(paths) for route, paths in paths_by_route.items()
    }
    for span in whole:
        facts = {pair.key: pair.value.string_value for pair in span.attributes}
        assert span.name == f"POST {facts['http.route']}"
        assert len(facts["url.path"]) <= 200


def test_without_the_extra_the_error_names_what_to_install() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\nfrom service.telemetry.tracing import"
        " Tracing\nTracing('1')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "pip install '.[tracing]'" in process.stderr
