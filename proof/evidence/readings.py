"""
A few numbers of each restart: all that a verdict rests on.

    rows of a restart → read_restart → restarts.csv (a line a number) → Readings (an array a
        statistic)
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
BLOCKS: Mapping[str, int] = {"plain": PLAIN, "control": CONTROL, "closing": CLOSING}

# The change of log(second reference / first) from the first to the last plain tuple.
DRIFT = "drift"

Key = tuple[str, str, str]
"""(block, metric, statistic)"""


@dataclass(frozen=True)
class Readings:
    """One level's numbers over restarts. Columns are the plan's arms; NaN where an arm had no such
    requests.
    """

    restarts: tuple[int, ...]
    positions: npt.NDArray[np.int64]
    """(K, arms) load positions"""
    logs: Mapping[Key, Matrix]
    """(K, arms) log of the statistic in microseconds"""
    drift: Matrix
    """(K,) of the inference time where servers tell it, else end to end; empty where arms are not
    interleaved
    """


def read_restart(
    plan: Plan, level: Level, restart: int, positions: Mapping[int, int], rows: dict[str, Any]
) -> list[dict[str, Any]]:
    """Lines of restarts.csv for one level of one restart that counts."""
    here = at_level(rows, level.name)
    if level.kind == "capacity":
        return list(_capacity(plan, level, restart, positions, here))
    microseconds = {metric: latencies_us(level, metric, here) for metric in _metrics(plan, level)}
    lines = []
    blocks = (
        {"plain": here["slice_id"] >= PLAIN}
        if level.kind == "switchback"
        else {name: here["slice_id"] == kind for name, kind in BLOCKS.items()}
    )
    for block, chosen in blocks.items():
        for a, arm in enumerate(plan.arms):
            mine = chosen & (here["arm"] == arm.name)
            if not mine.any():
                continue
            count = int(mine.sum())
            for metric, values in microseconds.items():
                lines += [
                    _line(level, (block, metric, name), restart, arm.name, positions[a], count, us)
                    for name, us in summarize_latencies(values[mine]).items()
                ]
    if level.tuples:
        lines.append(_drift(plan, level, restart, positions, here, microseconds))
    return lines


def latencies_us(level: Level, metric: str, rows: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Microseconds of each row. Under load a request's time begins when it was due; alone, when it
    was sent.
    """
    if metric == "inference":
        found: npt.NDArray[np.float64] = rows["inference_us"]
        return found
    begin = rows["sent_ns"] if level.kind == "unloaded" else rows["scheduled_ns"]
    return np.asarray((rows["done_ns"] - begin) / 1000, np.float64)


def _metrics(plan: Plan, level: Level) -> list[str]:
    """What is known of each request at that level; `mixed` judges and shows inference time
    alone.
    """
    known = ["inference"] if level.kind == "mixed" else ["end_to_end", "inference"]
    return [metric for metric in known if metric != "inference" or plan.server_timing]


def _drift(
    plan: Plan,
    level: Level,
    restart: int,
    positions: Mapping[int, int],
    rows: Mapping[str, Any],
    microseconds: Mapping[str, Any],
) -> dict[str, Any]:
    first, second = plan.indices("reference")
    metric = "inference" if "inference" in microseconds else "end_to_end"
    plain = rows["slice_id"] == PLAIN
    one, other = (
        microseconds[metric][plain & (rows["arm"] == plan.arms[a].name)] for a in (first, second)
    )
    change = slope(np.log(other) - np.log(one))
    return _line(
        level,
        ("plain", metric, DRIFT),
        restart,
        plan.arms[second].name,
        positions[second],
        len(one),
        math.exp(change),
    )


def _capacity(
    plan: Plan, level: Level, restart: int, positions: Mapping[int, int], rows: Mapping[str, Any]
) -> Iterable[dict[str, Any]]:
    for a, arm in enumerate(plan.arms):
        mine = rows["arm"] == arm.name
        if not mine.any():
            continue
        took_ns = sum(
            int(
                rows["done_ns"][mine & (rows["slice_id"] == s)].max()
                - rows["sent_ns"][mine & (rows["slice_id"] == s)].min()
            )
            for s in np.unique(rows["slice_id"][mine])
        )
        count = int(mine.sum())
        yield _line(
            level,
            ("plain", "time_per_text", "mean"),
            restart,
            arm.name,
            positions[a],
            count,
            took_ns / 1000 / count,
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
    """The numbers of one level out of the lines of restarts.csv."""
    mine = [line for line in lines if line["level"] == level.name]
    restarts = tuple(sorted({int(line["restart"]) for line in mine}))
    rows, columns = (
        {restart: i for i, restart in enumerate(restarts)},
        {arm.name: i for i, arm in enumerate(plan.arms)},
    )
    shape = (len(restarts), len(plan.arms))
    positions = np.zeros(shape, np.int64)
    drift = np.full(len(restarts), np.nan)
    logs: dict[Key, Matrix] = {}
    for line in mine:
        row, column = rows[int(line["restart"])], columns[line["arm"]]
        if line["statistic"] == DRIFT:
            drift[row] = float(line["log"])
            continue
        positions[row, column] = int(line["load_position"])
        key = (line["block"], line["metric"], line["statistic"])
        logs.setdefault(key, np.full(shape, np.nan))[row, column] = float(line["log"])
    return Readings(restarts, positions, logs, drift[~np.isnan(drift)])


def claimable(level: Level) -> list[tuple[str, str]]:
    """(metric, statistic) of all that may be claimed at a level."""
    return [(metric, name) for metric, names in CLAIMABLE[level.kind].items() for name in names]
