"""
Slices: the numbers of each slice of requests to one arm, and what a restart's slices say together.

A machine's speed changes within a second. The slices of a set follow each other and replay the same
requests, so they are compared slice by slice: a restart's number is the mean over its slices of the
log statistic. The tails, p95 and p99, need more requests than a slice has and are taken over all
slices of an arm.

*Dilation* is wall time over CPU time of inference, of all batches of a slice. It is larger while
other processes or guests of the host take the processor, and it explains most of a slice's noise:

    adjusted log latency = log latency − β · log dilation

Where the generator was kept from sending in time, the whole set is left out, for all arms alike.

β is the pilot's and fixed before the run. A wrong β adds noise and no bias, as long as the dilation
does not depend on the arm; that is claimed along with it (CLAIMABLE in proof/plans/plan.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from proof.evidence.statistics import summarize_latencies
from proof.plans.plan import ADJUSTED, DILATION, MEAN_OF_SLICES, Level, Plan

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MOST_SEND_LAG = 0.05
"""Largest mean delay between schedule and sending, as a share of the mean latency."""
TAILS = ("p95", "p99")
"""Statistics that are taken over all slices of an arm."""


@dataclass(frozen=True)
class Slices:
    """The slices of one level of one restart, in the order of sending."""

    arm: Integers
    """(n,) index of each slice's arm."""
    copy: Integers
    """(n,) index of the arm whose loaded copy answered."""
    set_number: Integers
    """(n,) set of each slice: one slice for each arm, with the same requests."""
    logs: Mapping[tuple[str, str], Floats]
    """(n,) log of each (metric, statistic) of MEAN_OF_SLICES, latencies in microseconds."""
    busy_shares: Floats
    """(n,) share of the slice in which the engine was busy; NaN if batches are not known."""

    def table(self, key: tuple[str, str], arms: list[int]) -> Floats:
        """Return the log of one statistic as (sets, arms)."""
        # Slices are in the order of their sets, and each set has one of each arm.
        return np.stack([self.logs[key][self.arm == arm] for arm in arms], axis=1)

    def delay(self, key: tuple[str, str], delayed: int) -> float:
        """Return the mean log ratio of the delayed slices and their copies' own, set by set."""
        own = {
            (int(number), int(arm)): value
            for number, arm, value in zip(
                self.set_number, self.arm, self.logs[key].tolist(), strict=True
            )
        }
        is_delayed = np.flatnonzero(self.arm == delayed)
        ratios = [
            self.logs[key][i] - own[int(self.set_number[i]), int(self.copy[i])] for i in is_delayed
        ]
        return float(np.mean(ratios))


def read_slices(
    plan: Plan,
    level: Level,
    positions: Mapping[int, int],
    rows: Mapping[str, Any],
    latencies: Mapping[str, Floats],
) -> Slices:
    """Return the slices of a level.

    `positions` are the load positions of the copies, `latencies` microseconds of each row by
    metric; `time_per_text` is computed here, from each slice's duration.
    """
    slice_ids = rows["slice_id"]
    sent = np.unique(slice_ids)
    count = len(sent)
    names = np.array([arm.name for arm in plan.arms])
    copies_by_position = {position: arm for arm, position in positions.items()}
    arm, copy = np.zeros(count, np.int64), np.zeros(count, np.int64)
    busy_shares = np.full(count, np.nan)
    metrics = list(latencies) + (["time_per_text"] if level.kind == "capacity" else [])
    logs = {(metric, name): np.zeros(count) for metric in metrics for name in MEAN_OF_SLICES}
    adjusted = level.betas.get(ADJUSTED, {})
    knows_batches = bool((rows["batch_id"] >= 0).all())
    knows_dilation = knows_batches and "inference_cpu" in latencies
    if knows_dilation:
        logs[DILATION, "mean"] = np.zeros(count)
        logs |= {(ADJUSTED, name): np.zeros(count) for name in adjusted}
    order = np.argsort(slice_ids, kind="stable")
    begins = [*np.searchsorted(slice_ids[order], sent), len(order)]
    for i in range(count):
        chosen = order[begins[i] : begins[i + 1]]
        arm[i] = int(np.flatnonzero(names == rows["arm"][chosen[0]])[0])
        copy[i] = copies_by_position[int(rows["load_position"][chosen[0]])]
        for metric, us in latencies.items():
            values = us[chosen]
            logs[metric, "p50"][i] = np.log(np.median(values))
            logs[metric, "mean"][i] = np.log(values.mean())
        duration_ns = rows["done_ns"][chosen].max() - rows["scheduled_ns"][chosen].min()
        if level.kind == "capacity":
            logs["time_per_text", "mean"][i] = np.log(duration_ns / 1000 / len(chosen))
        if not knows_batches:
            continue
        batches = _first_of_batches(rows["batch_id"][chosen])
        inference_us = latencies["inference"][chosen][batches].sum()
        busy_shares[i] = 1000 * inference_us / duration_ns
        if knows_dilation:
            z = np.log(inference_us / latencies["inference_cpu"][chosen][batches].sum())
            logs[DILATION, "mean"][i] = z
            for name, beta in adjusted.items():
                logs[ADJUSTED, name][i] = logs["end_to_end", name][i] - beta * z
    if level.kind == "capacity":
        logs = {("time_per_text", "mean"): logs["time_per_text", "mean"]}
    return Slices(arm, copy, _sets(plan, sent), logs, busy_shares)


def is_punctual(plan: Plan, rows: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """Return for each row of a level `switchback` whether its whole set was sent in time."""
    slice_ids = rows["slice_id"]
    sets = _sets(plan, slice_ids)
    lag = np.bincount(slice_ids, rows["sent_ns"] - rows["scheduled_ns"])
    latency = np.bincount(slice_ids, rows["done_ns"] - rows["sent_ns"])
    late_sets = _sets(plan, np.flatnonzero(lag > MOST_SEND_LAG * latency))
    return ~np.isin(sets, late_sets)


def count_sets(plan: Plan, slice_ids: Integers) -> int:
    """Return in how many sets these slices are."""
    return len(np.unique(_sets(plan, slice_ids)))


def _sets(plan: Plan, slice_ids: Integers) -> Integers:
    """Return the set of each slice: one slice for each copy and one for each delayed arm."""
    return slice_ids // (len(plan.claimed_arms) + len(plan.indices("delayed")))


def without_late_sets(plan: Plan, level: Level, rows: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of a level of slices without the sets that were sent late."""
    if level.kind != "switchback":
        return rows
    punctual = is_punctual(plan, rows)
    return {name: values[punctual] for name, values in rows.items()}


def _first_of_batches(batch_ids: Integers) -> Integers:
    """Return the index of one row of each batch."""
    return np.unique(batch_ids, return_index=True)[1]


def tails(latencies: Floats) -> dict[str, float]:
    """Return p95 and p99 of all of an arm's latencies at a level."""
    summary = summarize_latencies(latencies)
    return {name: summary[name] for name in TAILS}


def busy_share(rows: Mapping[str, Any]) -> float:
    """Return the share of time in which the engine was busy with these rows; NaN if not known."""
    if (rows["batch_id"] < 0).any():  # The server does not number its batches.
        return math.nan
    batches = _first_of_batches(rows["batch_id"])
    duration_ns = rows["done_ns"].max() - rows["scheduled_ns"].min()
    return float(1000 * rows["inference_us"][batches].sum() / duration_ns)
