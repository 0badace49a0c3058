"""What the servers tell of their GPUs while they are measured."""

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


class Telling(ThreadingHTTPServer):
    """Tells the real metrics of a GPU that is slowed down by what the test says."""

    slowed: frozenset[str] = frozenset()
    asked = 0

    def reading(self) -> Reading:
        return Reading(
            "GPU-0011", "NVIDIA H100 80GB HBM3", None, None, None, None, None, self.slowed
        )


@pytest.fixture
def server() -> Iterator[Telling]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told = generate_latest(
                Metrics(CollectorRegistry(), readings=lambda: [one.reading()]).registry
            )
            one.asked += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *_: object) -> None:
            pass

    with Telling(("127.0.0.1", 0), Handler) as one:
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        yield one
        one.shutdown()
        thread.join()


def test_every_reason_that_was_told_meanwhile_is_kept(
    server: Telling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_throttling, "EVERY_S", 0.01)
    url, seen = f"http://127.0.0.1:{server.server_port}", set[str]()
    with watch_throttling([url], seen):
        assert seen == set()
        server.slowed = frozenset({"heat"})
        before = server.asked
        while server.asked < before + 3:
            time.sleep(0.001)
        server.slowed = frozenset()
    assert seen == {"heat"}
    with watch_throttling([url], seen):
        server.slowed = frozenset({"power"})
    assert seen == {"heat", "power"}


def test_who_says_nothing_is_not_slowed() -> None:
    seen = set[str]()
    with watch_throttling(["http://127.0.0.1:9"], seen):
        pass
    with watch_throttling([], seen):
        pass
    assert seen == set()
