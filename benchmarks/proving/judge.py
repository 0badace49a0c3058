"""
Is the judge right as often as it says? Runs whose truth is known, simulated and real.

    python -m benchmarks judge                                simulated runs: wrong "equivalent" on
                                                              the margin, right ones at ratio 1
    python -m benchmarks judge --evidence evidence/<A/A run>  real noise: one side of an A/A run
                                                              multiplied by exactly 1 + margin
    python -m benchmarks judge --large                        how long a run of 12 million rows
                                                              takes to judge

`--out FILE.md` writes the table, and a plot beside it.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import beta

from benchmarks.harness import pages
from benchmarks.proving import large
from benchmarks.proving.noise import WORLDS, World, pilot_of, plan_of, run_of
from command import BadInput, Parser
from proof.evidence.audit import audit_rows, check_restarts, read_sealed_plan
from proof.evidence.readings import Readings, collect_readings
from proof.evidence.statistics import adjusted_contrast
from proof.evidence.store import RestartRecord, check_manifest, read_starts
from proof.plans.plan import STATISTICS
from proof.sizing.power import size_plan
from proof.verdict.judge import CONFIDENCE, judge_level

MARGIN = 0.02
ROWS = 200
PLANNED_MARGINS = {"p50": 0.02, "mean": 0.02, "p95": 0.03, "p99": 0.05}
CONTRAST = np.array([-0.5, -0.5, 0.5, 0.5])
ARMS = [0, 1, 2, 3]


@dataclass(frozen=True)
class Rate:
    """How often something happened."""

    of: str
    restarts: int
    what: str
    times: int
    runs: int

    @property
    def rate(self) -> float:
        return self.times / self.runs

    @property
    def interval(self) -> tuple[float, float]:
        """The exact 95 % interval (Clopper and Pearson)."""
        low = beta.ppf(0.025, self.times, self.runs - self.times + 1) if self.times else 0.0
        high = (
            beta.ppf(0.975, self.times + 1, self.runs - self.times)
            if self.times < self.runs
            else 1.0
        )
        return float(low), float(high)


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks judge",
        description="Calibrate the judge on runs whose truth is known.",
    )
    parser.add_argument(
        "--runs", type=int, default=20_000, help="simulated runs a cell (default: 20000)"
    )
    parser.add_argument(
        "--evidence", type=Path, help="a sealed A/A run: calibrate on real noise instead"
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help="time the judge on 100 restarts × 6 arms × 20,000 rows instead",
    )
    parser.add_argument(
        "--out", type=Path, help="write the table to this Markdown file too, and a plot beside it"
    )
    given = parser.parse_args(arguments)
    if given.large:
        text, good = large.table(), True
    elif given.evidence is not None:
        rates = list(real(given.evidence))
        text, good = real_table(given.evidence, rates), True
    else:
        wrong, right = (
            list(wrongly_equivalent(given.runs)),
            list(rightly_equivalent(max(2, given.runs // 500))),
        )
        text, good = simulated_table(wrong, right), holds(wrong, right)
        rates = wrong
    print(text)
    if given.out is not None:
        plot = (
            None
            if given.large
            else pages.rate_plot(
                [(f"{r.of}, K = {r.restarts}, {r.what}", r.rate, r.interval) for r in rates], 0.06
            )
        )
        pages.write(given.out, "judge", arguments, text, plot)
    return 0 if good else BadInput.exit_code


def wrongly_equivalent(
    runs: int, worlds: Sequence[World] = WORLDS, sizes: Sequence[int] = (8, 12, 20)
) -> Iterator[Rate]:
    """The truth exactly on the margin, above it and below it in turn: how often each statistic, and
    the whole verdict, says equivalent.

    Of the whole verdict, which takes most of the time and is next to never wrong, a quarter of the
    runs is asked.
    """
    cells = list(itertools.product(worlds, sizes))
    with concurrent.futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn")
    ) as processes:
        for rates in processes.map(_wrong, *zip(*cells, strict=True), itertools.repeat(runs)):
            yield from rates


def _wrong(world: World, restarts: int, runs: int) -> list[Rate]:
    """One row of the table."""
    rng = np.random.default_rng([restarts, WORLDS.index(world)])
    plan = plan_of(restarts, ROWS, dict.fromkeys(STATISTICS, MARGIN))
    whole = max(1, runs // 4)
    starts = [RestartRecord(r, r, "", f"i{r}", 1.0, 0.1, 0, "") for r in range(restarts)]
    times = dict.fromkeys(STATISTICS, 0)
    equivalent = 0
    for run in range(runs):
        ratio = 1 + MARGIN if run % 2 else 1 / (1 + MARGIN)
        found = run_of(world, restarts, ROWS, ratio, plan.delay, rng)
        for name in STATISTICS:
            times[name] += _equivalent(found, name, MARGIN)
        if run < whole:
            equivalent += judge_level(plan, plan.levels[0], found, starts).verdict == "equivalent"
    return [
        *(Rate(world.name, restarts, what, count, runs) for what, count in times.items()),
        Rate(world.name, restarts, "whole verdict", equivalent, whole),
    ]


def rightly_equivalent(
    pilots: int, worlds: Sequence[World] = WORLDS, runs: int = 10
) -> Iterator[Rate]:
    """Models that are equal, in runs sized for 80 % power from a pilot each: how often all
    statistics say so.
    """
    with concurrent.futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn")
    ) as processes:
        found = processes.map(_right, worlds, itertools.repeat(pilots), itertools.repeat(runs))
        yield from (rate for rate in found if rate.runs)


def _right(world: World, pilots: int, runs: int) -> Rate:
    template = plan_of(8, 250, PLANNED_MARGINS)
    rng = np.random.default_rng([80, WORLDS.index(world)])
    times = total = 0
    planned: list[int] = []
    for _ in range(pilots):
        pilot = pilot_of(world, 12, 250, rng)
        try:
            plan, _ = size_plan(pilot, template, 0.8, math.inf)
        except BadInput:  # No size in reach has the power: nothing is declared.
            continue
        planned.append(plan.restarts)
        for _ in range(runs):
            found = run_of(world, plan.restarts, plan.levels[0].tuples * 3 // 4, 1.0, 0.0, rng)
            times += all(
                _equivalent(found, name, margin) for name, margin in PLANNED_MARGINS.items()
            )
            total += 1
    return Rate(
        world.name,
        round(float(np.median(planned))) if planned else 0,
        f"{len(planned)} of {pilots} pilots gave a plan",
        times,
        total,
    )


def _equivalent(found: Readings, name: str, margin: float) -> bool:
    estimate = adjusted_contrast(
        found.logs["plain", "inference", name][:, ARMS], found.positions[:, ARMS], CONTRAST
    )
    low, high = estimate.interval(CONFIDENCE)
    return -math.log1p(margin) < low and high < math.log1p(margin)


def holds(wrong: Sequence[Rate], right: Sequence[Rate]) -> bool:
    """The protocol's bounds: wrong in less than 6 % (its 95 % interval too), right in at least 80
    %.
    """
    return all(rate.interval[1] < 0.06 for rate in wrong) and all(
        rate.rate >= 0.8 for rate in right
    )


def real(folder: Path, most: int = 400) -> Iterator[Rate]:
    """Runs drawn from a real A/A run, one side multiplied by exactly 1 + margin: how often they say
    equivalent.

    Whole squares of four restarts are drawn, so every run is balanced; the four copies of one
    model are divided into two and two in all three ways, each side slower in turn. Runs that
    share restarts are not independent: `wrong` counts all of them.
    """
    check_manifest(folder)
    plan, starts = read_sealed_plan(folder), read_starts(folder)
    lines = audit_rows(folder, plan, starts)
    check_restarts(folder, lines)
    arms = np.array(plan.claimed_arms)
    for level in plan.levels:
        found = collect_readings(plan, level, lines)
        squares = np.arange(len(found.restarts) // 4 * 4).reshape(-1, 4)
        for restarts in (8, 12, 20):
            draws = list(itertools.combinations(range(len(squares)), restarts // 4))
            rng = np.random.default_rng(restarts)
            if not draws:  # too few restarts for runs of that size
                continue
            rng.shuffle(draws)
            for what, shift in (("wrong", 1.0), ("right", 0.0)):
                times = dict.fromkeys(level.claimed, 0)
                count = 0
                for draw in draws[:most]:
                    rows = squares[list(draw)].ravel()
                    for pair in ((0, 1), (0, 2), (0, 3)):
                        for sign in (1.0, -1.0):
                            contrast = np.full(4, 0.5 * sign)
                            contrast[list(pair)] = -0.5 * sign
                            count += 1
                            for key in times:
                                metric, name, margin = key
                                y = found.logs["plain", metric, name][
                                    np.ix_(rows, arms)
                                ] + shift * math.log1p(margin) * (contrast > 0)
                                estimate = adjusted_contrast(
                                    y, found.positions[np.ix_(rows, arms)], contrast
                                )
                                low, high = estimate.interval(CONFIDENCE)
                                times[key] += -math.log1p(margin) < low and high < math.log1p(
                                    margin
                                )
                yield from (
                    Rate(f"{level.name} {metric} {name}", restarts, what, hits, count)
                    for (metric, name, _), hits in times.items()
                )


def simulated_table(wrong: Sequence[Rate], right: Sequence[Rate]) -> str:
    lines = [
        (
            f'Wrong "equivalent" with the truth exactly on a margin of ±{MARGIN:.0%} ({ROWS} rows'
            " an arm and restart; 5 % is what the test allows, below 6 % is asked):"
        ),
        "",
        "| latencies | K | " + " | ".join((*STATISTICS, "whole verdict")) + " |",
        "|---|--:|" + "--:|" * 5,
    ]
    for (world, restarts), group in itertools.groupby(wrong, key=lambda r: (r.of, r.restarts)):
        lines.append(
            f"| {world} | {restarts} | "
            + " | ".join(f"{r.rate:.2%} ({r.interval[0]:.1%}–{r.interval[1]:.1%})" for r in group)
            + " |"
        )
    lines += [
        "",
        (
            f"{wrong[0].runs:,} runs a cell ({wrong[-1].runs:,} for the whole verdict), half with"
            " the candidate slower and half faster by the margin; in brackets the exact 95 %"
            " interval."
        ),
        (
            "The whole verdict claims all four statistics at once and asks every gate, so it errs"
            " less."
        ),
        "",
        (
            'Right "equivalent" of equal models, in runs that `proof plan` sized for 80 % joint'
            " power from a pilot of 12 restarts (margins 2, 2, 3, 5 %):"
        ),
        "",
        "| latencies | right | median K | |",
        "|---|--:|--:|---|",
        *(
            f"| {r.of} | {r.rate:.1%} ({r.interval[0]:.1%}–{r.interval[1]:.1%}) | {r.restarts} |"
            f" {r.what}, {r.runs:,} runs |"
            for r in right
        ),
    ]
    return "\n".join(lines)


def real_table(folder: Path, rates: Sequence[Rate]) -> str:
    lines = [
        (
            f'Runs drawn from the A/A run {folder.name}: how often they say "equivalent" when one'
            " side was multiplied by exactly 1 + margin (wrong), and when it was not (right)."
        ),
        "",
        "| level and statistic | K | wrong | right | runs |",
        "|---|--:|--:|--:|--:|",
    ]
    right = {(r.of, r.restarts): r for r in rates if r.what == "right"}
    wrong = [r for r in rates if r.what == "wrong"]
    lines += [
        f"| {r.of} | {r.restarts} | {r.rate:.1%} | {right[r.of, r.restarts].rate:.1%} |"
        f" {r.runs:,} |"
        for r in wrong
    ]
    lines.append("")
    for restarts in sorted({r.restarts for r in wrong}):
        mine = [r for r in wrong if r.restarts == restarts]
        lines.append(
            f"K = {restarts}: wrong in {sum(r.times for r in mine) / sum(r.runs for r in mine):.2%}"
            f" of all, in {max(r.rate for r in mine):.1%} of the worst statistic."
        )
    lines.append(
        "Runs that share restarts are not independent, so no interval is given, and what the"
        " restarts' own A/A difference is, all of them share."
    )
    return "\n".join(lines)
