"""
Measures what an attacker does to honest callers: their latency, the server's memory and its event
loop, before and during.

An attack is a coroutine function `attack(port, seconds)` at the top level of a module. It runs in a
process of its own, so that its work delays neither the honest callers nor what times them, and
returns what it did, as counts for the table.
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

from benchmarks.harness.processes import Process, halves
from tests.chaos.caller import Seen, opened, texts
from tests.chaos.scenarios import Row, gauge, kept_to, row, served, settled, told

Attack = Callable[[int, float], Coroutine[Any, Any, Mapping[str, int]]]

HONEST = texts(
    "good", "a charming and often affecting journey", "the plot is thin", "would buy again"
)
HONEST_PER_S = 20.0
DOCUMENTED = {200, 400, 401, 404, 408, 413, 414, 415, 422, 429, 431, 503, 504}
"""Statuses that docs/operations.md names; an honest caller's request is valid, so it may only meet
200, 429, 503 and 504.
"""
SLOWER_AT_MOST = 3.0
MEMORY_AT_MOST = 0.20
# Below these a ratio measures the machine's noise and not the attack.
QUIET_P50_S, QUIET_P99_S = 0.005, 0.020


@dataclass
class Watch:
    """The server's memory while a block runs, sampled five times a second."""

    server: Process
    peak_bytes: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
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
    """Honest callers at `honest` requests/s, alone for `seconds` and then for as long beside
    `attack`.

    Holds if every honest request was answered with 200, their p50 and p99 are at most
    SLOWER_AT_MOST times those before, memory grew by at most MEMORY_AT_MOST, and nothing is left
    behind. `variables` are DRBERT_* settings; without any the row is of the defaults.
    """
    ours, theirs = halves()
    context = multiprocessing.get_context("spawn")
    with (
        kept_to(theirs),
        served(cpus=ours, settings=variables) as server,
        ProcessPoolExecutor(1, context, initializer=os.nice, initargs=(10,)) as attackers,
    ):
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(
            attackers, int
        )  # starts the process: its imports are no part of the attack
        await opened(server.port, HONEST, honest, 3, Seen())
        quiet, during = Seen(), Seen()
        await opened(server.port, HONEST, honest, seconds, quiet)
        before = server.anonymous_bytes()
        with Watch(server) as watch:
            attacking = loop.run_in_executor(attackers, run_attack, attack, server.port, seconds)
            await asyncio.sleep(0.2)
            await opened(server.port, HONEST, honest, seconds, during, seed=1)
            counts = await attacking
            lag = gauge(server, "drbert_event_loop_lag_seconds")
        gone = settled(server) and server.process.poll() is None
    grown = watch.peak_bytes / before - 1
    p50 = during.percentile(50) / max(QUIET_P50_S, quiet.percentile(50))
    p99 = during.percentile(99) / max(QUIET_P99_S, quiet.percentile(99))
    answered = during.statuses[200] == during.requests and set(during.statuses) <= DOCUMENTED
    holds = (
        gone
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
        f"honest callers {told(during)}; p50 {1000 * quiet.percentile(50):.1f} →"
        f" {1000 * during.percentile(50):.1f} ms, p99 {1000 * quiet.percentile(99):.1f} →"
        f" {1000 * during.percentile(99):.1f} ms; memory {grown:+.1%}; worst event loop lag"
        f" {1000 * lag:.0f} ms; attacker:"
        f" {', '.join(f'{name} {count:,}' for name, count in counts.items())}"
    )
    return row(
        scenario,
        f"{done}; {settings}",
        during,
        during.requests - during.statuses[200],
        figures,
        holds,
    )


def run_attack(attack: Attack, port: int, seconds: float) -> Mapping[str, int]:
    return asyncio.run(attack(port, seconds))
