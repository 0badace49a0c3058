"""
Sends texts to a server, a fixed number of them in flight, and measures each request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from client.compare.formats import Answer
from client.compare.target import RequestFailed, Target, post, read_answer

AFTER_FAILURE_S = 0.05
"""Pause after a request that failed: a server that refuses at once would be asked without end."""


@dataclass
class Slice:
    """The requests that one server got in one stretch of time."""

    latencies_s: list[float] = field(default_factory=list)
    """Seconds of each request that was answered with a classification."""
    failures: list[str] = field(default_factory=list)
    """Why each other request failed."""
    seconds: float = 0.0
    """From the first request to the last answer."""

    @property
    def texts_per_s(self) -> float:
        """Answered texts per second."""
        return len(self.latencies_s) / self.seconds

    def quantile_s(self, share: float) -> float:
        """Return a quantile of the latencies in seconds; `share` is 0 to 1."""
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def ask_all(
    session: aiohttp.ClientSession,
    targets: Sequence[Target],
    texts: Sequence[str],
    in_flight: int,
    seconds: float,
) -> list[list[Answer | str]]:
    """Ask every server for each text, text by text; return the answers by server.

    A string says why there is no answer. It ends after `seconds`, with as many of the first texts
    as every server was asked for, and at least one.
    """
    answers: list[dict[int, Answer | str]] = [{} for _ in targets]
    deadline = time.monotonic() + seconds
    positions = iter(range(len(texts)))

    async def work() -> None:
        for i in positions:
            if i and time.monotonic() > deadline:
                return
            for target, of_target in zip(targets, answers, strict=True):
                try:
                    content = await post(
                        session, target.address, target.encode(texts[i]), target.headers
                    )
                    of_target[i] = read_answer(target, content)
                except RequestFailed as failure:
                    of_target[i] = str(failure)

    await _all(work, in_flight)
    # Workers end at different texts; every text before the first gap was asked.
    asked = next((i for i in range(len(texts)) if any(i not in each for each in answers)), None)
    count = len(texts) if asked is None else asked
    return [[of_target[i] for i in range(count)] for of_target in answers]


async def run_slice(
    session: aiohttp.ClientSession,
    target: Target,
    bodies: Sequence[bytes],
    first: int,
    in_flight: int,
    seconds: float,
) -> Slice:
    """Send texts for `seconds`, always `in_flight` at a time, and wait for the last answers.

    It begins with the text at `first` and returns to the begin after the last one.
    """
    measured = Slice()
    started = time.perf_counter()
    sent = first

    async def work() -> None:
        nonlocal sent
        while time.perf_counter() - started < seconds:
            body = bodies[sent % len(bodies)]
            sent += 1
            begin = time.perf_counter()
            try:
                content = await post(session, target.address, body, target.headers)
                latency_s = time.perf_counter() - begin
                read_answer(target, content)
            except RequestFailed as failure:
                measured.failures.append(str(failure))
                await asyncio.sleep(AFTER_FAILURE_S)
            else:
                measured.latencies_s.append(latency_s)

    await _all(work, in_flight)
    measured.seconds = time.perf_counter() - started
    return measured


async def _all(work: Callable[[], Awaitable[None]], count: int) -> None:
    await asyncio.gather(*(work() for _ in range(count)))
