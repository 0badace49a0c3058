"""
Runs that are drawn from real ones, whose truth is known.

A/A runs of one claim are joined, so that more restarts can be drawn from. Whole squares of four
restarts are drawn, so every drawn run is balanced. Runs that share restarts are not independent;
the rates count all of them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.proving.rates import Rate, is_within
from command import BadInput
from proof.evidence.audit import audit_rows, check_restarts, read_sealed_plan
from proof.evidence.readings import Readings, collect_readings
from proof.evidence.statistics import adjusted_contrast
from proof.evidence.store import check_manifest, read_starts
from proof.plans.plan import Level, Plan

SIZES = (8, 12, 16, 20)
"""Restarts of the drawn runs."""


def read_joined(folders: Sequence[Path]) -> tuple[Plan, dict[str, Readings]]:
    """Return the first run's plan, and the readings of all runs by level.

    Raises EvidenceRejected if a folder is no sealed run, and BadInput if the runs are not of one
    claim with the same arms and levels, or if one is given twice.
    """
    for folder in folders:
        check_manifest(folder)
    claims = {_claim(folder) for folder in folders}
    names = ", ".join(folder.name for folder in folders)
    if len(claims) > 1 or (len(folders) > 1 and None in claims):
        raise BadInput(
            f"{names} are not runs of one claim (`claim_digest` in run.json); give them one by one."
        )
    if len({(folder / "MANIFEST.sha256").read_bytes() for folder in folders}) < len(folders):
        raise BadInput(f"One run is given twice: {names}.")
    runs = [_read(folder) for folder in folders]
    plan = runs[0][0]
    for other, _ in runs[1:]:
        _check_same_form(plan, other)
    return plan, {
        level.name: _join([of_run[level.name] for _, of_run in runs]) for level in plan.levels
    }


def _check_same_form(plan: Plan, other: Plan) -> None:
    """Raise BadInput if two plans differ in what their readings are arranged by."""
    forms = [
        {
            "arms": [(arm.name, arm.role) for arm in each.arms],
            "levels": [(level.name, level.tuples, level.sets) for level in each.levels],
        }
        for each in (plan, other)
    ]
    for name, value in forms[0].items():
        if forms[1][name] != value:
            raise BadInput(
                f"The runs have other {name}, {value} and {forms[1][name]}; give them one by one."
            )


def _claim(folder: Path) -> str | None:
    digest = json.loads((folder / "run.json").read_text()).get("claim_digest")
    return None if digest is None else str(digest)


def _read(folder: Path) -> tuple[Plan, dict[str, Readings]]:
    plan, starts = read_sealed_plan(folder), read_starts(folder)
    lines = audit_rows(folder, plan, starts)
    check_restarts(folder, lines)
    return plan, {level.name: collect_readings(plan, level, lines) for level in plan.levels}


def _join(runs: Sequence[Readings]) -> Readings:
    """Return the readings of several runs as those of one; each run gives whole squares of four."""
    sizes = [len(run.restarts) // 4 * 4 for run in runs]
    common = set.intersection(*(set(run.logs) for run in runs))
    return Readings(
        restarts=tuple(range(sum(sizes))),
        positions=np.vstack([run.positions[:size] for run, size in zip(runs, sizes, strict=True)]),
        logs={
            key: np.vstack([run.logs[key][:size] for run, size in zip(runs, sizes, strict=True)])
            for key in common
        },
        drift=np.zeros(0),
    )


def real_rates(folders: Sequence[Path], most: int = 400) -> Iterator[Rate]:
    """Yield the rates of "equivalent" in runs that are drawn from real A/A runs.

    One side is multiplied by exactly 1 + margin ("wrong"), or not at all ("right"). At most `most`
    runs of each size are drawn. The four copies of the model are divided into two and two in all
    three ways, each side slower in turn. Raises what read_joined raises.
    """
    plan, joined = read_joined(folders)
    arms = np.array(plan.claimed_arms)
    for level in plan.levels:
        readings = joined[level.name]
        for restarts in SIZES:
            runs = _draw_runs(len(readings.restarts), restarts, most)
            if not runs:  # too few restarts for runs of that size
                continue
            for label, shift in (("wrong", 1.0), ("right", 0.0)):
                for key in level.claimed:
                    hits, count = _count_equivalent(readings, arms, runs, key, shift)
                    metric, name, _ = key
                    yield Rate(f"{level.name} {metric} {name}", restarts, label, hits, count)


def on_margin_rates(folders: Sequence[Path], most: int = 2000) -> Iterator[Rate]:
    """Yield the rates of "equivalent" in runs drawn from ones whose candidates are on the margin.

    Their candidates computed longer by the margin of service time, so nothing is multiplied: under
    load, where a queue is not linear, that would be another experiment. At most `most` runs of each
    size are drawn. Raises what read_joined raises.
    """
    plan, joined = read_joined(folders)
    arms = np.array(plan.claimed_arms)
    references = plan.indices("reference")
    contrast = np.array([-0.5 if arm in references else 0.5 for arm in arms])
    for level in plan.levels:
        readings = joined[level.name]
        for restarts in SIZES:
            runs = _draw_runs(len(readings.restarts), restarts, most)
            if runs:
                yield from _on_margin(level, readings, arms, contrast, runs)


def _on_margin(
    level: Level,
    readings: Readings,
    arms: np.ndarray,
    contrast: np.ndarray,
    runs: Sequence[np.ndarray],
) -> Iterator[Rate]:
    """Yield the rate of each claim of a level, and of all of them at once."""
    hits = [0] * len(level.claimed)
    together = 0
    for run in runs:
        cells = np.ix_(run, arms)
        inside = [
            is_within(
                adjusted_contrast(
                    readings.logs["plain", metric, name][cells],
                    readings.positions[cells],
                    contrast,
                ),
                margin,
            )
            for metric, name, margin in level.claimed
        ]
        hits = [count + is_inside for count, is_inside in zip(hits, inside, strict=True)]
        together += all(inside)
    size = len(runs[0])
    for (metric, name, _), count in zip(level.claimed, hits, strict=True):
        yield Rate(f"{level.name} {metric} {name}", size, "wrong", count, len(runs))
    yield Rate(f"{level.name} all claims", size, "wrong", together, len(runs))


def _draw_runs(available: int, restarts: int, most: int) -> list[np.ndarray]:
    """Return the restarts of at most `most` runs, each drawn as whole squares of four."""
    squares = np.arange(available // 4 * 4).reshape(-1, 4)
    each = restarts // 4
    rng = np.random.default_rng(restarts)
    if math.comb(len(squares), each) <= 10 * most:
        draws = list(itertools.combinations(range(len(squares)), each))
        rng.shuffle(draws)
    else:
        draws = [tuple(rng.choice(len(squares), each, replace=False)) for _ in range(most)]
    return [squares[list(draw)].ravel() for draw in draws[:most]]


def _count_equivalent(
    readings: Readings,
    arms: np.ndarray,
    runs: Sequence[np.ndarray],
    key: tuple[str, str, float],
    shift: float,
) -> tuple[int, int]:
    """Return how many runs are equivalent in a statistic, and how many there are.

    `key` is (metric, statistic, margin); `shift` is how many margins one side is moved by.
    """
    metric, name, margin = key
    logs = readings.logs["plain", metric, name]
    hits = count = 0
    for restarts in runs:
        cells = np.ix_(restarts, arms)
        for contrast in _divisions():
            moved = logs[cells] + shift * math.log1p(margin) * (contrast > 0)
            estimate = adjusted_contrast(moved, readings.positions[cells], contrast)
            hits += is_within(estimate, margin)
            count += 1
    return hits, count


def _divisions() -> Iterator[np.ndarray]:
    """Yield the contrasts of the six ways to divide four copies into a slower and a faster pair."""
    for pair in ((0, 1), (0, 2), (0, 3)):
        for sign in (1.0, -1.0):
            contrast = np.full(4, 0.5 * sign)
            contrast[list(pair)] = -0.5 * sign
            yield contrast


def on_margin_table(folders: Sequence[Path], rates: Sequence[Rate]) -> str:
    """Return the Markdown table of runs drawn from ones whose candidates are on the margin."""
    lines = [
        (
            f"Runs drawn from {_names(folders)}, whose candidates computed longer by exactly the"
            ' margin of service time: how often they say "equivalent". The dilation does not change'
            " with computing, so its own claim holds and is right."
        ),
        "",
        "| level and statistic | K | equivalent | runs |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| {rate.case} | {rate.restarts} | {rate.rate:.1%} | {rate.runs:,} |" for rate in rates
    ]
    return "\n".join(lines)


def real_table(folders: Sequence[Path], rates: Sequence[Rate]) -> str:
    """Return the Markdown table of the runs drawn from real ones."""
    runs = "the A/A run" if len(folders) == 1 else f"{len(folders)} A/A runs of one claim,"
    lines = [
        (
            f'Runs drawn from {runs} {_names(folders)}: how often they say "equivalent" when one'
            " side was multiplied by exactly 1 + margin (wrong), and when it was not (right)."
        ),
        "",
        "| level and statistic | K | wrong | right | runs |",
        "|---|--:|--:|--:|--:|",
    ]
    right = {(rate.case, rate.restarts): rate for rate in rates if rate.label == "right"}
    wrong = [rate for rate in rates if rate.label == "wrong"]
    for rate in wrong:
        right_rate = right[rate.case, rate.restarts].rate
        lines.append(
            f"| {rate.case} | {rate.restarts} | {rate.rate:.1%} | {right_rate:.1%} |"
            f" {rate.runs:,} |"
        )
    lines.append("")
    for restarts in sorted({rate.restarts for rate in wrong}):
        same_size = [rate for rate in wrong if rate.restarts == restarts]
        overall = sum(rate.hits for rate in same_size) / sum(rate.runs for rate in same_size)
        worst = max(rate.rate for rate in same_size)
        lines.append(
            f"K = {restarts}: wrong in {overall:.2%} of all, in {worst:.1%} of the worst statistic."
        )
    lines.append(
        "Runs that share restarts are not independent, so there is no interval. All of them share"
        " the A/A difference of the real restarts."
    )
    return "\n".join(lines)


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(folder.name for folder in folders)
