"""
Readings: the few numbers of each restart that a verdict rests on.

    rows of a restart → read_restart → restarts.csv (a line for each number)
        → collect_readings → Readings (an array for each statistic)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    part = _LevelOfRestart(plan, level, restart, positions, level_rows, latencies)
    if plan.schedule_version > 1 and has_slices:
        return list(part.slice_lines())
    second_reference = plan.indices("reference")[-1]
    of_delayed = dict.fromkeys(plan.indices("delayed"), positions[second_reference])
    with_delayed = replace(part, positions={**positions, **of_delayed})
    if level.kind == "capacity":
        return list(with_delayed.capacity_lines())
    lines = list(with_delayed.block_lines())
    if plan.schedule_version > 1 and level.kind != "repeat":
        lines += part.delay_lines()
        if level.kind == "mixed":
            lines += part.busy_lines(np.array([busy_share(level_rows)]))
    if level.tuples:
        lines.append(part.drift_line())
    return lines


@dataclass(frozen=True)
class _LevelOfRestart:
    """The rows of one level of one restart, and the lines of restarts.csv that follow from them."""

    plan: Plan
    level: Level
    restart: int
    positions: Mapping[int, int]
    """Load positions by arm."""
    rows: Mapping[str, Any]
    latencies: Mapping[str, Any]
    """(n,) microseconds of each row, by metric."""

    def block_lines(self) -> Iterable[dict[str, Any]]:
        """Yield the lines of each kind of block; `delay_lines` has control blocks of schedule 2."""
        slice_ids = self.rows["slice_id"]
        if self.level.kind == "switchback":
            blocks = {"plain": slice_ids >= PLAIN}
        else:
            kinds = REPEAT_BLOCKS if self.level.kind == "repeat" else BLOCKS
            blocks = {
                name: slice_ids == kind
                for name, kind in kinds.items()
                if self.plan.schedule_version == 1 or name != "control"
            }
        for block, is_block in blocks.items():
            for a, arm in enumerate(self.plan.arms):
                chosen = is_block & self._is_arm(a)
                count = int(chosen.sum())
                if not count:
                    continue
                for metric, values in self.latencies.items():
                    for name, us in summarize_latencies(values[chosen]).items():
                        yield self._line(
                            (block, metric, name), arm.name, self.positions[a], count, us
                        )

    def delay_lines(self) -> Iterable[dict[str, Any]]:
        """Yield the delayed arm's log ratio to the other copies in its control blocks.

        Each copy is delayed in a quarter of the control blocks and compared there with the others;
        the mean over the copies cancels every difference between them.
        """
        is_control = self.rows["slice_id"] == CONTROL
        for delayed in self.plan.indices("delayed"):
            is_delayed = is_control & self._is_arm(delayed)
            name, count = self.plan.arms[delayed].name, int(is_delayed.sum())
            for metric, values in self.latencies.items():
                for statistic, ratios in self._delays(is_control, is_delayed, values).items():
                    value = math.exp(float(np.mean(ratios)))
                    yield self._line((DELAY, metric, statistic), name, NO_POSITION, count, value)

    def _delays(self, is_control: Any, is_delayed: Any, values: Any) -> dict[str, list[float]]:
        """Return, by statistic, the log ratio of each copy that is delayed to the others."""
        ratios: dict[str, list[float]] = {"p50": [], "mean": []}
        for copy in self.plan.claimed_arms:
            slowed = is_delayed & (self.rows["load_position"] == self.positions[copy])
            if not slowed.any():  # Its turn is in another restart.
                continue
            block_ids = self.rows["block_id"]
            in_blocks = is_control & np.isin(block_ids, block_ids[slowed])
            others = [
                values[in_blocks & self._is_arm(other)]
                for other in self.plan.claimed_arms
                if other != copy
            ]
            for name, of_ratios in ratios.items():
                log_of_others = float(np.mean([_log_statistic(name, each) for each in others]))
                of_ratios.append(_log_statistic(name, values[slowed]) - log_of_others)
        return ratios

    def slice_lines(self) -> Iterable[dict[str, Any]]:
        """Yield the lines of a level of slices: means over slices, tails over all of an arm's."""
        slices = read_slices(self.plan, self.level, self.positions, self.rows, self.latencies)
        for arm in self.plan.claimed_arms:
            is_arm, position = self._is_arm(arm), self.positions[arm]
            name, count = self.plan.arms[arm].name, int(is_arm.sum())
            for key, logs in slices.logs.items():
                value = math.exp(float(logs[slices.arm == arm].mean()))
                yield self._line(("plain", *key), name, position, count, value)
            if self.level.kind == "capacity":
                continue
            for metric, values in self.latencies.items():
                for statistic, us in tails(values[is_arm]).items():
                    yield self._line(("plain", metric, statistic), name, position, count, us)
        for delayed in self.plan.indices("delayed"):
            name, count = self.plan.arms[delayed].name, int(self._is_arm(delayed).sum())
            for key in slices.logs:
                value = math.exp(slices.delay(key, delayed))
                yield self._line((DELAY, *key), name, NO_POSITION, count, value)
        if self.level.kind == "switchback":
            yield from self.busy_lines(slices.busy_shares)

    def busy_lines(self, shares: Matrix) -> Iterable[dict[str, Any]]:
        """Yield the busy share of the slices under the first reference's name; none if unknown."""
        if np.isnan(shares).any():
            return
        arm = self.plan.arms[self.plan.indices("reference")[0]].name
        for name, statistic in OF_SLICES.items():
            key = ("plain", BUSY_SHARE, name)
            yield self._line(key, arm, NO_POSITION, len(shares), statistic(shares))

    def drift_line(self) -> dict[str, Any]:
        """Return how far the ratio of both references changed from the first to the last block."""
        first, second = self.plan.indices("reference")
        metric = "inference" if "inference" in self.latencies else "end_to_end"
        is_plain = self.rows["slice_id"] == PLAIN
        first_us, second_us = (
            self.latencies[metric][is_plain & self._is_arm(a)] for a in (first, second)
        )
        change = slope(np.log(second_us) - np.log(first_us))
        name, position = self.plan.arms[second].name, self.positions[second]
        key = ("plain", metric, DRIFT)
        return self._line(key, name, position, len(first_us), math.exp(change))

    def capacity_lines(self) -> Iterable[dict[str, Any]]:
        """Yield the time per text of each arm, over all of its slices."""
        for a, arm in enumerate(self.plan.arms):
            is_arm = self._is_arm(a)
            count = int(is_arm.sum())
            if not count:
                continue
            duration_ns = 0
            for slice_id in np.unique(self.rows["slice_id"][is_arm]):
                in_slice = is_arm & (self.rows["slice_id"] == slice_id)
                done, sent = (self.rows[name][in_slice] for name in ("done_ns", "sent_ns"))
                duration_ns += int(done.max() - sent.min())
            us = duration_ns / 1000 / count
            key = ("plain", "time_per_text", "mean")
            yield self._line(key, arm.name, self.positions[a], count, us)

    def _is_arm(self, arm: int) -> Any:
        """Return which rows are an arm's."""
        return self.rows["arm"] == self.plan.arms[arm].name

    def _line(
        self, key: Key, arm: str, position: int, requests: int, value: float
    ) -> dict[str, Any]:
        block, metric, name = key
        return {
            "level": self.level.name,
            "block": block,
            "restart": self.restart,
            "arm": arm,
            "load_position": position,
            "metric": metric,
            "statistic": name,
            "requests": requests,
            "microseconds": repr(value),
            "log": repr(math.log(value)),
        }


def _log_statistic(name: str, values: npt.NDArray[np.float64]) -> float:
    return math.log(np.median(values) if name == "p50" else values.mean())


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
