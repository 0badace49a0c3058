"""
Readings: the few numbers of each restart that a verdict rests on.

    rows of a restart → read_restart → restarts.csv (a line for each number)
        → collect_readings → Readings (an array for each statistic)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from proof.evidence.slices import busy_share, read_slices, tails, without_late_sets
from proof.evidence.statistics import Matrix, slope, summarize_latencies
from proof.evidence.store import at_level
from proof.plans.plan import CLAIMABLE, ONE_IN_FLIGHT, Level, Plan
from proof.plans.schedule import CLOSING, CONTROL, FIRST, PLAIN, REPEATED

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
NO_POSITION = -1
"""Load position of a line that belongs to no copy."""
BLOCKS: Mapping[str, int] = {"plain": PLAIN, "control": CONTROL, "closing": CLOSING}
"""Kinds of blocks in restarts.csv, and their slice_id in the rows."""
REPEAT_BLOCKS: Mapping[str, int] = {"first": FIRST, "repeat": REPEATED}
"""The same of the level `repeat`."""

DELAY = "delay"
"""Kind of block of the delayed arm in schedule 2: its log ratio to copies that are not delayed."""
BUSY_SHARE = "busy_share"
"""Metric: the share of time in which the engine was busy."""
OF_SLICES: Mapping[str, Callable[[Matrix], float]] = {
    "mean": lambda shares: float(shares.mean()),
    "least": lambda shares: float(shares.min()),
    "most": lambda shares: float(shares.max()),
}
"""Statistics of the busy share over the slices of a restart."""
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
    delays: Mapping[tuple[str, str], Matrix] = field(default_factory=dict)
    """Schedule 2: (K,) log ratio of the delayed arm to its copies, by metric and statistic."""
    busy_shares: Matrix = field(default_factory=lambda: np.zeros((0, 3)))
    """(K, 3) share of time in which the engine was busy: the mean over a restart's slices, the
    least and the most of them. Empty where it is not known.
    """


def read_restart(
    plan: Plan, level: Level, restart: int, positions: Mapping[int, int], rows: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the lines of restarts.csv for one level of one restart that counts.

    `positions` are the load positions of the copies, by arm.
    """
    level_rows = at_level(rows, level.name)
    has_slices = level.kind in ("switchback", "capacity")
    if plan.schedule_version > 1 and has_slices:
        level_rows = without_late_sets(plan, level, level_rows)
    latencies = {
        metric: latencies_us(level, metric, level_rows)
        for metric in measured_metrics(plan, level, level_rows)
    }
    if plan.schedule_version > 1 and has_slices:
        return list(_slice_lines(plan, level, restart, positions, level_rows, latencies))
    second_reference = plan.indices("reference")[-1]
    of_delayed = dict.fromkeys(plan.indices("delayed"), positions[second_reference])
    all_positions = {**positions, **of_delayed}
    if level.kind == "capacity":
        return list(_capacity_lines(plan, level, restart, all_positions, level_rows))
    lines = _block_lines(plan, level, restart, all_positions, level_rows, latencies)
    if plan.schedule_version > 1 and level.kind != "repeat":
        lines += _delay_lines(plan, level, restart, positions, level_rows, latencies)
        if level.kind == "mixed":
            lines += _busy_lines(plan, level, restart, np.array([busy_share(level_rows)]))
    if level.tuples:
        lines.append(_drift_line(plan, level, restart, positions, level_rows, latencies))
    return lines


def _block_lines(
    plan: Plan,
    level: Level,
    restart: int,
    positions: Mapping[int, int],
    level_rows: Mapping[str, Any],
    latencies: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the lines of each kind of block; in schedule 2, control blocks have `_delay_lines`."""
    if level.kind == "switchback":
        blocks = {"plain": level_rows["slice_id"] >= PLAIN}
    else:
        kinds = REPEAT_BLOCKS if level.kind == "repeat" else BLOCKS
        blocks = {
            name: level_rows["slice_id"] == kind
            for name, kind in kinds.items()
            if plan.schedule_version == 1 or name != "control"
        }
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
    return lines


def _delay_lines(
    plan: Plan,
    level: Level,
    restart: int,
    positions: Mapping[int, int],
    rows: Mapping[str, Any],
    latencies: Mapping[str, Any],
) -> Iterable[dict[str, Any]]:
    """Yield the delayed arm's log ratio to the other copies in its control blocks.

    Each copy is delayed in a quarter of the control blocks and compared there with the others; the
    mean over the copies cancels every difference between them.
    """
    is_control = rows["slice_id"] == CONTROL
    for delayed in plan.indices("delayed"):
        is_delayed = is_control & (rows["arm"] == plan.arms[delayed].name)
        for metric, values in latencies.items():
            ratios: dict[str, list[float]] = {"p50": [], "mean": []}
            for copy in plan.claimed_arms:
                slowed = is_delayed & (rows["load_position"] == positions[copy])
                if not slowed.any():  # Its turn is in another restart.
                    continue
                in_blocks = is_control & np.isin(rows["block_id"], rows["block_id"][slowed])
                others = [
                    values[in_blocks & (rows["arm"] == plan.arms[other].name)]
                    for other in plan.claimed_arms
                    if other != copy
                ]
                for name, of_ratios in ratios.items():
                    log_of_others = float(np.mean([_log_statistic(name, each) for each in others]))
                    of_ratios.append(_log_statistic(name, values[slowed]) - log_of_others)
            for name, of_ratios in ratios.items():
                yield _line(
                    level,
                    (DELAY, metric, name),
                    restart,
                    plan.arms[delayed].name,
                    NO_POSITION,
                    int(is_delayed.sum()),
                    math.exp(float(np.mean(of_ratios))),
                )


def _log_statistic(name: str, values: npt.NDArray[np.float64]) -> float:
    return math.log(np.median(values) if name == "p50" else values.mean())


def _slice_lines(
    plan: Plan,
    level: Level,
    restart: int,
    positions: Mapping[int, int],
    rows: Mapping[str, Any],
    latencies: Mapping[str, Any],
) -> Iterable[dict[str, Any]]:
    """Yield the lines of a level of slices: means over slices, tails over all of an arm's."""
    slices = read_slices(plan, level, positions, rows, latencies)
    for arm in plan.claimed_arms:
        is_arm = rows["arm"] == plan.arms[arm].name
        name, count = plan.arms[arm].name, int(is_arm.sum())
        for key, logs in slices.logs.items():
            value = math.exp(float(logs[slices.arm == arm].mean()))
            yield _line(level, ("plain", *key), restart, name, positions[arm], count, value)
        if level.kind == "capacity":
            continue
        for metric, values in latencies.items():
            for statistic, us in tails(values[is_arm]).items():
                key = (metric, statistic)
                yield _line(level, ("plain", *key), restart, name, positions[arm], count, us)
    for delayed in plan.indices("delayed"):
        name = plan.arms[delayed].name
        count = int((rows["arm"] == name).sum())
        for key in slices.logs:
            value = math.exp(slices.delay(key, delayed))
            yield _line(level, (DELAY, *key), restart, name, NO_POSITION, count, value)
    if level.kind == "switchback":
        yield from _busy_lines(plan, level, restart, slices.busy_shares)


def _busy_lines(plan: Plan, level: Level, restart: int, shares: Matrix) -> Iterable[dict[str, Any]]:
    """Yield the busy share of the slices under the first reference's name; none if unknown."""
    if np.isnan(shares).any():
        return
    arm = plan.arms[plan.indices("reference")[0]].name
    for name, statistic in OF_SLICES.items():
        key = ("plain", BUSY_SHARE, name)
        yield _line(level, key, restart, arm, NO_POSITION, len(shares), statistic(shares))


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
    begin = rows["sent_ns"] if level.kind in ONE_IN_FLIGHT else rows["scheduled_ns"]
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
    busy_shares = np.full((len(restarts), len(OF_SLICES)), np.nan)
    logs: dict[Key, Matrix] = {}
    delays: dict[tuple[str, str], Matrix] = {}
    for line in level_lines:
        row, column = rows[int(line["restart"])], columns[line["arm"]]
        if line["statistic"] == DRIFT:
            drift[row] = float(line["log"])
            continue
        if line["metric"] == BUSY_SHARE:
            column = list(OF_SLICES).index(line["statistic"])
            busy_shares[row, column] = math.exp(float(line["log"]))
            continue
        if line["block"] == DELAY:
            statistic = (line["metric"], line["statistic"])
            delays.setdefault(statistic, np.full(len(restarts), np.nan))[row] = float(line["log"])
            continue
        positions[row, column] = int(line["load_position"])
        key = (line["block"], line["metric"], line["statistic"])
        logs.setdefault(key, np.full(shape, np.nan))[row, column] = float(line["log"])
    return Readings(
        restarts,
        positions,
        logs,
        drift[~np.isnan(drift)],
        delays,
        busy_shares[~np.isnan(busy_shares).any(axis=1)],
    )


def claimable(level: Level) -> list[tuple[str, str]]:
    """Return (metric, statistic) of everything that can be claimed at a level."""
    return [(metric, name) for metric, names in CLAIMABLE[level.kind].items() for name in names]
