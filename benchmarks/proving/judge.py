"""
How often does the judge err? Runs whose truth is known, simulated and real.

    python -m benchmarks judge                                simulated runs: wrong "equivalent" on
                                                              the margin, right ones at ratio 1
    python -m benchmarks judge --evidence A/A-RUN ...         real noise: one side of A/A runs
                                                              multiplied by exactly 1 + margin
    python -m benchmarks judge --evidence RUN --on-margin     a real run whose candidates computed
                                                              longer by exactly the margin
    python -m benchmarks judge --large                        time to judge a run of 12 million rows

`--out FILE.md` writes the table, and a plot next to it.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import multiprocessing
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness import pages
from benchmarks.proving import large, slice_worlds
from benchmarks.proving.noise import (
    LATENCY_MODELS,
    LatencyModel,
    simulate_pilot,
    simulate_run,
    simulated_plan,
)
from benchmarks.proving.rates import Rate, is_within
from benchmarks.proving.real_runs import (
    on_margin_rates,
    on_margin_table,
    real_rates,
    real_table,
)
from command import BadInput, Parser
from proof.evidence.readings import Readings
from proof.evidence.statistics import adjusted_contrast
from proof.evidence.store import RestartRecord
from proof.plans.plan import STATISTICS
from proof.sizing.power import size_plan
from proof.verdict.judge import judge_level

MARGIN = 0.02
ROWS = 200
"""Rows per arm and restart of a simulated run."""
PLANNED_MARGINS = {"p50": 0.02, "mean": 0.02, "p95": 0.03, "p99": 0.05}
LIMIT = 0.06
"""Largest rate of wrong "equivalent" on the margin; the test itself allows 5 %."""
CONTRAST = np.array([-0.5, -0.5, 0.5, 0.5])
ARMS = [0, 1, 2, 3]


def main(arguments: Sequence[str]) -> int:
    """Calibrate the judge and print the table; return 65 if it errs more often than allowed."""
    parser = Parser(
        prog="python -m benchmarks judge",
        description="Calibrate the judge on runs whose truth is known.",
    )
    parser.add_argument(
        "--runs", type=int, default=20_000, help="simulated runs per cell (default: 20000)"
    )
    parser.add_argument(
        "--evidence",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="sealed A/A runs of one claim: calibrate on real noise instead",
    )
    parser.add_argument(
        "--on-margin",
        action="store_true",
        help="the candidates of these runs busy-waited for exactly the margin: multiply nothing",
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help="time the judge on 100 restarts × 6 arms × 20,000 rows instead",
    )
    parser.add_argument(
        "--out", type=Path, help="write the table to this Markdown file, and a plot next to it"
    )
    options = parser.parse_args(arguments)
    rates: list[Rate] = []
    good = True
    if options.large:
        text = large.table()
    elif options.evidence is not None:
        if options.on_margin:
            rates = list(on_margin_rates(options.evidence))
            text = on_margin_table(options.evidence, rates)
        else:
            rates = list(real_rates(options.evidence))
            text = real_table(options.evidence, rates)
    else:
        rates = list(wrongly_equivalent(options.runs))
        right = list(rightly_equivalent(max(2, options.runs // 500)))
        of_slices, worst = slice_worlds.table(options.runs)
        text = f"{simulated_table(rates, right)}\n\n{of_slices}"
        good = holds(rates, right) and worst < LIMIT
    print(text)
    if options.out is not None:
        command = shlex.join(["python", "-m", "benchmarks", "judge", *arguments])
        plot = _plot(rates) if rates else None
        pages.write(options.out, "Calibration of the judge", command, text, plot)
    return 0 if good else BadInput.exit_code


def _plot(rates: Sequence[Rate]) -> str:
    rows = []
    for rate in rates:
        name = f"{rate.case}, K = {rate.restarts}, {rate.label}"
        rows.append((name, rate.rate, rate.interval))
    return pages.rate_plot(rows, LIMIT)


# Simulated runs.


def wrongly_equivalent(
    runs: int,
    models: Sequence[LatencyModel] = LATENCY_MODELS,
    sizes: Sequence[int] = (8, 12, 20),
) -> Iterator[Rate]:
    """Yield the rates of "equivalent" with the truth exactly on the margin.

    The truth is above it and below it in turn. There is a rate for each statistic and one for the
    whole verdict, by latency model and number of restarts. The whole verdict takes most of the time
    and hardly ever errs, so only a quarter of the runs gets one.
    """
    cells = list(itertools.product(models, sizes))
    with concurrent.futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn")
    ) as processes:
        for rates in processes.map(_wrong, *zip(*cells, strict=True), itertools.repeat(runs)):
            yield from rates


def _wrong(model: LatencyModel, restarts: int, runs: int) -> list[Rate]:
    """Return the rates of one row of the table."""
    rng = np.random.default_rng([restarts, LATENCY_MODELS.index(model)])
    plan = simulated_plan(restarts, ROWS, dict.fromkeys(STATISTICS, MARGIN))
    whole_runs = max(1, runs // 4)
    starts = [RestartRecord(r, r, "", f"i{r}", 1.0, 0.1, 0, "") for r in range(restarts)]
    hits = dict.fromkeys(STATISTICS, 0)
    whole_hits = 0
    for run in range(runs):
        ratio = 1 + MARGIN if run % 2 else 1 / (1 + MARGIN)
        readings = simulate_run(model, restarts, ROWS, ratio, plan.delay, rng)
        for name in STATISTICS:
            hits[name] += _equivalent(readings, name, MARGIN)
        if run < whole_runs:
            verdict = judge_level(plan, plan.levels[0], readings, starts).verdict
            whole_hits += verdict == "equivalent"
    return [
        *(Rate(model.name, restarts, name, count, runs) for name, count in hits.items()),
        Rate(model.name, restarts, "whole verdict", whole_hits, whole_runs),
    ]


def rightly_equivalent(
    pilots: int, models: Sequence[LatencyModel] = LATENCY_MODELS, runs: int = 10
) -> Iterator[Rate]:
    """Yield the rates of "equivalent" in all statistics, for equal models.

    Each pilot sizes `runs` runs for 80 % power.
    """
    with concurrent.futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn")
    ) as processes:
        rates = processes.map(_right, models, itertools.repeat(pilots), itertools.repeat(runs))
        yield from (rate for rate in rates if rate.runs)


def _right(model: LatencyModel, pilots: int, runs: int) -> Rate:
    template = simulated_plan(8, 250, PLANNED_MARGINS)
    rng = np.random.default_rng([80, LATENCY_MODELS.index(model)])
    hits = total = 0
    planned: list[int] = []
    for _ in range(pilots):
        pilot = simulate_pilot(model, 12, 250, rng)
        try:
            plan, _ = size_plan(pilot, template, 0.8, math.inf)
        except BadInput:  # No size in reach has the power, so there is no plan.
            continue
        planned.append(plan.restarts)
        rows = plan.levels[0].tuples * 3 // 4
        for _ in range(runs):
            readings = simulate_run(model, plan.restarts, rows, 1.0, 0.0, rng)
            hits += all(
                _equivalent(readings, name, margin) for name, margin in PLANNED_MARGINS.items()
            )
            total += 1
    restarts = round(float(np.median(planned))) if planned else 0
    label = f"{len(planned)} of {pilots} pilots gave a plan"
    return Rate(model.name, restarts, label, hits, total)


def _equivalent(readings: Readings, name: str, margin: float) -> bool:
    """Return whether a statistic of the inference time is equivalent within the margin."""
    logs = readings.logs["plain", "inference", name][:, ARMS]
    return is_within(adjusted_contrast(logs, readings.positions[:, ARMS], CONTRAST), margin)


def holds(wrong: Sequence[Rate], right: Sequence[Rate]) -> bool:
    """Return whether the protocol's bounds hold.

    Wrong rates must be below 6 %, with their 95 % interval; right ones at least 80 %.
    """
    return all(rate.interval[1] < LIMIT for rate in wrong) and all(
        rate.rate >= 0.8 for rate in right
    )


# Tables.


def simulated_table(wrong: Sequence[Rate], right: Sequence[Rate]) -> str:
    """Return the Markdown tables of the simulated runs."""
    lines = [
        (
            f'Wrong "equivalent" with the truth exactly on a margin of ±{MARGIN:.0%} ({ROWS} rows'
            " per arm and restart; the test allows 5 %, the protocol less than 6 %):"
        ),
        "",
        "| latencies | K | " + " | ".join((*STATISTICS, "whole verdict")) + " |",
        "|---|--:|" + "--:|" * 5,
    ]
    for (case, restarts), group in itertools.groupby(wrong, key=lambda r: (r.case, r.restarts)):
        cells = " | ".join(_with_interval(rate, digits=2) for rate in group)
        lines.append(f"| {case} | {restarts} | {cells} |")
    lines += [
        "",
        (
            f"{wrong[0].runs:,} runs per cell ({wrong[-1].runs:,} for the whole verdict), half with"
            " the candidate slower and half faster by the margin; in brackets the exact 95 %"
            " interval."
        ),
        (
            "The whole verdict claims all four statistics at once and applies every gate, so it"
            " errs less."
        ),
        "",
        (
            'Right "equivalent" of equal models, in runs that `proof plan` sized for 80 % joint'
            " power from a pilot of 12 restarts (margins 2, 2, 3, 5 %):"
        ),
        "",
        "| latencies | right | median K | |",
        "|---|--:|--:|---|",
    ]
    for rate in right:
        lines.append(
            f"| {rate.case} | {_with_interval(rate, digits=1)} | {rate.restarts} | {rate.label},"
            f" {rate.runs:,} runs |"
        )
    return "\n".join(lines)


def _with_interval(rate: Rate, digits: int) -> str:
    low, high = rate.interval
    return f"{rate.rate:.{digits}%} ({low:.1%}–{high:.1%})"
