"""
Sends requests to one server and times them: the load generator of the benchmarks, in a process of
its own.

    closed loop   so many connections, each with one request under way
    open loop     requests at random times (Poisson), each timed from when it was due

    echo '{"port": 8000, "path": "/classify", "bodies": ["{\\"input\\": \\"good\\"}"],
        "connections": 8, "seconds": 5}' | python -m benchmarks.harness.generator

HTTP/1.1 over kept connections, and nothing else of it: what the generator needs of a processor is
said with the result.
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

TIMING = re.compile(rb"(\w+);dur=([\d.]+)")


@dataclass(frozen=True)
class Load:
    port: int
    path: str
    bodies: Sequence[str]
    connections: int
    seconds: float
    """Counted; in a closed loop at least."""
    warm_up_s: float = 1.0
    """Sent and not counted, before; every connection stays busy until the counted time is over."""
    turns: int = 5
    """Counted as well, at least, in a closed loop: as many answers as there are connections, so
    many times.
    """
    rate: float = 0.0
    """Requests a second in an open loop; 0 is a closed loop."""
    seed: int = 0


@dataclass
class Measured:
    """What came back of a load."""

    requests: int
    failed: int
    rate: float
    """Answers a second within the counted time."""
    latencies_ms: list[float] = field(repr=False)
    service_ms: list[float] = field(repr=False)
    """What the server itself says it took to tokenise and compute, where it says so."""
    generator_share: float
    """Of one processor, what the generator took."""

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.latencies_ms, q))


def run(load: Load, cpus: set[int] | None = None) -> Measured:
    """Generates the load from a process of its own, on `cpus`."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.harness.generator"],
        input=json.dumps(asdict(load)),
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
    )
    return Measured(**json.loads(done.stdout))


async def generate(load: Load) -> Measured:
    bodies = itertools.cycle(load.bodies)
    began = time.perf_counter()
    count_from, until = began + load.warm_up_s, began + load.warm_up_s + load.seconds
    answers: list[tuple[float, float, float | None]] = []
    failed = [0]
    cpu = time.process_time()
    if load.rate:
        await _open(load, bodies, began, until, answers, failed)
    else:
        window = Window(load, began)
        await asyncio.gather(
            *(_closed(load, bodies, window, answers, failed) for _ in range(load.connections))
        )
        count_from, until = window.begin, window.end
    share = (time.process_time() - cpu) / (time.perf_counter() - began)
    if load.rate:
        # Whatever was due within the window, however late: those that took longest come after it.
        counted = [answer for answer in answers if count_from < answer[0] - answer[1] <= until]
    else:
        counted = [answer for answer in answers if count_from < answer[0] <= until]
    return Measured(
        requests=len(counted),
        failed=failed[0],
        rate=len(counted) / (until - count_from),
        latencies_ms=[1000 * took for _, took, _ in counted],
        service_ms=[own for _, _, own in counted if own is not None],
        generator_share=share,
    )


class Window:
    """The part of a closed loop that counts: after the warm-up, for so many seconds and turns.

    A turn is as many answers as there are connections, and the window begins and ends with one. A
    server that works in batches answers by fits and starts, and a window of few batches that is cut
    anywhere holds one too many or one too few.
    """

    def __init__(self, load: Load, began: float) -> None:
        self.begin = self.end = math.inf
        self._load, self._warm_at, self._answers = load, began + load.warm_up_s, 0

    def answered(self, now: float) -> None:
        """Call it at every answer, in order."""
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


async def _closed(
    load: Load,
    bodies: Iterator[str],
    window: Window,
    answers: list[tuple[float, float, float | None]],
    failed: list[int],
) -> None:
    connection = await Connection.open(load)
    while window.end == math.inf:
        sent = time.perf_counter()
        status, own = await connection.send(next(bodies))
        now = time.perf_counter()
        window.answered(now)
        if status == 200:
            answers.append((now, now - sent, own))
        else:
            failed[0] += 1
    connection.close()


async def _open(
    load: Load,
    bodies: Iterator[str],
    began: float,
    until: float,
    answers: list[tuple[float, float, float | None]],
    failed: list[int],
) -> None:
    draw = random.Random(load.seed)
    idle = [await Connection.open(load) for _ in range(load.connections)]
    tasks, due = [], began

    async def one(due: float, body: str) -> None:
        connection = idle.pop() if idle else await Connection.open(load)
        status, own = await connection.send(body)
        now = time.perf_counter()
        idle.append(connection)
        if status == 200:
            answers.append((now, now - due, own))
        else:
            failed[0] += 1

    while (due := due + draw.expovariate(load.rate)) < until:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due, next(bodies))))
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()


class Connection:
    def __init__(
        self, load: Load, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._head = (
            f"POST {load.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type:"
            " application/json\r\nContent-Length: ".encode()
        )
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, load: Load) -> Connection:
        return cls(load, *await asyncio.open_connection("127.0.0.1", load.port))

    async def send(self, body: str) -> tuple[int, float | None]:
        """The answer's status, and the milliseconds in its Server-Timing for tokens and
        inference.
        """
        data = body.encode()
        self._writer.write(b"%s%d\r\n\r\n%s" % (self._head, len(data), data))
        head = await self._reader.readuntil(b"\r\n\r\n")
        lowered = head.lower()
        length = re.search(rb"content-length: *(\d+)", lowered)
        if length is None:
            raise ValueError(f"An answer without a length: {head[:200]!r}")
        await self._reader.readexactly(int(length[1]))
        timing = {name: float(value) for name, value in TIMING.findall(lowered)}
        own = timing[b"tokenize"] + timing[b"inference"] if b"inference" in timing else None
        return int(head[9:12]), own

    def close(self) -> None:
        self._writer.close()


def main() -> None:
    told: dict[str, Any] = json.load(sys.stdin)
    import uvloop

    measured = uvloop.run(generate(Load(**told)))
    # Through a buffer, whatever PYTHONUNBUFFERED says: an unbuffered stdout loses what a pipe did
    # not take at once.
    with os.fdopen(sys.stdout.fileno(), "wb", closefd=False) as output:
        output.write(json.dumps(asdict(measured)).encode())


if __name__ == "__main__":
    main()
