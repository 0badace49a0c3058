"""
The load generator of the benchmarks: it sends requests to one server from a process of its own.

    closed loop   a number of connections, each with one request in flight
    open loop     requests at random times (Poisson), each timed from when it was due

    echo '{"port": 8000, "path": "/classify", "bodies": ["{\\"input\\": \\"good\\"}"],
        "connections": 8, "seconds": 5}' | python -m benchmarks.harness.generator

It speaks HTTP/1.1 over kept connections and nothing else. The result states how much of a processor
the generator itself used.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from proof.measuring.launch import pin
from proof.plans.dialects import parse_server_timing

CONTENT_LENGTH = re.compile(rb"content-length: *(\d+)")


@dataclass(frozen=True)
class Load:
    """The requests to send to a server on this machine."""

    port: int
    path: str
    bodies: Sequence[str]
    """Bodies to send, over and over."""
    connections: int
    seconds: float
    """Duration of the measurement in seconds; in a closed loop the shortest one."""
    warm_up_s: float = 1.0
    """Seconds of load before the measurement begins; every connection stays busy until it ends."""
    turns: int = 5
    """Fewest turns to measure in a closed loop; a turn is one answer for each connection."""
    rate: float = 0.0
    """Requests per second of an open loop; 0 is a closed loop."""
    seed: int = 0
    """Seed of the arrival times of an open loop."""


@dataclass
class LoadResult:
    """The answers to a load."""

    requests: int
    """Answers with status 200 within the measurement."""
    failed: int
    """Answers with any other status."""
    rate: float
    """Answers per second within the measurement."""
    latencies_ms: list[float] = field(repr=False)
    service_ms: list[float] = field(repr=False)
    """Milliseconds of tokenisation and inference by the server's own Server-Timing, if it sends
    one.
    """
    generator_share: float
    """Share of one processor that the generator used."""

    def percentile(self, q: float) -> float:
        """Return the q-th percentile of the latencies, in milliseconds."""
        return float(np.percentile(self.latencies_ms, q))


class Response(NamedTuple):
    """A response whose body was read and dropped."""

    status: int
    head: bytes
    """Status line and headers, in lower case."""

    @property
    def service_ms(self) -> float | None:
        """Milliseconds of tokenisation and inference in its Server-Timing; None without one."""
        phases_ms = parse_server_timing(self.head.decode("latin-1")).phases_ms
        if "inference" not in phases_ms:
            return None
        return phases_ms["tokenize"] + phases_ms["inference"]


class Connection:
    """A kept HTTP/1.1 connection to a server on this machine."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect to 127.0.0.1:`port`."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def exchange(self, message: bytes) -> Response:
        """Send a request and return its response.

        Raises ValueError for a response without Content-Length, asyncio.IncompleteReadError or
        OSError if the connection ends before the response does.
        """
        self._writer.write(message)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = content_length(head)
        if length is None:
            raise ValueError(f"The response has no Content-Length: {head[:200]!r}")
        await self._reader.readexactly(length)
        return Response(int(head[9:12]), head)

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


def post_request(path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """Return a POST request as bytes."""
    fields = {"Host": "127.0.0.1", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def content_length(head: bytes) -> int | None:
    """Return the Content-Length in a message's head, which is in lower case; None without one."""
    match = CONTENT_LENGTH.search(head)
    return None if match is None else int(match[1])


async def poisson_arrivals(
    rate: float, begin: float, end: float, seed: int = 0
) -> AsyncIterator[float]:
    """Yield the times at which requests are due, each when it is due.

    They are a Poisson process of `rate` per second between `begin` and `end`, which are times of
    time.perf_counter.
    """
    rng = random.Random(seed)
    due = begin
    while (due := due + rng.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield due


def run(load: Load, cpus: set[int] | None = None) -> LoadResult:
    """Send a load from a process of its own, pinned to `cpus`, and return the result."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.harness.generator"],
        input=json.dumps(asdict(load)),
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=pin(cpus or ()),
    )
    return LoadResult(**json.loads(done.stdout))


class Answer(NamedTuple):
    """A response with status 200."""

    at: float
    """Time of the response, by time.perf_counter."""
    took_s: float
    """Latency in seconds; in an open loop since the request was due."""
    service_ms: float | None


@dataclass
class Tally:
    """All answers to a load so far."""

    answers: list[Answer] = field(default_factory=list)
    failed: int = 0

    def count(self, response: Response, at: float, took_s: float) -> None:
        """Add a response."""
        if response.status == 200:
            self.answers.append(Answer(at, took_s, response.service_ms))
        else:
            self.failed += 1


async def generate(load: Load) -> LoadResult:
    """Send a load from this process and return the result."""
    headers = {"Content-Type": "application/json"}
    messages = itertools.cycle(
        [post_request(load.path, body.encode(), headers) for body in load.bodies]
    )
    tally = Tally()
    started_at, cpu_s = time.perf_counter(), time.process_time()
    begin, end = started_at + load.warm_up_s, started_at + load.warm_up_s + load.seconds
    if load.rate:
        await _open_loop(load, messages, started_at, end, tally)
    else:
        window = Window(load, started_at)
        callers = (_closed_loop(load, messages, window, tally) for _ in range(load.connections))
        await asyncio.gather(*callers)
        begin, end = window.begin, window.end
    share = (time.process_time() - cpu_s) / (time.perf_counter() - started_at)
    if load.rate:
        # By the time a request was due, however late its answer: the slowest ones come after the
        # end.
        counted = [answer for answer in tally.answers if begin < answer.at - answer.took_s <= end]
    else:
        counted = [answer for answer in tally.answers if begin < answer.at <= end]
    return LoadResult(
        requests=len(counted),
        failed=tally.failed,
        rate=len(counted) / (end - begin),
        latencies_ms=[1000 * answer.took_s for answer in counted],
        service_ms=[answer.service_ms for answer in counted if answer.service_ms is not None],
        generator_share=share,
    )


class Window:
    """The measured part of a closed loop: after the warm-up, for so many seconds and turns.

    A turn is one answer for each connection, and the window begins and ends with one. A server that
    works in batches answers in bursts: a window of few batches that is cut anywhere counts one too
    many or one too few.
    """

    def __init__(self, load: Load, started_at: float) -> None:
        self.begin = self.end = math.inf
        self._load, self._warm_at, self._answers = load, started_at + load.warm_up_s, 0

    def count(self, now: float) -> None:
        """Count an answer; to be called for every answer, in order."""
        self._answers += 1
        if self._answers % self._load.connections:
            return
        if self.begin == math.inf:
            if now >= self._warm_at:
                self.begin, self._answers = now, 0
        elif (
            self.end == math.inf
            and now >= self.begin + self._load.seconds
            and self._answers >= self._load.turns * self._load.connections
        ):
            self.end = now


async def _closed_loop(load: Load, messages: Iterator[bytes], window: Window, tally: Tally) -> None:
    connection = await Connection.open(load.port)
    while window.end == math.inf:
        sent = time.perf_counter()
        response = await connection.exchange(next(messages))
        now = time.perf_counter()
        window.count(now)
        tally.count(response, now, now - sent)
    connection.close()


async def _open_loop(
    load: Load, messages: Iterator[bytes], begin: float, end: float, tally: Tally
) -> None:
    idle = [await Connection.open(load.port) for _ in range(load.connections)]
    tasks = []

    async def send(due: float, message: bytes) -> None:
        connection = idle.pop() if idle else await Connection.open(load.port)
        response = await connection.exchange(message)
        now = time.perf_counter()
        idle.append(connection)
        tally.count(response, now, now - due)

    async for due in poisson_arrivals(load.rate, begin, end, load.seed):
        tasks.append(asyncio.create_task(send(due, next(messages))))
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()


def main() -> None:
    """Read a load as JSON from stdin, send it, and print the result as JSON."""
    load: dict[str, Any] = json.load(sys.stdin)
    import uvloop

    result = uvloop.run(generate(Load(**load)))
    # Through a buffer: with PYTHONUNBUFFERED, stdout loses what a pipe does not take at once.
    with os.fdopen(sys.stdout.fileno(), "wb", closefd=False) as output:
        output.write(json.dumps(asdict(result)).encode())


if __name__ == "__main__":
    main()
