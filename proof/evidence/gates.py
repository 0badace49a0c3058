"""
Gates: what must hold for a restart to count.

No gate looks at the contrast of candidate and reference. The run applies them after each restart
to decide whether to repeat it. The judge applies them again to the rows, and rejects evidence in
which a restart was dropped or counted for any other reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from proof.evidence.slices import MOST_SEND_LAG, is_punctual
from proof.evidence.store import UNKNOWN
from proof.plans.plan import MOST_DILATION, Level, Plan
from proof.plans.schedule import PLAIN

MOST_GENERATOR_CPU = 0.5
"""Largest share of a core that the load generator may use."""
MOST_LATE = 0.05
"""Schedule 2: largest share of requests at a level `mixed` that may be sent late."""
MOST_LATE_SETS = 0.5
"""Schedule 2: largest share of sets of slices that may be left out because they were sent late."""
MOST_DROPPED = 0.2
"""Largest share of restarts that may be dropped."""
CLOCK_GRAIN_US = 0.01
"""Tolerance for sums of phases: each is reported in rounded nanoseconds."""

INTERRUPTED = "interrupted"
NOT_STARTED = "the server did not start"
GENERATOR_FAILED = "the load generator failed"
ENDED_EARLY = (INTERRUPTED, NOT_STARTED, GENERATOR_FAILED)
"""Reasons why a restart may have ended early; its rows then lack some of the schedule."""

Columns = Mapping[str, Any]
"""The rows of one restart: each column is an array or a Categorical."""


def restart_breach(
    plan: Plan,
    rows: Columns,
    requests: Mapping[str, int | None],
    generator_cpu_share: float,
    throttled_us: int,
    gpu_slowed: str = "",
) -> str:
    """Return why a restart is dropped and repeated, or an empty string.

    `requests` is the number of requests of each level; None where the schedule leaves it open.
    """
    has_failed = (rows["status"] < 200) | (rows["status"] > 299)
    if has_failed.any():
        first = int(np.flatnonzero(has_failed)[0])
        return (
            f"{int(has_failed.sum())} requests without a good answer, the first"
            f" ({rows['request_id'][first]}) with status {rows['status'][first]}"
        )
    for level, count in requests.items():
        sent = int((rows["level"] == level).sum())
        if sent != count and (count is not None or not sent):
            return f"{sent} of {count or 'some'} requests were sent at level {level}"
    if plan.server_timing and (breach := _timing_breach(plan, rows)):
        return breach
    for arm in rows["arm"].unique():
        if len(rows["instance"][rows["arm"] == arm].unique()) != 1:
            return f"the server of {arm} changed within the restart"
    too_short = rows["done_ns"] - rows["sent_ns"] < rows["total_us"] * 1000
    if too_short.any():
        first = rows["request_id"][int(np.flatnonzero(too_short)[0])]
        return f"request {first} took less than its server says it spent"
    if breach := _machine_breach(generator_cpu_share, throttled_us, gpu_slowed):
        return breach
    breaches = (_load_breach(plan, level, rows) for level in plan.judged_levels)
    return next((breach for breach in breaches if breach), "")


def _timing_breach(plan: Plan, rows: Columns) -> str:
    if (rows["inference_us"] <= 0).any() or (rows["total_us"] <= 0).any():
        return "answers without Server-Timing, so no inference time is known"
    claims_cpu = any("inference_cpu" in level.margins for level in plan.levels)
    if claims_cpu and (rows["inference_cpu_us"] <= 0).any():
        return "answers without the CPU time of inference, which the plan claims"
    is_first = (rows["first_of_shape"] == 1) & (rows["slice_id"] >= PLAIN)
    # How servers that others started are warmed up is not in the run's hands.
    if plan.starts_servers and is_first.any():
        first = rows["request_id"][int(np.flatnonzero(is_first)[0])]
        return (
            f"{int(is_first.sum())} measured requests ran in a batch of a new shape, the first"
            f" {first}: not every shape was warmed up"
        )
    phases_us = rows["tokenize_us"] + rows["queue_us"] + rows["inference_us"]
    exceeds = phases_us > rows["total_us"] + CLOCK_GRAIN_US
    if exceeds.any():
        first = rows["request_id"][int(np.flatnonzero(exceeds)[0])]
        return f"the parts of request {first} are more than its whole"
    return ""


def _machine_breach(generator_cpu_share: float, throttled_us: int, gpu_slowed: str) -> str:
    if throttled_us > 0:
        return f"the container was throttled for {throttled_us} µs"
    if gpu_slowed:
        return f"a GPU was slowed down by {gpu_slowed.replace(' ', ' and ')}"
    if generator_cpu_share == UNKNOWN:
        return "what the generator used of its core is not known"
    if generator_cpu_share > MOST_GENERATOR_CPU:
        return (
            f"the generator used {generator_cpu_share:.0%} of a core, more than"
            f" {MOST_GENERATOR_CPU:.0%}"
        )
    return ""


def _load_breach(plan: Plan, level: Level, rows: Columns) -> str:
    breach = ""
    if plan.schedule_version > 1 and level.percent:
        breach = _late_breach(plan, level, rows)
    elif level.kind != "capacity":
        breach = _lag_breach(plan, level, rows)
    return breach or _dilation_breach(level, rows)


def _late_breach(plan: Plan, level: Level, rows: Columns) -> str:
    """Return why a level under load was not sent in time.

    Single late requests do not count at `mixed`, where no claim depends on them. Sets of slices
    that were late are left out.
    """
    measured = (rows["level"] == level.name) & (rows["slice_id"] >= PLAIN)
    columns = ("slice_id", "scheduled_ns", "sent_ns", "done_ns")
    sent = {name: rows[name][measured] for name in columns}
    if level.kind == "mixed":
        latency = (sent["done_ns"] - sent["sent_ns"]).mean()
        late = float((sent["sent_ns"] - sent["scheduled_ns"] > MOST_SEND_LAG * latency).mean())
        most, what = MOST_LATE, "requests"
    else:
        late, most, what = 1 - float(is_punctual(plan, sent).mean()), MOST_LATE_SETS, "sets"
    return f"at level {level.name} {late:.0%} of the {what} were sent late" if late > most else ""


def _dilation_breach(level: Level, rows: Columns) -> str:
    """Return why a level that adjusts for the dilation cannot; it does not look at arms."""
    if not level.betas:
        return ""
    measured = rows["level"] == level.name
    if (rows["batch_id"][measured] < 0).any() or (rows["inference_cpu_us"][measured] <= 0).any():
        return f"at level {level.name} answers without batches and CPU time, which are adjusted for"
    batches = np.unique(rows["batch_id"][measured], return_index=True)[1]
    wall_us, cpu_us = (
        rows[name][measured][batches].sum() for name in ("inference_us", "inference_cpu_us")
    )
    if wall_us <= MOST_DILATION * cpu_us:
        return ""
    return (
        f"at level {level.name} inference took {wall_us / cpu_us:.1f} times its CPU time, more than"
        f" {MOST_DILATION:g}, because other processes kept the processor busy"
    )


def _lag_breach(plan: Plan, level: Level, rows: Columns) -> str:
    measured = (rows["level"] == level.name) & (rows["slice_id"] >= PLAIN)
    arms = rows["arm"][measured]
    prefix = f"at level {level.name}"
    lag = (rows["sent_ns"] - rows["scheduled_ns"])[measured].astype(float)
    latency = (rows["done_ns"] - rows["sent_ns"])[measured].astype(float)
    if lag.mean() > MOST_SEND_LAG * latency.mean():
        return (
            f"{prefix} requests went out {lag.mean() / 1000:.0f} µs late on average, more than"
            f" {MOST_SEND_LAG:.0%} of the mean latency"
        )
    names = [plan.arms[i].name for i in plan.indices("reference")]
    first, second = (lag[arms == name].mean() for name in names)
    allowed = level.tightest_margin / 4 * latency[arms == names[0]].mean()
    difference = abs(first - second)
    if difference > allowed:
        return (
            f"{prefix} the two references were sent {difference / 1000:.1f} µs apart in lag, more"
            f" than {allowed / 1000:.1f} µs"
        )
    return ""
