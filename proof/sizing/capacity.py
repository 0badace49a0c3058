"""
The capacity of the reference alone, of which a plan's arrival rates are percentages.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from command import Unavailable
from proof.evidence.readings import read_restart
from proof.evidence.store import read_columns
from proof.measuring.launch import last_line
from proof.measuring.servers import generate, serve_arms
from proof.plans.plan import measuring_capacity
from proof.plans.plan_file import read_plan
from proof.plans.restart import RestartSpec
from proof.plans.schedule import load_order, load_positions


def capacity_per_s(path: Path, slice_s: float) -> float:
    """Measure the texts per second of a plan's reference in a closed loop.

    `slice_s` is the duration of one slice of one arm in seconds. Starts servers of its own. Raise
    Unavailable if they do not answer.
    """
    plan = measuring_capacity(read_plan(path), slice_s)
    [level] = plan.levels
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows, log = folder / "rows.csv", folder / "run.log"
        with serve_arms(plan, load_order(plan, 0), log) as served:
            spec = RestartSpec(
                plan=plan.path,
                texts=plan.texts,
                run=f"capacity-{plan.digest[:16]}",
                addresses=served.addresses,
                capacity_s=slice_s,
            )
            generate(plan, {level.name: None}, spec, rows, log)
        columns = read_columns(rows)
        if not len(columns["status"]) or (columns["status"] != 200).any():
            raise Unavailable(f"The arms did not answer: {last_line(log)}")
        lines = read_restart(plan, level, 0, load_positions(plan, 0), columns)
    references = [plan.arms[i].name for i in plan.indices("reference")]
    us_per_text = [float(line["microseconds"]) for line in lines if line["arm"] in references]
    return 1e6 / float(np.mean(us_per_text))
