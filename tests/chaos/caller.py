"""
Callers that note what became of every request: an answer with its status, no answer on a closed
connection, or none at all.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

HUNG_AFTER_S = 60.0


@dataclass
class Seen:
    """What became of the requests of a scenario."""

    statuses: Counter[int] = field(default_factory=Counter)
    unanswered: int = 0
    """The connection was closed or refused without an answer."""
    hung: int = 0
    seconds: dict[int, list[float]] = field(default_factory=dict)
    """By status, from when a request was due until its answer."""

    @property
    def requests(self) -> int:
        return sum(self.statuses.values()) + self.unanswered + self.hung

    def percentile(self, q: float, status: int = 200) -> float:
        return float(np.percentile(self.seconds.get(status) or [0.0], q))

    def note(self, status: int | None, took_s: float) -> None:
        if status is None:
            self.unanswered += 1
        elif status == 0:
            self.hung += 1
        else:
            self.statuses[status] += 1
            self.seconds.setdefault(status, []).append(took_s)


def request(body: bytes, path: str = "/classify", **headers: str) -> bytes:
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return (
        f"POST {path} HTTP/1.1\r\nHost: chaos\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode()
        + body
    )


def texts(*given: str) -> list[bytes]:
    return [request(json.dumps({"input": text}).encode()) for text in given]


class Caller:
    """One kept connection to a service on this machine."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, message: bytes) -> int | None:
        """The answer's status; None if the connection closed without one, 0 if nothing came for
        HUNG_AFTER_S.
        """
        try:
            async with asyncio.timeout(HUNG_AFTER_S):
                if self._streams is None:
                    self._streams = await asyncio.open_connection("127.0.0.1", self._port)
                reader, writer = self._streams
                writer.write(message)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                if b"connection: close" in head:
                    self.leave()
                return int(head[9:12])
        except TimeoutError:
            self.leave()
            return 0
        except (OSError, EOFError, asyncio.IncompleteReadError):
            self.leave()
            return None

    def leave(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def closed(
    port: int, messages: Sequence[bytes], callers: int, until: Callable[[], bool], seen: Seen
) -> None:
    """So many callers, each with one request under way, until told otherwise."""

    async def one(first: int) -> None:
        caller, number = Caller(port), first
        while not until():
            began = time.monotonic()
            seen.note(await caller.ask(messages[number % len(messages)]), time.monotonic() - began)
            number += callers
        caller.leave()

    await asyncio.gather(*(one(i) for i in range(callers)))


async def opened(
    port: int, messages: Sequence[bytes], rate: float, seconds: float, seen: Seen, seed: int = 0
) -> None:
    """Requests at random times (Poisson), each timed from when it was due, whatever became of the
    ones before.
    """
    draw = random.Random(seed)
    idle: list[Caller] = []
    # Those that are over are let go of: hundreds of thousands would hold the garbage collector up,
    # and with it what is timed.
    under_way: set[asyncio.Task[None]] = set()
    failures: list[BaseException] = []

    async def one(message: bytes, due: float) -> None:
        caller = idle.pop() if idle else Caller(port)
        seen.note(await caller.ask(message), time.monotonic() - due)
        idle.append(caller)

    def ended(task: asyncio.Task[None]) -> None:
        under_way.discard(task)
        if (error := task.exception()) is not None:
            failures.append(error)

    began = due = time.monotonic()
    for number in itertools.count():
        due += draw.expovariate(rate)
        if due >= began + seconds:
            break
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(one(messages[number % len(messages)], due))
        under_way.add(task)
        task.add_done_callback(ended)
    await asyncio.gather(*under_way)
    if failures:
        raise failures[0]
    for caller in idle:
        caller.leave()


def for_seconds(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end
