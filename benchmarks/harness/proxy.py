"""
A proxy that makes every answer late by a known share of the time it took.

For runs that must show a delay is seen although nothing in the service makes it: the proof's
own control is made by the server, this one comes from outside.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Passed:
    """What went through a proxy so far."""

    requests: int = 0
    took_ns: int = 0
    """By the server, as the proxy saw it."""
    added_ns: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, took_ns: int, added_ns: int) -> None:
        with self.lock:
            self.requests += 1
            self.took_ns += took_ns
            self.added_ns += added_ns


@contextmanager
def proxy(
    upstream_port: int, share: float, cpus: set[int], port: int = 0
) -> Iterator[tuple[int, Passed]]:
    """A proxy on 127.0.0.1 before `upstream_port`, its threads on `cpus` if there are any; yields
    its own port (a free one for 0) and what has passed.
    """
    passed, closing = Passed(), threading.Event()
    with socket.create_server(("127.0.0.1", port)) as listening:
        listening.settimeout(0.2)

        def accept() -> None:
            # Of this thread and those it starts, not of the process.
            if cpus:
                os.sched_setaffinity(0, cpus)
            while not closing.is_set():
                try:
                    client, _ = listening.accept()
                except TimeoutError:
                    continue
                threading.Thread(
                    target=_relay, args=(client, upstream_port, share, passed), daemon=True
                ).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1], passed
        finally:
            closing.set()
            thread.join()


def _relay(client: socket.socket, upstream_port: int, share: float, passed: Passed) -> None:
    """Request after request of one connection; ends when either side does."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.settimeout(None)
    try:
        with client, socket.create_connection(("127.0.0.1", upstream_port)) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while (request := _message(client)) is not None:
                began_ns = time.monotonic_ns()
                server.sendall(request)
                answer = _message(server)
                if answer is None:
                    return
                answered_ns = time.monotonic_ns()
                due_ns = answered_ns + int(share * (answered_ns - began_ns))
                while (now := time.monotonic_ns()) < due_ns:
                    pass
                client.sendall(answer)
                passed.count(answered_ns - began_ns, now - answered_ns if share else 0)
    except OSError:
        return


def _message(source: socket.socket) -> bytes | None:
    """One HTTP message with a Content-Length, whole; None when the other side has closed."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = source.recv(65536)
        if not part:
            return None
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(
        (
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ),
        0,
    )
    while len(body) < length:
        part = source.recv(65536)
        if not part:
            return None
        body += part
    return head + b"\r\n\r\n" + body
