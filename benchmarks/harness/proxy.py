"""
A proxy that delays every answer by a known share of the time it took.

It serves runs that must detect a delay which the service does not make itself. The proof's own
positive control is a delay inside the server; this one is outside.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.harness.generator import content_length


@dataclass
class ProxyStats:
    """Totals of a proxy since its start."""

    requests: int = 0
    took_ns: int = 0
    """Nanoseconds that the server took, as the proxy saw it."""
    added_ns: int = 0
    """Nanoseconds that the proxy added."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, took_ns: int, added_ns: int) -> None:
        """Add one request."""
        with self.lock:
            self.requests += 1
            self.took_ns += took_ns
            self.added_ns += added_ns


@contextmanager
def proxy(
    upstream_port: int, share: float, cpus: set[int], port: int = 0
) -> Iterator[tuple[int, ProxyStats]]:
    """Run a proxy on 127.0.0.1 in front of `upstream_port`; yield its port and its totals.

    `share` is the delay by the server's own time. Its threads are pinned to `cpus`, if there are
    any; `port` 0 takes a free port.
    """
    stats, closing = ProxyStats(), threading.Event()
    with socket.create_server(("127.0.0.1", port)) as listening:
        listening.settimeout(0.2)

        def accept() -> None:
            # Pins this thread and those it starts, not the process.
            if cpus:
                os.sched_setaffinity(0, cpus)
            while not closing.is_set():
                try:
                    client, _ = listening.accept()
                except TimeoutError:
                    continue
                threading.Thread(
                    target=_relay, args=(client, upstream_port, share, stats), daemon=True
                ).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1], stats
        finally:
            closing.set()
            thread.join()


def _relay(client: socket.socket, upstream_port: int, share: float, stats: ProxyStats) -> None:
    """Pass on the requests of one connection until either side closes it."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.settimeout(None)
    try:
        with client, socket.create_connection(("127.0.0.1", upstream_port)) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while (request := _read_message(client)) is not None:
                began_ns = time.monotonic_ns()
                server.sendall(request)
                answer = _read_message(server)
                if answer is None:
                    return
                answered_ns = time.monotonic_ns()
                due_ns = answered_ns + int(share * (answered_ns - began_ns))
                # A sleep would be late by tens of microseconds.
                while (now := time.monotonic_ns()) < due_ns:
                    pass
                client.sendall(answer)
                stats.count(answered_ns - began_ns, now - answered_ns if share else 0)
    except OSError:
        return


def _read_message(source: socket.socket) -> bytes | None:
    """Return a whole HTTP message with a Content-Length; None when the other side has closed."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = source.recv(65536)
        if not part:
            return None
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    length = content_length(head.lower()) or 0
    while len(body) < length:
        part = source.recv(65536)
        if not part:
            return None
        body += part
    return head + b"\r\n\r\n" + body
