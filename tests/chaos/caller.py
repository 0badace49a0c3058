"""
Callers that count the outcome of every request: a status, a closed connection, or no answer at all.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.harness.generator import Connection, poisson_arrivals, post_request

HUNG_AFTER_S = 60.0


@dataclass
class Outcomes:
    """Outcomes of the requests of a scenario."""

    statuses: Counter[int] = field(default_factory=Counter)
    unanswered: int = 0
    """Requests whose connection was closed or refused without an answer."""
    hung: int = 0
    """Requests without an answer for HUNG_AFTER_S."""
    seconds: dict[int, list[float]] = field(default_factory=dict)
    """Seconds from when a request was due until its answer, by status."""

    @property
    def requests(self) -> int:
        """Number of requests, answered or not."""
        return sum(self.statuses.values()) + self.unanswered + self.hung

    @property
    def failed(self) -> int:
        """Number of requests without a 200."""
        return self.requests - self.statuses[200]

    def percentile(self, q: float, status: int = 200) -> float:
        """Return the q-th percentile in seconds of the answers with a status; 0 without any."""
        return float(np.percentile(self.seconds.get(status) or [0.0], q))

    def count(self, status: int | None, took_s: float) -> None:
        """Add a request; `status` is what Caller.send returned."""
        if status is None:
            self.unanswered += 1
        elif status == 0:
            self.hung += 1
        else:
            self.statuses[status] += 1
            self.seconds.setdefault(status, []).append(took_s)

    def add(self, other: Outcomes) -> None:
        """Add the counts of others, without their seconds."""
        self.statuses += other.statuses
        self.unanswered += other.unanswered
        self.hung += other.hung

    def __str__(self) -> str:
        """Return the number of answers by status."""
        return ", ".join(f"{status}: {count:,}" for status, count in sorted(self.statuses.items()))


def request(body: bytes, path: str = "/classify", **headers: str) -> bytes:
    """Return a POST request; underscores in names of `headers` stand for hyphens."""
    return post_request(path, body, {name.replace("_", "-"): headers[name] for name in headers})


def text_requests(*texts: str) -> list[bytes]:
    """Return a request for each text."""
    return [request(json.dumps({"input": text}).encode()) for text in texts]


class Caller:
    """A client with one kept connection to a service on this machine."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: Connection | None = None

    async def send(self, message: bytes) -> int | None:
        """Send a request and return the status of its answer.

        It is None if the connection closed without an answer, and 0 if no answer came for
        HUNG_AFTER_S.
        """
        try:
            async with asyncio.timeout(HUNG_AFTER_S):
                if self._connection is None:
                    self._connection = await Connection.open(self._port)
                response = await self._connection.exchange(message)
        except TimeoutError:
            self.close()
            return 0
        except (OSError, EOFError):
            self.close()
            return None
        if b"connection: close" in response.head:
            self.close()
        return response.status

    def close(self) -> None:
        """Close the connection, if there is one; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


async def closed_loop(
    port: int,
    messages: Sequence[bytes],
    callers: int,
    is_over: Callable[[], bool],
    outcomes: Outcomes,
) -> None:
    """Run callers with one request in flight each until `is_over` returns True."""

    async def call(first: int) -> None:
        caller, number = Caller(port), first
        while not is_over():
            began = time.monotonic()
            status = await caller.send(messages[number % len(messages)])
            outcomes.count(status, time.monotonic() - began)
            number += callers
        caller.close()

    await asyncio.gather(*(call(i) for i in range(callers)))


async def open_loop(
    port: int,
    messages: Sequence[bytes],
    rate: float,
    seconds: float,
    outcomes: Outcomes,
    seed: int = 0,
) -> None:
    """Send requests at random times (Poisson), each timed from when it was due.

    A request does not wait for those before it.
    """
    idle: list[Caller] = []
    # Finished tasks are dropped: hundreds of thousands would slow the garbage collector, and with
    # it the requests that are timed.
    in_flight: set[asyncio.Task[None]] = set()
    failures: list[BaseException] = []

    async def call(message: bytes, due: float) -> None:
        caller = idle.pop() if idle else Caller(port)
        status = await caller.send(message)
        outcomes.count(status, time.perf_counter() - due)
        idle.append(caller)

    def finish(task: asyncio.Task[None]) -> None:
        in_flight.discard(task)
        if (error := task.exception()) is not None:
            failures.append(error)

    begin = time.perf_counter()
    numbers = itertools.count()
    async for due in poisson_arrivals(rate, begin, begin + seconds, seed):
        task = asyncio.create_task(call(messages[next(numbers) % len(messages)], due))
        in_flight.add(task)
        task.add_done_callback(finish)
    await asyncio.gather(*in_flight)
    if failures:
        raise failures[0]
    for caller in idle:
        caller.close()


def for_seconds(seconds: float) -> Callable[[], bool]:
    """Return a function that returns True once that many seconds have passed."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end
