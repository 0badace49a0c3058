"""
What must hold for a measurement to count. No gate looks at the contrast of candidate and reference.

The run asks after each restart whether to repeat it; the judge asks again, from the rows, and
refuses evidence in which a restart was dropped or kept for any other reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from proof.plan import Plan

MOST_GENERATOR_CPU = 0.5
MOST_SEND_LAG = 0.05
MOST_DROPPED = 0.2

# Why a restart may have ended early; its rows then lack some of the schedule.
INTERRUPTED = "interrupted"
NOT_STARTED = "the server did not start"
GENERATOR_FAILED = "the load generator failed"
ENDED_EARLY = (INTERRUPTED, NOT_STARTED, GENERATOR_FAILED)

Columns = Mapping[str, Any]
"""The rows of one restart, a numpy array a column."""


@dataclass(frozen=True)
class Gate:
    """One condition, what was found, and whether it holds."""

    name: str
    passed: bool
    found: str


def restart_breach(plan: Plan, rows: Columns, requests: int, generator_cpu_share: float, throttled_us: int) -> str:
    """Why a whole restart of `requests` requests is dropped and repeated, or an empty string."""
    count = len(rows["status"])
    if count != requests:
        return f"{count} of {requests} requests were sent"
    bad = (rows["status"] < 200) | (rows["status"] > 299)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        return f"{int(bad.sum())} requests without a good answer, the first ({rows['request_id'][first]}) with status {rows['status'][first]}"
    if (rows["inference_us"] <= 0).any():
        return "answers without Server-Timing, so no inference time is known"
    if len(np.unique(rows["instance"])) != 1:
        return "the server changed within the restart"
    backward = rows["done_ns"] - rows["sent_ns"] < rows["total_us"] * 1000
    if backward.any():
        return f"request {rows['request_id'][int(np.flatnonzero(backward)[0])]} took less than its server says it spent"
    if throttled_us > 0:
        return f"the container was throttled for {throttled_us} µs"
    if generator_cpu_share > MOST_GENERATOR_CPU:
        return f"the generator used {generator_cpu_share:.0%} of a core, more than {MOST_GENERATOR_CPU:.0%}"
    return _lag_breach(plan, rows)


def _lag_breach(plan: Plan, rows: Columns) -> str:
    measured = rows["slice"] == 0
    arms = rows["arm"][measured]
    lag = (rows["sent_ns"] - rows["scheduled_ns"])[measured].astype(float)
    latency = (rows["done_ns"] - rows["sent_ns"])[measured].astype(float)
    if lag.mean() > MOST_SEND_LAG * latency.mean():
        return f"requests went out {lag.mean() / 1000:.0f} µs late on average, more than {MOST_SEND_LAG:.0%} of the mean latency"
    names = [plan.arms[i].name for i in plan.indices("reference")]
    first, second = (lag[arms == name].mean() for name in names)
    allowed = plan.level.tightest_margin / 4 * latency[arms == names[0]].mean()
    if abs(first - second) > allowed:
        return f"the two references were sent {abs(first - second) / 1000:.1f} µs apart in lag, more than {allowed / 1000:.1f} µs"
    return ""
