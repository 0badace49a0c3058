"""
Overload by many callers or by one, with the default settings.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping

from benchmarks.harness.processes import split_cpus
from tests.chaos.attack import MEMORY_AT_MOST, MemoryWatch, under_attack
from tests.chaos.caller import Caller, Outcomes, closed_loop, for_seconds, open_loop, request
from tests.chaos.scenarios import (
    LONG,
    Row,
    make_row,
    pinned_to,
    read_gauge,
    running_service,
    settles,
)

DEADLINE_S = 30.0
LATE_AT_MOST = 0.001
"""Largest share of requests that may get a 504: a shared machine stops for longer than any estimate
allows for.
"""
REFUSED_WITHIN_S = 0.1
"""Longest median time of a refusal."""

LONG_TEXT = "a charming and often affecting journey " * 22
"""A text of more than the 128 tokens that the example model reads."""
SHORT_TEXT = "good film"


async def overload(seconds: float) -> Row:
    """Send ten times what the service can answer.

    It must answer what it accepts in time, and refuse the rest at once.
    """
    # On separate CPUs: callers that send ten times too much would take those of the service.
    server_cpus, caller_cpus = split_cpus()
    with (
        pinned_to(caller_cpus),
        running_service("--variant", "cpu-fp32", cpus=server_cpus) as server,
    ):
        first, outcomes = Outcomes(), Outcomes()
        await closed_loop(server.port, LONG, 16, for_seconds(5), first)
        rate = first.statuses[200] / 5
        before = server.anonymous_bytes()
        with MemoryWatch(server) as watch:
            await open_loop(server.port, LONG, 10 * rate, seconds, outcomes)
            lag = read_gauge(server, "drbert_event_loop_lag_seconds")
        grown = watch.peak_bytes / before - 1
        slowest = max(outcomes.seconds.get(200, [0.0]))
        ok = (
            settles(server)
            and set(outcomes.statuses) <= {200, 429, 504}
            and outcomes.statuses[504] <= LATE_AT_MOST * outcomes.requests
            and not outcomes.unanswered
            and slowest <= DEADLINE_S + 1
            and outcomes.percentile(50, 429) <= REFUSED_WITHIN_S
            and grown <= MEMORY_AT_MOST
        )
    return make_row(
        "ten times too much",
        f"{10 * rate:,.0f} requests/s for {seconds:.0f} s, of which it can answer {rate:,.0f};"
        " default settings",
        outcomes,
        outcomes.unanswered,
        f"{outcomes}; of the answered p50 {outcomes.percentile(50):.2f} s,"
        f" p99 {outcomes.percentile(99):.2f} s, slowest {slowest:.2f} s, limit {DEADLINE_S:.0f} s;"
        f" refused within {1000 * outcomes.percentile(50, 429):.0f} ms (p50); memory {grown:+.1%};"
        f" worst event loop lag {1000 * lag:.0f} ms",
        ok,
    )


async def one_list(seconds: float, tokens: str = "long") -> Row:
    """Attack with one caller's lists of 1,000 texts, next to callers of one short text."""
    attack, length = (
        (one_long_list, "128 tokens") if tokens == "long" else (one_short_list, "4 tokens")
    )
    return await under_attack(
        f"one heavy list beside light callers, {length}",
        f"1 caller with lists of 1,000 texts of {length}",
        attack,
        seconds,
    )


async def eight_lists(seconds: float) -> Row:
    """Attack with eight callers' lists of 64 texts."""
    return await under_attack(
        "eight lists beside light callers",
        "8 callers with lists of 64 texts of 128 tokens",
        eight_long_lists,
        seconds,
    )


async def one_long_list(port: int, seconds: float) -> Mapping[str, int]:
    """Send lists of 1,000 long texts from one caller."""
    return await _lists(port, seconds, LONG_TEXT, 1000, 1)


async def one_short_list(port: int, seconds: float) -> Mapping[str, int]:
    """Send lists of 1,000 short texts from one caller."""
    return await _lists(port, seconds, SHORT_TEXT, 1000, 1)


async def eight_long_lists(port: int, seconds: float) -> Mapping[str, int]:
    """Send lists of 64 long texts from eight callers."""
    return await _lists(port, seconds, LONG_TEXT, 64, 8)


async def _lists(
    port: int, seconds: float, text: str, texts: int, callers: int
) -> Mapping[str, int]:
    """Return the texts per second of callers of lists, next to others and then alone.

    Each of the two parts takes `seconds`.
    """
    message = request(json.dumps({"input": [text] * texts}).encode())
    shared_outcomes, alone_outcomes = Outcomes(), Outcomes()
    shared = await _texts_per_s(port, message, texts, callers, seconds, shared_outcomes)
    await asyncio.sleep(1)
    alone = await _texts_per_s(port, message, texts, callers, seconds, alone_outcomes)
    return {
        "lists answered": shared_outcomes.statuses[200],
        "not answered": shared_outcomes.failed + alone_outcomes.failed,
        "texts/s beside": round(shared),
        "texts/s alone": round(alone),
    }


async def _texts_per_s(
    port: int, message: bytes, texts: int, callers: int, seconds: float, outcomes: Outcomes
) -> float:
    """Return the texts per second of whole lists, by the time that they took."""
    began = time.monotonic()
    ended = [began] * callers

    async def call(number: int) -> None:
        caller = Caller(port)
        while time.monotonic() < began + seconds:
            sent = time.monotonic()
            status = await caller.send(message)
            ended[number] = time.monotonic()
            outcomes.count(status, ended[number] - sent)
            if status == 429:
                await asyncio.sleep(1)
        caller.close()

    await asyncio.gather(*(call(number) for number in range(callers)))
    return outcomes.statuses[200] * texts / max(1e-9, max(ended) - began)
