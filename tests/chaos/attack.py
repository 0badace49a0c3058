"""
Measure how an attack affects honest callers: their latency, the server's memory and its event loop.

An attack is a coroutine function `attack(port, seconds)` at the top level of a module. It runs in a
process of its own, so that its work delays neither the honest callers nor their clock. It returns
counts of what it did, for the table.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.processes import Server, split_cpus
from tests.chaos.caller import Outcomes, open_loop, text_requests
from tests.chaos.scenarios import Row, make_row, pinned_to, read_gauge, running_service, settles

Attack = Callable[[int, float], Coroutine[Any, Any, Mapping[str, int]]]

HONEST = text_requests(
    "good", "a charming and often affecting journey", "the plot is thin", "would buy again"
)
HONEST_PER_S = 20.0
DOCUMENTED = {200, 400, 401, 404, 408, 413, 414, 415, 422, 429, 431, 503, 504}
"""Statuses that docs/operations.md names.

An honest caller's request is valid, so its answer may only be 200, 429, 503 or 504.
"""
SLOWER_AT_MOST = 3.0
"""Largest ratio of the honest callers' latency during an attack to that before."""
MEMORY_AT_MOST = 0.20
"""Largest growth of the server's memory during an attack."""
QUIET_P50_S, QUIET_P99_S = 0.005, 0.020
"""Least latencies for a ratio: below them it measures the machine's noise and not the attack."""


@dataclass
class MemoryWatch:
    """A context that samples the server's memory five times a second."""

    server: Server
    peak_bytes: int = 0
    """Largest anonymous memory so far."""
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> MemoryWatch:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self.server.anonymous_bytes())
            if self._ended.wait(0.2):
                return


async def under_attack(
    scenario: str,
    done: str,
    attack: Attack,
    seconds: float,
    *,
    honest: float = HONEST_PER_S,
    **variables: str,
) -> Row:
    """Run honest callers at `honest` requests/s, alone for `seconds` and then during `attack`.

    The row holds if every honest request was answered with 200, their p50 and p99 are at most
    SLOWER_AT_MOST times those before, memory grew by at most MEMORY_AT_MOST, and no request remains
    in flight or in the queue. `variables` are DRBERT_* settings; the default settings without any.
    """
    server_cpus, caller_cpus = split_cpus()
    context = multiprocessing.get_context("spawn")
    with (
        pinned_to(caller_cpus),
        running_service(cpus=server_cpus, settings=variables) as server,
        ProcessPoolExecutor(1, context, initializer=os.nice, initargs=(10,)) as attackers,
    ):
        loop = asyncio.get_running_loop()
        # Starts the process, so that its imports are not a part of the attack.
        await loop.run_in_executor(attackers, int)
        await open_loop(server.port, HONEST, honest, 3, Outcomes())
        quiet, during = Outcomes(), Outcomes()
        await open_loop(server.port, HONEST, honest, seconds, quiet)
        before = server.anonymous_bytes()
        with MemoryWatch(server) as watch:
            attacking = loop.run_in_executor(attackers, run_attack, attack, server.port, seconds)
            await asyncio.sleep(0.2)
            await open_loop(server.port, HONEST, honest, seconds, during, seed=1)
            counts = await attacking
            lag = read_gauge(server, "drbert_event_loop_lag_seconds")
        survived = settles(server) and server.process.poll() is None
    grown = watch.peak_bytes / before - 1
    p50 = during.percentile(50) / max(QUIET_P50_S, quiet.percentile(50))
    p99 = during.percentile(99) / max(QUIET_P99_S, quiet.percentile(99))
    answered = during.statuses[200] == during.requests and set(during.statuses) <= DOCUMENTED
    holds = (
        survived
        and answered
        and p50 <= SLOWER_AT_MOST
        and p99 <= SLOWER_AT_MOST
        and grown <= MEMORY_AT_MOST
    )
    settings = (
        ", ".join(f"DRBERT_{name}={value}" for name, value in variables.items())
        or "default settings"
    )
    figures = (
        f"honest callers {during}; p50 {1000 * quiet.percentile(50):.1f} →"
        f" {1000 * during.percentile(50):.1f} ms, p99 {1000 * quiet.percentile(99):.1f} →"
        f" {1000 * during.percentile(99):.1f} ms; memory {grown:+.1%}; worst event loop lag"
        f" {1000 * lag:.0f} ms; attacker:"
        f" {', '.join(f'{name} {count:,}' for name, count in counts.items())}"
    )
    return make_row(
        scenario,
        f"{done}; {settings}",
        during,
        during.failed,
        figures,
        holds,
    )


def run_attack(attack: Attack, port: int, seconds: float) -> Mapping[str, int]:
    """Run an attack in this process and return its counts."""
    return asyncio.run(attack(port, seconds))
