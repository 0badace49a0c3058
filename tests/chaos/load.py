"""
More than the service can do, by many callers or by one, with the default settings.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping

from benchmarks.harness.processes import halves
from tests.chaos.attack import MEMORY_AT_MOST, Watch, under_attack
from tests.chaos.caller import Caller, Seen, closed, for_seconds, opened, request
from tests.chaos.scenarios import LONG, Row, gauge, kept_to, row, served, settled, told

DEADLINE_S = 30.0
LATE_AT_MOST = 0.001
"""Of the requests, those that may be answered with 504: a shared machine stops for longer than any
estimate allows for.
"""
REFUSED_WITHIN_S = 0.1
"""What half of the refusals may take."""

LONG_TEXT = "a charming and often affecting journey " * 22
"""More than the 128 tokens that the example model reads."""
SHORT_TEXT = "good film"


async def overload(seconds: float) -> Row:
    """Ten times what the service can do: what it accepts it answers in time, and refuses the rest
    at once.
    """
    # Apart, or what sends ten times too much would take the processors from what answers it.
    ours, theirs = halves()
    with kept_to(theirs), served("--variant", "cpu-fp32", cpus=ours) as server:
        first, seen = Seen(), Seen()
        await closed(server.port, LONG, 16, for_seconds(5), first)
        rate = first.statuses[200] / 5
        before = server.anonymous_bytes()
        with Watch(server) as watch:
            await opened(server.port, LONG, 10 * rate, seconds, seen)
            lag = gauge(server, "drbert_event_loop_lag_seconds")
        grown = watch.peak_bytes / before - 1
        slowest = max(seen.seconds.get(200, [0.0]))
        ok = (
            settled(server)
            and set(seen.statuses) <= {200, 429, 504}
            and seen.statuses[504] <= LATE_AT_MOST * seen.requests
            and not seen.unanswered
            and slowest <= DEADLINE_S + 1
            and seen.percentile(50, 429) <= REFUSED_WITHIN_S
            and grown <= MEMORY_AT_MOST
        )
    return row(
        "ten times too much",
        f"{10 * rate:,.0f} requests/s for {seconds:.0f} s, of which it can answer {rate:,.0f};"
        " default settings",
        seen,
        seen.unanswered,
        f"{told(seen)}; of the answered p50 {seen.percentile(50):.2f} s, p99"
        f" {seen.percentile(99):.2f} s, slowest {slowest:.2f} s, limit {DEADLINE_S:.0f} s; refused"
        f" within {1000 * seen.percentile(50, 429):.0f} ms (p50); memory {grown:+.1%}; worst event"
        f" loop lag {1000 * lag:.0f} ms",
        ok,
    )


async def one_list(seconds: float, tokens: str = "long") -> Row:
    """One caller's lists of 1,000 texts beside callers of one short text."""
    attack, what = (
        (one_long_list, "128 tokens") if tokens == "long" else (one_short_list, "4 tokens")
    )
    return await under_attack(
        f"one heavy list beside light callers, {what}",
        f"1 caller with lists of 1,000 texts of {what}",
        attack,
        seconds,
    )


async def eight_lists(seconds: float) -> Row:
    return await under_attack(
        "eight lists beside light callers",
        "8 callers with lists of 64 texts of 128 tokens",
        eight_long_lists,
        seconds,
    )


async def one_long_list(port: int, seconds: float) -> Mapping[str, int]:
    return await _lists(port, seconds, LONG_TEXT, 1000, 1)


async def one_short_list(port: int, seconds: float) -> Mapping[str, int]:
    return await _lists(port, seconds, SHORT_TEXT, 1000, 1)


async def eight_long_lists(port: int, seconds: float) -> Mapping[str, int]:
    return await _lists(port, seconds, LONG_TEXT, 64, 8)


async def _lists(
    port: int, seconds: float, text: str, texts: int, callers: int
) -> Mapping[str, int]:
    """How many texts a second callers of lists get beside others for `seconds`, and after that for
    as long alone.
    """
    message = request(json.dumps({"input": [text] * texts}).encode())
    beside_seen, alone_seen = Seen(), Seen()
    beside = await _texts_per_s(port, message, texts, callers, seconds, beside_seen)
    await asyncio.sleep(1)
    alone = await _texts_per_s(port, message, texts, callers, seconds, alone_seen)
    refused = sum(seen.requests - seen.statuses[200] for seen in (beside_seen, alone_seen))
    return {
        "lists answered": beside_seen.statuses[200],
        "not answered": refused,
        "texts/s beside": round(beside),
        "texts/s alone": round(alone),
    }


async def _texts_per_s(
    port: int, message: bytes, texts: int, callers: int, seconds: float, seen: Seen
) -> float:
    """Texts by the time that they took, of whole lists only."""
    began = time.monotonic()
    ended = [began] * callers

    async def one(number: int) -> None:
        caller = Caller(port)
        while time.monotonic() < began + seconds:
            asked = time.monotonic()
            status = await caller.ask(message)
            ended[number] = time.monotonic()
            seen.note(status, ended[number] - asked)
            if status == 429:
                await asyncio.sleep(1)
        caller.leave()

    await asyncio.gather(*(one(number) for number in range(callers)))
    return seen.statuses[200] * texts / max(1e-9, max(ended) - began)
