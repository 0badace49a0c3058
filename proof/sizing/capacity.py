"""
The capacity of the reference alone, and the arrival rates that keep its engine busy for a share of
the time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from command import BadInput, Unavailable
from proof.evidence.readings import read_restart
from proof.evidence.slices import busy_share
from proof.evidence.store import at_level, read_columns
from proof.measuring.launch import last_line
from proof.measuring.servers import generate, serve_arms
from proof.plans.plan import Kind, Plan, measuring_busy_share, measuring_capacity
from proof.plans.plan_file import read_plan
from proof.plans.restart import RestartSpec
from proof.plans.schedule import build_schedule, load_order, load_positions

PROBED = (0.1, 0.2, 0.3, 0.4, 0.55, 0.75)
"""Arrival rates at which busy shares are measured, as parts of the capacity."""


def capacity_per_s(path: Path, slice_s: float) -> float:
    """Measure the texts per second of a plan's reference in a closed loop.

    `slice_s` is the duration of one slice of one arm in seconds. Starts servers of its own. Raise
    Unavailable if they do not answer.
    """
    plan = measuring_capacity(read_plan(path, is_template=True), slice_s)
    [level] = plan.levels
    columns = _measure(plan, {level.name: None}, RestartSpec(plan=plan.path, capacity_s=slice_s))
    lines = read_restart(plan, level, 0, load_positions(plan, 0), columns)
    references = [plan.arms[i].name for i in plan.indices("reference")]
    us_per_text = [
        float(line["microseconds"])
        for line in lines
        if line["arm"] in references and line["metric"] == "time_per_text"
    ]
    return 1e6 / float(np.mean(us_per_text))


def arrival_rates(path: Path, capacity: float, seconds: float) -> dict[str, float]:
    """Measure the arrivals per second at which each level of a plan has its busy share.

    Only for levels under Poisson load of plans with schedule 2. `capacity` are texts per second,
    `seconds` the duration of each measured rate. Starts servers of its own. Raise BadInput if no
    rate keeps the engine as busy as asked.
    """
    plan = read_plan(path, is_template=True)
    found: dict[str, float] = {}
    if plan.schedule_version == 1:
        return found
    kinds: dict[Kind, dict[str, int]] = {}
    for level in plan.levels:
        if level.percent:
            kinds.setdefault(level.kind, {})[level.name] = level.percent
    for kind, levels in kinds.items():
        rates = [part * capacity for part in PROBED]
        shares = _busy_shares(plan, kind, rates, seconds)
        for name, percent in levels.items():
            found[name] = _rate_of(percent / 100, rates, shares, name)
    return {level.name: found[level.name] for level in plan.levels if level.name in found}


def _busy_shares(plan: Plan, kind: Kind, rates: Sequence[float], seconds: float) -> list[float]:
    """Return the busy share at each rate: the median over slices, or that of the level `mixed`."""
    probing = measuring_busy_share(plan, kind, rates, seconds)
    texts = len(plan.read_texts())
    expected = {
        level.name: len(build_schedule(probing, level, 0, texts)) for level in probing.levels
    }
    spec = RestartSpec(
        plan=plan.path, probe_kind=kind, probe_rates_per_s=tuple(rates), capacity_s=seconds
    )
    columns = _measure(probing, expected, spec)
    shares = []
    for level in probing.levels:
        rows = at_level(columns, level.name)
        groups = [rows["slice_id"] == i for i in np.unique(rows["slice_id"])]
        if kind == "mixed":
            groups = [np.ones(len(rows["slice_id"]), bool)]
        of_groups = [
            busy_share({name: rows[name][group] for name in BUSY_COLUMNS}) for group in groups
        ]
        shares.append(float(np.median(of_groups)))
    return shares


BUSY_COLUMNS = ("batch_id", "done_ns", "scheduled_ns", "inference_us")


def _rate_of(share: float, rates: Sequence[float], shares: Sequence[float], level: str) -> float:
    """Return the rate with a busy share, between the measured ones."""
    rising = np.maximum.accumulate(shares)
    if not rising[0] <= share <= rising[-1]:
        raise BadInput(
            f"No rate keeps the engine busy for {share:.0%} at level {level}: from"
            f" {rates[0]:.3g} to {rates[-1]:.3g} per second it was busy for {rising[0]:.0%} to"
            f" {rising[-1]:.0%}."
        )
    return float(np.interp(share, rising, rates))


def _measure(plan: Plan, expected: Mapping[str, int | None], spec: RestartSpec) -> dict[str, Any]:
    """Start servers, send what `spec` says and return the columns of the rows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows, log = folder / "rows.csv", folder / "run.log"
        with serve_arms(plan, load_order(plan, 0), log) as served:
            spec = spec.model_copy(
                update={
                    "texts": plan.texts,
                    "run": f"capacity-{plan.digest[:16]}",
                    "addresses": served.addresses,
                }
            )
            generate(plan, expected, spec, rows, log)
        columns = read_columns(rows)
        if not len(columns["status"]) or (columns["status"] != 200).any():
            raise Unavailable(f"The arms did not answer: {last_line(log)}")
    return columns
