"""
Are delays from outside read as what they are? One model on both sides, a proxy that slows one side
down.

    python -m proof plan evidence/<A/A run> --template benchmarks/plans/delays.toml --out PLAN
    python -m benchmarks delays PLAN --out benchmarks/delays.md

A run of the plan for every share; `equivalent` is due without a delay, and never from the margin
on.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import pages
from benchmarks.harness.proxy import Passed, proxy
from command import BadInput, Parser
from proof.evidence.store import Requests
from proof.measuring.run import run_plan
from proof.measuring.servers import pinned_cpus
from proof.plans.plan import Arm, Plan
from proof.plans.plan_file import read_plan, to_toml
from proof.verdict.schema import Verdict, percent

SHARES = (0.0, 0.01, 0.02, 0.03, 0.05)


@dataclass(frozen=True)
class Outcome:
    share: float
    true_ratio: float
    """Of the mean end to end: what the proxy added, by its own clock, in the time the client saw.
    """
    verdict: Verdict


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks delays",
        description="Add delays of known size from outside and see how they are read.",
    )
    parser.add_argument(
        "plan", type=Path, help="a plan whose arms are all one artifact, at the level unloaded"
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=SHARES,
        help="how much longer the candidates take (default: 0 0.01 0.02 0.03 0.05)",
    )
    parser.add_argument(
        "--evidence", type=Path, default=Path("evidence"), help="where runs go (default: evidence)"
    )
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file too")
    given = parser.parse_args(arguments)
    plan = read_plan(given.plan)
    outcomes = []
    for share in given.shares:
        outcomes.append(outcome := measure(plan, share, given.evidence))
        print(
            f"delay {share:.0%}: {outcome.verdict.verdict}. {outcome.verdict.sentence}", flush=True
        )
    text = table(plan, outcomes)
    print(text)
    if given.out is not None:
        pages.write(given.out, "delays", arguments, text)
    return 0 if holds(plan, outcomes) else BadInput.exit_code


def measure(plan: Plan, share: float, evidence: Path) -> Outcome:
    """One run of the plan with every request through a proxy, the candidates' through one that adds
    `share`.
    """
    # The proxies live in this process: beside the generator, not beside the server.
    cpus = pinned_cpus(plan)[1]
    # Ports of their own, always the same: a plan's digest knows them, and a second run of it is to
    # be counted as one.
    ports = {"reference": plan.port + 1, "candidate": plan.port + 2}
    with (
        proxy(plan.port, 0.0, cpus, ports["reference"]),
        proxy(plan.port, share, cpus, ports["candidate"]) as (_, passed),
        tempfile.TemporaryDirectory() as temporary,
    ):
        arms = tuple(_through(arm, ports) for arm in plan.arms)
        path = Path(temporary) / "plan.toml"
        # Sized by the pilot, but not the plan that was sized: each share is a plan of its own.
        changed = dataclasses.replace(plan, name=f"{plan.name}-{share:g}", arms=arms, pilot=None)
        path.write_text(
            to_toml(changed, f"{plan.name} with the candidates {share:.0%} slower, by a proxy.")
        )
        folder, verdict = run_plan(path, evidence)
    return Outcome(share, _true_ratio(plan, folder, passed), verdict)


def _through(arm: Arm, ports: dict[str, int]) -> Arm:
    return (
        dataclasses.replace(arm, url=f"http://127.0.0.1:{ports[arm.role]}")
        if arm.role in ports
        else arm
    )


def _true_ratio(plan: Plan, folder: Path, passed: Passed) -> float:
    names = [plan.arms[i].name for i in plan.indices("candidate")]
    took = np.concatenate(
        [
            (rows["done_ns"] - rows["sent_ns"])[rows["arm"].isin(names)]
            for _, rows in Requests(folder)
        ]
    )
    added = passed.added_ns / passed.requests
    return 1 + added / (float(took.mean()) - added)


def holds(plan: Plan, outcomes: Sequence[Outcome]) -> bool:
    """No delay is equivalent; a delay of the margin or more never is."""
    margin = plan.levels[0].tightest_margin
    return all(
        (
            (o.verdict.verdict == "equivalent")
            if o.share == 0
            else (o.verdict.verdict in ("not-equivalent", "inconclusive") or o.share < margin)
        )
        for o in outcomes
    )


def table(plan: Plan, outcomes: Sequence[Outcome]) -> str:
    level = plan.levels[0]
    claimed = [(m, s) for m, s, _ in level.claimed]
    lines = [
        (
            f"One model on both sides, {plan.restarts} restarts × {level.tuples} tuples, margins of"
            f" {level.tightest_margin:.0%}; a proxy adds a share of each answer's own time to one"
            " side."
        ),
        "",
        "| added | true ratio of means | "
        + " | ".join(f"{m.replace('_', ' ')} {s}" for m, s in claimed)
        + " | verdict |",
        "|--:|--:|" + "--:|" * len(claimed) + "---|",
    ]
    for outcome in outcomes:
        found = {(i.metric, i.statistic): i for i in outcome.verdict.levels[level.name].statistics}
        cells = [
            (
                f"{percent(found[key].ratio)} ({percent(found[key].interval[0])} to"
                f" {percent(found[key].interval[1])})"
                if key in found
                else ""
            )
            for key in claimed
        ]
        lines.append(
            f"| {outcome.share:.0%} | {percent(outcome.true_ratio)} | {' | '.join(cells)} |"
            f" {outcome.verdict.verdict} |"
        )
    return "\n".join(lines)
