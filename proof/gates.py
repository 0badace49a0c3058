"""
What must hold for a measurement to count. No gate looks at the contrast of candidate and reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from proof.evidence import Row
from proof.plan import Plan

MOST_GENERATOR_CPU = 0.5
MOST_SEND_LAG = 0.05
MOST_DROPPED = 0.2


@dataclass(frozen=True)
class Gate:
    """One condition, what was found, and whether it holds."""

    name: str
    passed: bool
    found: str


def restart_breach(plan: Plan, rows: Sequence[Row], generator_cpu_share: float, throttled_us: int) -> str:
    """Why a whole restart is dropped and repeated, or an empty string."""
    expected = sum(1 for _ in plan.schedule(0, 1))
    if len(rows) < expected:
        return f"{len(rows)} of {expected} requests were sent"
    failed = [row for row in rows if not 200 <= row.status < 300]
    if failed:
        return f"{len(failed)} requests without a good answer, the first ({failed[0].request_id}) with status {failed[0].status}"
    if len({row.instance for row in rows}) != 1:
        return "the server changed within the restart"
    backward = [row for row in rows if row.done_ns - row.sent_ns < row.total_us * 1000]
    if backward:
        return f"request {backward[0].request_id} took less than its server says it spent"
    if throttled_us > 0:
        return f"the container was throttled for {throttled_us} µs"
    if generator_cpu_share > MOST_GENERATOR_CPU:
        return f"the generator used {generator_cpu_share:.0%} of a core, more than {MOST_GENERATOR_CPU:.0%}"
    return _lag_breach(plan, rows)


def _lag_breach(plan: Plan, rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row.slice == 0]
    lag = np.array([row.sent_ns - row.scheduled_ns for row in measured], float)
    latency = np.array([row.done_ns - row.sent_ns for row in measured], float)
    if lag.mean() > MOST_SEND_LAG * latency.mean():
        return f"requests went out {lag.mean() / 1000:.0f} µs late on average, more than {MOST_SEND_LAG:.0%} of the mean latency"
    references = plan.indices("reference")
    arms = np.array([row.arm for row in measured])
    first, second = (lag[arms == plan.arms[i].name].mean() for i in references)
    allowed = plan.level.tightest_margin / 4 * latency[arms == plan.arms[references[0]].name].mean()
    if abs(first - second) > allowed:
        return f"the two references were sent {abs(first - second) / 1000:.1f} µs apart in lag, more than {allowed / 1000:.1f} µs"
    return ""
