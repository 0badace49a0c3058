"""
How often is a run of the proof valid while another process uses the machine?

    python -m benchmarks neighbour PLAN --runs 10 --share 0.33 --out benchmarks/neighbour.md

The plan is run again and again beside a process that computes for a share of one processor's time,
wherever the system puts it. With --share 0 the machine is as quiet as it is by itself. Each run has
a seed of its own: with one schedule for all of them, the chance that is in it would count as often.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import pages
from command import BadInput, BadUsage, Parser
from proof.measuring.run import run_plan
from proof.plans.plan import Plan
from proof.plans.plan_file import read_plan
from proof.verdict.failures import describe_failures
from proof.verdict.schema import LevelVerdict, Verdict, format_percent, metric_label

SEED = re.compile(r"^seed = (\d+)$", re.MULTILINE)
PERIOD_S = 0.03
"""The other process computes at the begin of each period, and then sleeps."""
NEIGHBOUR = """
import sys, time
share, period = float(sys.argv[1]), float(sys.argv[2])
while True:
    begin = time.monotonic()
    while time.monotonic() - begin < share * period:
        pass
    time.sleep(max(0.0, begin + period - time.monotonic()))
"""


def main(arguments: Sequence[str]) -> int:
    """Run the plan several times beside a busy process, and count the valid runs."""
    parser = Parser(
        prog="python -m benchmarks neighbour",
        description="Count how many runs of a plan are valid beside a busy process.",
    )
    parser.add_argument("plan", type=Path, help="plan to run, of one model on both sides")
    parser.add_argument("--runs", type=int, default=10, help="number of runs (default: 10)")
    parser.add_argument(
        "--share",
        type=float,
        default=1 / 3,
        help="share of one processor's time that the other process uses (default: a third)",
    )
    parser.add_argument(
        "--evidence", type=Path, default=Path("evidence"), help="folder of runs (default: evidence)"
    )
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file too")
    options = parser.parse_args(arguments)
    check(options)
    verdicts = []
    with busy_process(options.share), tempfile.TemporaryDirectory() as folder:
        for number in range(1, options.runs + 1):
            plan = with_seed(options.plan, number - 1, Path(folder))
            _, verdict = run_plan(plan, options.evidence)
            verdicts.append(verdict)
            print(f"run {number}: {verdict.verdict}. {verdict.sentence}", flush=True)
    text = table(read_plan(options.plan), verdicts, options.share)
    print(text)
    if options.out is not None:
        command = shlex.join(["python", "-m", "benchmarks", "neighbour", *arguments])
        pages.write(options.out, "Runs beside a busy process", command, text)
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise BadUsage for a number of runs or a share that cannot be."""
    if options.runs < 1:
        raise BadUsage(f"--runs {options.runs} is no number of runs; give 1 or more.")
    if not 0 <= options.share <= 1:
        raise BadUsage(f"--share {options.share:g} is no share; give 0 to 1.")


def with_seed(plan: Path, added: int, folder: Path) -> Path:
    """Write a plan with `added` to its seed into `folder`, and its pilot, if it has one.

    Raises BadInput if it has no seed.
    """
    text, count = SEED.subn(lambda match: f"seed = {int(match[1]) + added}", plan.read_text())
    if count != 1:
        raise BadInput(f"{plan} has no line `seed = NUMBER`; each run needs a seed of its own.")
    written = folder / plan.name
    written.write_text(text, encoding="utf-8")
    pilot = plan.with_suffix(".pilot.json")
    if pilot.is_file():
        shutil.copy(pilot, folder)
    return written


@contextlib.contextmanager
def busy_process(share: float) -> Iterator[None]:
    """Run a process that computes for a share of the time, until the block ends."""
    if share == 0:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR, str(share), str(PERIOD_S)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def table(plan: Plan, verdicts: Sequence[Verdict], share: float) -> str:
    """Return how many runs were valid at each level, and each run's verdict, as Markdown."""
    lines = [
        f"{len(verdicts)} runs of {plan.restarts} restarts beside a process that computes for"
        f" {share:.0%} of one processor's time. The gates and margins are those of the plan; one"
        " model is on both sides.",
        "",
        "| level | valid | equivalent | widest 90 % interval, median of the runs |",
        "|---|--:|--:|---|",
    ]
    for level in plan.judged_levels:
        of_level = [verdict.levels[level.name] for verdict in verdicts]
        valid = sum(each.verdict != "invalid" for each in of_level)
        equivalent = sum(each.verdict == "equivalent" for each in of_level)
        lines.append(
            f"| {level.name} | {valid} of {len(verdicts)} | {equivalent} | {_widest(of_level)} |"
        )
    lines += ["", "| run | " + " | ".join(level.name for level in plan.judged_levels) + " |"]
    lines.append("|---|" + "---|" * len(plan.judged_levels))
    for number, verdict in enumerate(verdicts, 1):
        cells = (_outcome(verdict.levels[level.name]) for level in plan.judged_levels)
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _widest(levels: Sequence[LevelVerdict]) -> str:
    """Return the statistic with the widest interval in the run of the median width."""
    widths = []
    for level in levels:
        if level.statistics:
            item = max(level.statistics, key=lambda each: each.interval[1] / each.interval[0])
            low, high = map(format_percent, item.interval)
            name = f"{metric_label(item.metric)} {item.statistic}"
            widths.append((item.interval[1] / item.interval[0], f"{name}: {low} to {high}"))
    return sorted(widths)[len(widths) // 2][1] if widths else ""


def _outcome(level: LevelVerdict) -> str:
    if not level.breached:
        return level.verdict
    return f"{level.verdict}: {describe_failures(level.breached)}"
