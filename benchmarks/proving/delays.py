"""
Does the proof detect delays from outside? One model on both sides, and a proxy that slows one side.

    drbert-prove plan evidence/<A/A run> --template benchmarks/plans/delays.toml --out PLAN
    python -m benchmarks delays PLAN --out benchmarks/delays.md

The plan is run once for every share. The verdict must be `equivalent` without a delay, and must not
be for a delay of the margin or more.
"""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import pages
from benchmarks.harness.proxy import ProxyStats, proxy
from command import BadInput, Parser
from proof.evidence.store import Requests
from proof.measuring.run import run_plan
from proof.measuring.servers import pinned_cpus
from proof.plans.plan import Arm, Level, Plan
from proof.plans.plan_file import read_plan, to_toml
from proof.verdict.schema import Verdict, format_percent, metric_label

SHARES = (0.0, 0.01, 0.02, 0.03, 0.06)


@dataclass(frozen=True)
class Outcome:
    """The verdict on one run with a delay."""

    share: float
    """Delay that was added, as a share of each answer's own time."""
    true_ratio: float
    """Ratio of the mean end-to-end times: the proxy's own clock tells how much it added."""
    verdict: Verdict


def main(arguments: Sequence[str]) -> int:
    """Run the plan with every delay; return 65 if a verdict is not as it must be."""
    parser = Parser(
        prog="python -m benchmarks delays",
        description="Add delays of known size from outside and judge them.",
    )
    parser.add_argument(
        "plan", type=Path, help="plan whose arms are all one artifact, and claim end to end"
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=SHARES,
        help="delays of the candidates, as shares (default: 0 0.01 0.02 0.03 0.06)",
    )
    parser.add_argument(
        "--evidence", type=Path, default=Path("evidence"), help="folder of runs (default: evidence)"
    )
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file too")
    options = parser.parse_args(arguments)
    plan = read_plan(options.plan)
    outcomes = []
    for share in options.shares:
        outcomes.append(outcome := measure(plan, share, options.evidence))
        print(
            f"delay {share:.0%}: {outcome.verdict.verdict}. {outcome.verdict.sentence}", flush=True
        )
    text = table(plan, outcomes)
    print(text)
    if options.out is not None:
        command = shlex.join(["python", "-m", "benchmarks", "delays", *arguments])
        pages.write(options.out, "Delays from outside", command, text)
    return 0 if holds(plan, outcomes) else BadInput.exit_code


def measure(plan: Plan, share: float, evidence: Path) -> Outcome:
    """Run the plan with every request through a proxy; the candidates' proxy adds `share`."""
    # The proxies are threads of this process: on the generator's CPUs, not on the server's.
    cpus = pinned_cpus(plan)[1]
    # The ports are always the same, because the plan's digest includes them: a second run of it
    # must count as the same plan.
    ports = {"reference": plan.port + 1, "candidate": plan.port + 2}
    with (
        proxy(plan.port, 0.0, cpus, ports["reference"]),
        proxy(plan.port, share, cpus, ports["candidate"]) as (_, stats),
        tempfile.TemporaryDirectory() as temporary,
    ):
        arms = tuple(_through(arm, ports) for arm in plan.arms)
        path = Path(temporary) / "plan.toml"
        # The pilot sized the original plan; each share is a plan of its own. The proxy delays
        # answers, which no queue multiplies, so margins have no gain.
        levels = tuple(dataclasses.replace(level, gains={}) for level in plan.levels)
        changed = dataclasses.replace(
            plan, name=f"{plan.name}-{share:g}", arms=arms, levels=levels, pilot=None
        )
        path.write_text(
            to_toml(changed, f"{plan.name} with the candidates {share:.0%} slower, by a proxy.")
        )
        folder, verdict = run_plan(path, evidence)
    return Outcome(share, _true_ratio(plan, folder, stats), verdict)


def _through(arm: Arm, ports: dict[str, int]) -> Arm:
    """Return the arm with the address of its role's proxy, if it has one."""
    if arm.role not in ports:
        return arm
    return dataclasses.replace(arm, url=f"http://127.0.0.1:{ports[arm.role]}")


def _true_ratio(plan: Plan, folder: Path, stats: ProxyStats) -> float:
    names = [plan.arms[i].name for i in plan.indices("candidate")]
    took = np.concatenate(
        [
            (rows["done_ns"] - rows["sent_ns"])[rows["arm"].isin(names)]
            for _, rows in Requests(folder)
        ]
    )
    added = stats.added_ns / stats.requests
    return 1 + added / (float(took.mean()) - added)


def holds(plan: Plan, outcomes: Sequence[Outcome]) -> bool:
    """Return whether no delay is equivalent and no delay of the margin or more is."""
    for level in plan.judged_levels:
        for outcome in outcomes:
            verdict = outcome.verdict.levels[level.name].verdict
            if outcome.share == 0 and verdict != "equivalent":
                return False
            slow = outcome.share >= level.tightest_margin
            if slow and verdict not in ("not-equivalent", "inconclusive"):
                return False
    return True


def table(plan: Plan, outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table of the outcomes for each level, with a sentence before it."""
    tables = [
        (
            f"One model on both sides, {plan.restarts} restarts. A proxy adds a share of each"
            " answer's own time to one side."
        )
    ]
    for level in plan.judged_levels:
        tables.append("\n".join(_level_table(level, outcomes)))
    return "\n\n".join(tables)


def _level_table(level: Level, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the lines of one level's table."""
    claimed = [(metric, name) for metric, name, _ in level.claimed]
    size = (
        f"{level.tuples} blocks"
        if level.tuples
        else f"{level.sets} sets of slices of {level.slice_requests}"
    )
    titles = [f"{metric_label(metric)} {name}" for metric, name in claimed]
    yield f"Level {level.name}, {size} in a restart, margins of {level.tightest_margin:.0%}:"
    yield ""
    yield f"| added | true ratio of means | {' | '.join(titles)} | verdict |"
    yield "|--:|--:|" + "--:|" * len(claimed) + "---|"
    for outcome in outcomes:
        verdict = outcome.verdict.levels[level.name]
        cells = []
        for estimate in verdict.statistics:
            low, high = (format_percent(bound) for bound in estimate.interval)
            cells.append(f"{format_percent(estimate.ratio)} ({low} to {high})")
        cells = cells or [""] * len(claimed)
        yield (
            f"| {outcome.share:.0%} | {format_percent(outcome.true_ratio)} | {' | '.join(cells)} |"
            f" {verdict.verdict} |"
        )
