"""What servers report about their GPUs while they are measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from proof.measuring import gpu_throttling
from proof.measuring.gpu_throttling import watch_throttling
from service.telemetry.metrics import Metrics
from service.telemetry.nvml import Reading


class MetricsServer(ThreadingHTTPServer):
    """A server with the real metrics of a GPU that is slowed down for the test's reasons."""

    slowed: frozenset[str] = frozenset()
    requests = 0

    def reading(self) -> Reading:
        return Reading(
            "GPU-0011", "NVIDIA H100 80GB HBM3", None, None, None, None, None, self.slowed
        )


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            metrics = generate_latest(
                Metrics(CollectorRegistry(), readings=lambda: [serving.reading()]).registry
            )
            serving.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(metrics)))
            self.end_headers()
            self.wfile.write(metrics)

        def log_message(self, *_: object) -> None:
            pass

    with MetricsServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def test_every_reason_that_was_reported_meanwhile_is_recorded(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_throttling, "EVERY_S", 0.01)
    url, reasons = f"http://127.0.0.1:{server.server_port}", set[str]()
    with watch_throttling([url], reasons):
        assert reasons == set()
        server.slowed = frozenset({"heat"})
        before = server.requests
        while server.requests < before + 3:
            time.sleep(0.001)
        server.slowed = frozenset()
    assert reasons == {"heat"}
    with watch_throttling([url], reasons):
        server.slowed = frozenset({"power"})
    assert reasons == {"heat", "power"}


def test_a_server_that_reports_nothing_is_not_slowed() -> None:
    reasons = set[str]()
    with watch_throttling(["http://127.0.0.1:9"], reasons):
        pass
    with watch_throttling([], reasons):
        pass
    assert reasons == set()
