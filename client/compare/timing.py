"""
Times two servers in turn: in every round each gets texts in the same random order, and the ratio of
the two is one observation. What slows the machine down for a while slows both.

    round 1: alone old, alone new, 8 in flight old, 8 new, 32 old, 32 new
    round 2: the same, the new server first
    …

Intervals are those of a median by order statistics, which assume nothing about the distribution:
of 9 rounds, the second smallest to the second largest ratio hold the true median in 96 of 100 runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp

from client.compare.load import Slice, run_slice
from client.compare.target import Target

ROUNDS = 9
IN_FLIGHT = (1, 8, 32)
CONFIDENCE = 0.95
WARM_UP_SHARE = 0.15
"""Share of the time that a first round takes, which is not counted."""


@dataclass(frozen=True)
class Ratio:
    """The median of a ratio over the rounds, and its 95 % interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Level:
    """What was measured with a number of requests in flight."""

    in_flight: int
    texts_per_s: tuple[float, float]
    """Median over the rounds, of the old and the new server."""
    p50_s: tuple[float, float]
    """Median latency in seconds, of the old and the new server."""
    p95_s: tuple[float, float]
    speed_up: Ratio
    """Texts per second of the new server ÷ those of the old one."""
    latency: Ratio
    """Median latency of the new server ÷ that of the old one."""
    requests: tuple[int, int]
    """Number of answered requests, of the old and the new server."""
    failures: tuple[int, int]
    """Number of failed requests."""
    first_failure: str
    """Why the first of them failed; empty without any."""


async def time_servers(
    session: aiohttp.ClientSession,
    old: Target,
    new: Target,
    texts: Sequence[str],
    seconds: float,
    on_slice: Callable[[], object] = lambda: None,
) -> list[Level]:
    """Time both servers for about `seconds`, and return what was measured at each level.

    `on_slice` is called after each slice of time. There are SLICES of them.
    """
    silent: set[tuple[int, str]] = set()
    bodies = {target.role: [target.encode(text) for text in texts] for target in (old, new)}
    timed_s = seconds * (1 - WARM_UP_SHARE)
    slices: dict[tuple[int, str], list[Slice]] = {
        (count, role): [] for count in IN_FLIGHT for role in ("old", "new")
    }
    for number in range(ROUNDS + 1):
        is_warm_up = number == 0
        slice_s = (seconds * WARM_UP_SHARE if is_warm_up else timed_s / ROUNDS) / (
            2 * len(IN_FLIGHT)
        )
        for count in IN_FLIGHT:
            # Both begin with the same text, which is another one in each round.
            first = number * len(texts) // (ROUNDS + 1)
            for target in (old, new) if number % 2 else (new, old):
                if (count, target.role) in silent:
                    on_slice()
                    continue
                measured = await run_slice(
                    session, target, bodies[target.role], first, count, slice_s
                )
                if not measured.latencies_s:
                    # Every further slice would wait for a time limit, too.
                    silent.add((count, target.role))
                if not is_warm_up or not measured.latencies_s:
                    slices[count, target.role].append(measured)
                on_slice()
    return [_level(count, slices[count, "old"], slices[count, "new"]) for count in IN_FLIGHT]


SLICES = (ROUNDS + 1) * len(IN_FLIGHT) * 2
"""Slices of time of `time_servers`."""


def _level(in_flight: int, old: Sequence[Slice], new: Sequence[Slice]) -> Level:
    pairs = [
        (left, right)
        for left, right in zip(old, new, strict=False)  # a silent server has fewer slices
        if left.latencies_s and right.latencies_s
    ]
    failures = [failure for each in (*old, *new) for failure in each.failures]
    return Level(
        in_flight=in_flight,
        texts_per_s=(_median(old, _rate), _median(new, _rate)),
        p50_s=(_median(old, _p50), _median(new, _p50)),
        p95_s=(_median(old, _p95), _median(new, _p95)),
        speed_up=median_ratio([right.texts_per_s / left.texts_per_s for left, right in pairs]),
        latency=median_ratio([_p50(right) / _p50(left) for left, right in pairs]),
        requests=(_answered(old), _answered(new)),
        failures=(_failed(old), _failed(new)),
        first_failure=failures[0] if failures else "",
    )


def _rate(measured: Slice) -> float:
    return measured.texts_per_s


def _p50(measured: Slice) -> float:
    return measured.quantile_s(0.5)


def _p95(measured: Slice) -> float:
    return measured.quantile_s(0.95)


def _median(slices: Sequence[Slice], statistic: Callable[[Slice], float]) -> float:
    values = [statistic(each) for each in slices if each.latencies_s]
    return statistics.median(values) if values else math.nan


def _answered(slices: Sequence[Slice]) -> int:
    return sum(len(each.latencies_s) for each in slices)


def _failed(slices: Sequence[Slice]) -> int:
    return sum(len(each.failures) for each in slices)


def median_ratio(ratios: Sequence[float]) -> Ratio:
    """Return the median of ratios with its 95 % interval by order statistics.

    With fewer than six ratios no two of them bound the median so surely: the interval is unbounded.
    """
    if not ratios:
        return Ratio(math.nan, 0.0, math.inf)
    ordered = sorted(ratios)
    rank = order_statistic(len(ordered))
    if rank is None:
        return Ratio(statistics.median(ordered), 0.0, math.inf)
    return Ratio(statistics.median(ordered), ordered[rank], ordered[-1 - rank])


def order_statistic(count: int) -> int | None:
    """Return how many of `count` values to leave out at each end for a 95 % interval of the median.

    The number of values below the median is binomial with 1/2. None: even all are too few.
    """
    left_out: int | None = None
    outside = 0.0
    for rank in range((count + 1) // 2):
        outside += 2 * math.comb(count, rank) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        left_out = rank
    return left_out
