"""
Readings: the few numbers of each restart that a verdict rests on.

    rows of a restart → read_restart → restarts.csv (a line for each number)
        → collect_readings → Readings (an array for each statistic)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from proof.evidence.statistics import Matrix, slope, summarize_latencies
from proof.evidence.store import at_level
from proof.plans.plan import CLAIMABLE, Level, Plan
from proof.plans.schedule import CLOSING, CONTROL, PLAIN

COLUMNS = (
    "level",
    "block",
    "restart",
    "arm",
    "load_position",
    "metric",
    "statistic",
    "requests",
    "microseconds",
    "log",
)
"""Columns of restarts.csv; `block` is the kind of block."""
BLOCKS: Mapping[str, int] = {"plain": PLAIN, "control": CONTROL, "closing": CLOSING}
"""Kinds of blocks in restarts.csv, and their slice_id in the rows."""

DRIFT = "drift"
"""Statistic: change of log(second reference / first) from the first to the last plain block."""

Key = tuple[str, str, str]
"""(kind of block, metric, statistic)"""


@dataclass(frozen=True)
class Readings:
    """One level's numbers over restarts. Columns are the plan's arms; NaN where an arm has none."""

    restarts: tuple[int, ...]
    """(K,) numbers of the restarts that count."""
    positions: npt.NDArray[np.int64]
    """(K, arms) load positions."""
    logs: Mapping[Key, Matrix]
    """(K, arms) log of the statistic in microseconds."""
    drift: Matrix
    """(K,) drift of the inference time, or of the time end to end where servers do not report it.
    Empty where arms are not interleaved.
    """


def read_restart(
    plan: Plan, level: Level, restart: int, positions: Mapping[int, int], rows: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the lines of restarts.csv for one level of one restart that counts."""
    level_rows = at_level(rows, level.name)
    if level.kind == "capacity":
        return list(_capacity_lines(plan, level, restart, positions, level_rows))
    latencies = {
        metric: latencies_us(level, metric, level_rows)
        for metric in measured_metrics(plan, level, level_rows)
    }
    if level.kind == "switchback":
        blocks = {"plain": level_rows["slice_id"] >= PLAIN}
    else:
        blocks = {name: level_rows["slice_id"] == kind for name, kind in BLOCKS.items()}
    lines = []
    for block, is_block in blocks.items():
        for a, arm in enumerate(plan.arms):
            chosen = is_block & (level_rows["arm"] == arm.name)
            count = int(chosen.sum())
            if not count:
                continue
            for metric, values in latencies.items():
                for name, us in summarize_latencies(values[chosen]).items():
                    key = (block, metric, name)
                    lines.append(_line(level, key, restart, arm.name, positions[a], count, us))
    if level.tuples:
        lines.append(_drift_line(plan, level, restart, positions, level_rows, latencies))
    return lines


def latencies_us(level: Level, metric: str, rows: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Return the microseconds of each row.

    Time end to end begins at the scheduled time under load, and at sending without.
    """
    if metric == "inference":
        inference_us: npt.NDArray[np.float64] = rows["inference_us"]
        return inference_us
    if metric == "inference_cpu":
        inference_cpu_us: npt.NDArray[np.float64] = rows["inference_cpu_us"]
        return inference_cpu_us
    begin = rows["sent_ns"] if level.kind == "unloaded" else rows["scheduled_ns"]
    return np.asarray((rows["done_ns"] - begin) / 1000, np.float64)


def measured_metrics(plan: Plan, level: Level, rows: Mapping[str, Any]) -> list[str]:
    """Return what is known of each request at a level; `mixed` has its inference time alone."""
    metrics = [] if level.kind == "mixed" else ["end_to_end"]
    if plan.server_timing:
        metrics.append("inference")
        if (rows["inference_cpu_us"] > 0).all():
            metrics.append("inference_cpu")
    return metrics


def _drift_line(
    plan: Plan,
    level: Level,
    restart: int,
    positions: Mapping[int, int],
    rows: Mapping[str, Any],
    latencies: Mapping[str, Any],
) -> dict[str, Any]:
    first, second = plan.indices("reference")
    metric = "inference" if "inference" in latencies else "end_to_end"
    is_plain = rows["slice_id"] == PLAIN
    first_us, second_us = (
        latencies[metric][is_plain & (rows["arm"] == plan.arms[a].name)] for a in (first, second)
    )
    change = slope(np.log(second_us) - np.log(first_us))
    return _line(
        level,
        ("plain", metric, DRIFT),
        restart,
        plan.arms[second].name,
        positions[second],
        len(first_us),
        math.exp(change),
    )


def _capacity_lines(
    plan: Plan, level: Level, restart: int, positions: Mapping[int, int], rows: Mapping[str, Any]
) -> Iterable[dict[str, Any]]:
    for a, arm in enumerate(plan.arms):
        is_arm = rows["arm"] == arm.name
        count = int(is_arm.sum())
        if not count:
            continue
        duration_ns = 0
        for slice_id in np.unique(rows["slice_id"][is_arm]):
            in_slice = is_arm & (rows["slice_id"] == slice_id)
            duration_ns += int(rows["done_ns"][in_slice].max() - rows["sent_ns"][in_slice].min())
        yield _line(
            level,
            ("plain", "time_per_text", "mean"),
            restart,
            arm.name,
            positions[a],
            count,
            duration_ns / 1000 / count,
        )


def _line(
    level: Level,
    key: Key,
    restart: int,
    arm: str,
    position: int,
    requests: int,
    value: float,
) -> dict[str, Any]:
    block, metric, name = key
    return {
        "level": level.name,
        "block": block,
        "restart": restart,
        "arm": arm,
        "load_position": position,
        "metric": metric,
        "statistic": name,
        "requests": requests,
        "microseconds": repr(value),
        "log": repr(math.log(value)),
    }


def collect_readings(plan: Plan, level: Level, lines: Sequence[Mapping[str, Any]]) -> Readings:
    """Return the numbers of one level from the lines of restarts.csv."""
    level_lines = [line for line in lines if line["level"] == level.name]
    restarts = tuple(sorted({int(line["restart"]) for line in level_lines}))
    rows = {restart: i for i, restart in enumerate(restarts)}
    columns = {arm.name: i for i, arm in enumerate(plan.arms)}
    shape = (len(restarts), len(plan.arms))
    positions = np.zeros(shape, np.int64)
    drift = np.full(len(restarts), np.nan)
    logs: dict[Key, Matrix] = {}
    for line in level_lines:
        row, column = rows[int(line["restart"])], columns[line["arm"]]
        if line["statistic"] == DRIFT:
            drift[row] = float(line["log"])
            continue
        positions[row, column] = int(line["load_position"])
        key = (line["block"], line["metric"], line["statistic"])
        logs.setdefault(key, np.full(shape, np.nan))[row, column] = float(line["log"])
    return Readings(restarts, positions, logs, drift[~np.isnan(drift)])


def claimable(level: Level) -> list[tuple[str, str]]:
    """Return (metric, statistic) of everything that can be claimed at a level."""
    return [(metric, name) for metric, names in CLAIMABLE[level.kind].items() for name in names]
