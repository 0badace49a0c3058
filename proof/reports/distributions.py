"""
What a run's rows look like beyond the few numbers that its verdict rests on.

Rows are read a restart at a time and only sums, counts and deciles are kept, so that a run of
many millions of requests fits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from proof.evidence.readings import latencies_us
from proof.evidence.statistics import Estimate, Matrix, adjusted_contrast
from proof.evidence.store import Requests, RestartRecord, at_level
from proof.plans.plan import Level, Plan, Role
from proof.plans.schedule import CLOSING, CONTROL, PLAIN, load_positions

DECILES = tuple(range(10, 100, 10))
PHASES = ("tokenize", "queue", "inference", "rest")
# The plain tuples of a restart are looked at in so many parts.
PARTS = 20
# Restarts below which no interval is worth its name, as for the verdict.
FEWEST_FOR_INTERVAL = 4

# Latencies are counted in bins a thousandth wide, from a microsecond to a day.
BINS_PER_E, BINS = 1000, 25_200


class Distribution:
    """How often each latency was seen."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, np.int64)

    def __len__(self) -> int:
        return int(self._counts.sum())

    def add(self, us: npt.NDArray[np.float64]) -> None:
        bins = np.clip(np.log(np.maximum(us, 1.0)) * BINS_PER_E, 0, BINS - 1).astype(np.int64)
        self._counts += np.bincount(bins, minlength=BINS)

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Microseconds within which those shares were answered, to a thousandth."""
        below = np.cumsum(self._counts)
        bins = np.searchsorted(below, np.asarray(shares) * below[-1])
        return [float(us) for us in np.exp((bins + 0.5) / BINS_PER_E)]


@dataclass
class Phases:
    """Sums of where the time of a role's requests went."""

    requests: int = 0
    sums_us: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(PHASES)))

    def mean_ms(self) -> dict[str, float]:
        return {
            phase: float(us) / 1000 / self.requests
            for phase, us in zip(PHASES, self.sums_us, strict=True)
        }


@dataclass
class Portrait:
    """One level's requests in all the restarts that count."""

    requests: int = 0
    """Warm-up not among them."""
    seen: dict[tuple[Role, str], Distribution] = field(default_factory=dict)
    """By role and claimed metric."""
    deciles: dict[str, list[Matrix]] = field(default_factory=dict)
    """By claimed metric, a restart an entry: (claimed arms, 9) log µs"""
    positions: list[list[int]] = field(default_factory=list)
    """A restart an entry: load positions of the claimed arms"""
    same_model: list[Matrix] = field(default_factory=list)
    """A restart an entry: (PARTS,) mean log ratio of the reference's two loads along the restart"""
    candidate: list[Matrix] = field(default_factory=list)
    """The same of candidate and reference"""
    phases: dict[Role, Phases] = field(default_factory=dict)


def portraits(
    requests: Requests, plan: Plan, starts: Iterable[RestartRecord]
) -> dict[str, Portrait]:
    """What each level looks like, by its name; dropped restarts are left out."""
    found = {level.name: Portrait() for level in plan.levels}
    for start in starts:
        if start.dropped:
            continue
        rows = requests.of(start.restart)
        for level in plan.levels:
            here = at_level(rows, level.name)
            if len(here["arm"]):
                _add(found[level.name], plan, level, load_positions(plan, start.slot), here)
    return found


def shown_metrics(level: Level) -> list[str]:
    """The claimed metrics that every request has a number of."""
    return [metric for metric in level.margins if metric != "time_per_text"]


def shift(plan: Plan, portrait: Portrait, metric: str) -> list[Estimate]:
    """Candidate over reference at each decile, with the verdict's own interval; empty if the
    restarts are too few.
    """
    found = portrait.deciles.get(metric, [])
    if len(found) < FEWEST_FOR_INTERVAL:
        return []
    logs, positions = np.array(found), np.array(portrait.positions)
    weights = np.array(
        [0.5 if plan.arms[a].role == "candidate" else -0.5 for a in plan.claimed_arms]
    )
    return [adjusted_contrast(logs[:, :, i], positions, weights) for i in range(len(DECILES))]


def _add(
    portrait: Portrait,
    plan: Plan,
    level: Level,
    positions: Mapping[int, int],
    rows: Mapping[str, Any],
) -> None:
    arms = {a: rows["arm"] == plan.arms[a].name for a in range(len(plan.arms))}
    plain = rows["slice"] == PLAIN if level.tuples else rows["slice"] >= PLAIN
    portrait.requests += int((rows["slice"] >= PLAIN).sum())
    metrics = {metric: latencies_us(level, metric, rows) for metric in shown_metrics(level)}
    complete = all((plain & arms[a]).any() for a in plan.claimed_arms)
    for metric, us in metrics.items():
        for a in plan.claimed_arms:
            portrait.seen.setdefault((plan.arms[a].role, metric), Distribution()).add(
                us[plain & arms[a]]
            )
        if complete:
            logs = [
                np.log(np.maximum(np.percentile(us[plain & arms[a]], DECILES), 1e-3))
                for a in plan.claimed_arms
            ]
            portrait.deciles.setdefault(metric, []).append(np.array(logs))
    if complete:
        portrait.positions.append([positions[a] for a in plan.claimed_arms])
        if level.tuples:
            _add_over_time(
                portrait,
                plan,
                latencies_us(level, "inference" if plan.server_timing else "end_to_end", rows),
                plain,
                arms,
                rows,
            )
    total = latencies_us(level, "end_to_end", rows)
    blocks: dict[Role, int] = {
        "reference": PLAIN,
        "candidate": PLAIN,
        "delayed": CONTROL,
        "control": CLOSING,
    }
    for role, block in blocks.items():
        chosen = rows["arm"].isin(plan.arms[a].name for a in plan.indices(role))
        chosen &= rows["slice"] == block if level.tuples else plain
        if chosen.any():
            known = [float(rows[f"{phase}_us"][chosen].sum()) for phase in PHASES[:-1]]
            mine = portrait.phases.setdefault(role, Phases())
            mine.requests += int(chosen.sum())
            mine.sums_us += np.array([*known, float(total[chosen].sum()) - sum(known)])


def _add_over_time(
    portrait: Portrait,
    plan: Plan,
    us: npt.NDArray[np.float64],
    plain: npt.NDArray[np.bool_],
    arms: Mapping[int, Any],
    rows: Mapping[str, Any],
) -> None:
    """Log ratios of each plain tuple, averaged over each part of the restart."""
    logs: dict[int, tuple[Any, Any]] = {}
    for a in plan.claimed_arms:
        mine = plain & arms[a]
        tuples, first = np.unique(rows["tuple"][mine], return_index=True)
        logs[a] = tuples, np.log(np.maximum(us[mine][first], 1e-3))
    shared = functools.reduce(np.intersect1d, (tuples for tuples, _ in logs.values()))
    if len(shared) < 2:
        return
    by_arm = {a: values[np.isin(tuples, shared)] for a, (tuples, values) in logs.items()}
    (one, other), (new, newer) = plan.indices("reference"), plan.indices("candidate")
    ratios = (
        by_arm[other] - by_arm[one],
        (by_arm[new] + by_arm[newer] - by_arm[one] - by_arm[other]) / 2,
    )
    for kept, ratio in zip((portrait.same_model, portrait.candidate), ratios, strict=True):
        kept.append(
            np.array([part.mean() for part in np.array_split(ratio, min(PARTS, len(ratio)))])
        )
