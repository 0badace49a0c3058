"""
Distributions of a run's latencies, beyond the few numbers that its verdict rests on.

Rows are read one restart at a time, and only sums, counts and deciles stay in memory, so a run of
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
from proof.evidence.slices import count_sets, without_late_sets
from proof.evidence.statistics import Estimate, Matrix, adjusted_contrast
from proof.evidence.store import Requests, RestartRecord, at_level
from proof.plans.plan import Level, Plan, Role
from proof.plans.schedule import CLOSING, CONTROL, PLAIN, load_positions
from proof.verdict.judge import FEWEST_FOR_INTERVAL

DECILES = tuple(range(10, 100, 10))
PHASES = ("tokenize", "queue", "inference", "rest")
TIME_COURSE_PARTS = 20
"""Parts that the plain blocks of a restart are split into, in the order of time."""

# Latencies are counted in bins 0.1 % wide, from one microsecond to one day.
BINS_PER_E, BINS = 1000, 25_200

_ROLE_BLOCKS: Mapping[Role, int] = {
    "reference": PLAIN,
    "candidate": PLAIN,
    "delayed": CONTROL,
    "control": CLOSING,
}
"""The kind of block in which each role is measured, where arms are interleaved."""

Mask = npt.NDArray[np.bool_]


class Distribution:
    """A histogram of latencies with bins of equal relative width."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, np.int64)

    def __len__(self) -> int:
        return int(self._counts.sum())

    def add(self, us: npt.NDArray[np.float64]) -> None:
        """Count latencies in microseconds."""
        bins = np.clip(np.log(np.maximum(us, 1.0)) * BINS_PER_E, 0, BINS - 1).astype(np.int64)
        self._counts += np.bincount(bins, minlength=BINS)

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Return the quantiles in microseconds, with a relative error of at most 0.1 %."""
        cumulative = np.cumsum(self._counts)
        bins = np.searchsorted(cumulative, np.asarray(shares) * cumulative[-1])
        return [float(us) for us in np.exp((bins + 0.5) / BINS_PER_E)]


@dataclass
class PhaseSums:
    """Sums of the time that the requests of one role spent in each phase."""

    requests: int = 0
    sums_us: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(PHASES)))
    """(len(PHASES),) microseconds."""

    def mean_ms(self) -> dict[str, float]:
        """Return the mean milliseconds of one request in each phase."""
        return {
            phase: float(us) / 1000 / self.requests
            for phase, us in zip(PHASES, self.sums_us, strict=True)
        }


@dataclass
class LevelProfile:
    """The requests of one level, over all restarts that count."""

    requests: int = 0
    """Number of requests, without warm-up and late sets."""
    sets: int = 0
    """Number of sets of short slices that were sent."""
    late_sets: int = 0
    """Number of sets that are left out, because they were not sent in time."""
    distributions: dict[tuple[Role, str], Distribution] = field(default_factory=dict)
    """Latencies by (role, claimed metric)."""
    log_deciles: dict[str, list[Matrix]] = field(default_factory=dict)
    """By claimed metric, one entry for each restart: (claimed arms, 9) log µs."""
    positions: list[list[int]] = field(default_factory=list)
    """One entry for each restart: load positions of the claimed arms."""
    same_model: list[Matrix] = field(default_factory=list)
    """One entry for each restart: (TIME_COURSE_PARTS,) mean log ratio of the reference's second
    arm to its first.
    """
    candidate: list[Matrix] = field(default_factory=list)
    """One entry for each restart: (TIME_COURSE_PARTS,) mean log ratio of candidate to reference."""
    phases: dict[Role, PhaseSums] = field(default_factory=dict)
    """Where the time of each role's requests went."""


def profile_levels(
    requests: Requests, plan: Plan, starts: Iterable[RestartRecord]
) -> dict[str, LevelProfile]:
    """Return the profile of each level by its name; dropped restarts are left out."""
    profiles = {level.name: LevelProfile() for level in plan.levels}
    for start in starts:
        if start.dropped:
            continue
        rows = requests.of(start.restart)
        for level in plan.levels:
            profile, level_rows = profiles[level.name], at_level(rows, level.name)
            if plan.schedule_version > 1 and level.kind == "switchback":
                level_rows = _measured_in_time(plan, level, level_rows, profile)
            if len(level_rows["arm"]):
                restart = _RestartRows(plan, level, level_rows)
                restart.add_to(profile, load_positions(plan, start.slot))
    return profiles


def _measured_in_time(
    plan: Plan, level: Level, rows: Mapping[str, Any], profile: LevelProfile
) -> dict[str, Any]:
    """Return the rows that the verdict rests on, and count the sets in the level's profile."""
    is_measured = rows["slice_id"] >= PLAIN
    measured = {name: values[is_measured] for name, values in rows.items()}
    in_time = without_late_sets(plan, level, measured)
    sets, kept = (count_sets(plan, part["slice_id"]) for part in (measured, in_time))
    profile.sets += sets
    profile.late_sets += sets - kept
    return in_time


def per_request_metrics(level: Level) -> list[str]:
    """Return the claimed metrics that are known of every single request."""
    return [metric for metric in level.margins if metric != "time_per_text"]


def estimate_shift_function(plan: Plan, profile: LevelProfile, metric: str) -> list[Estimate]:
    """Estimate candidate over reference at each decile, with the verdict's own contrast.

    The list is empty if there are too few restarts.
    """
    by_restart = profile.log_deciles.get(metric, [])
    if len(by_restart) < FEWEST_FOR_INTERVAL:
        return []
    logs, positions = np.array(by_restart), np.array(profile.positions)
    roles = [plan.arms[arm].role for arm in plan.claimed_arms]
    weights = np.array([0.5 if role == "candidate" else -0.5 for role in roles])
    return [
        adjusted_contrast(logs[:, :, decile], positions, weights) for decile in range(len(DECILES))
    ]


class _RestartRows:
    """The rows of one restart at one level."""

    def __init__(self, plan: Plan, level: Level, rows: Mapping[str, Any]) -> None:
        self._plan = plan
        self._level = level
        self._rows = rows
        self._of_arm: dict[int, Mask] = {
            arm: rows["arm"] == plan.arms[arm].name for arm in range(len(plan.arms))
        }
        self._latencies_us: dict[str, npt.NDArray[np.float64]] = {}
        self._is_counted: Mask = rows["slice_id"] >= PLAIN
        self._is_plain: Mask = rows["slice_id"] == PLAIN if level.tuples else self._is_counted

    def add_to(self, profile: LevelProfile, positions: Mapping[int, int]) -> None:
        """Add these rows to the profile of their level."""
        plan = self._plan
        profile.requests += int(self._is_counted.sum())
        for metric in per_request_metrics(self._level):
            for arm in plan.claimed_arms:
                key = plan.arms[arm].role, metric
                distribution = profile.distributions.setdefault(key, Distribution())
                distribution.add(self._plain_us(metric, arm))
        if self._is_complete():
            for metric in per_request_metrics(self._level):
                profile.log_deciles.setdefault(metric, []).append(self._log_deciles(metric))
            profile.positions.append([positions[arm] for arm in plan.claimed_arms])
            if self._level.tuples:
                self._add_time_courses(profile)
        self._add_phases(profile)

    def _is_complete(self) -> bool:
        """Report whether every claimed arm has requests."""
        return all((self._is_plain & self._of_arm[arm]).any() for arm in self._plan.claimed_arms)

    def _plain_us(self, metric: str, arm: int) -> npt.NDArray[np.float64]:
        return self._us(metric)[self._is_plain & self._of_arm[arm]]

    def _us(self, metric: str) -> npt.NDArray[np.float64]:
        if metric not in self._latencies_us:
            self._latencies_us[metric] = latencies_us(self._level, metric, self._rows)
        return self._latencies_us[metric]

    def _log_deciles(self, metric: str) -> Matrix:
        """Return (claimed arms, 9) log µs."""
        deciles = [
            np.percentile(self._plain_us(metric, arm), DECILES) for arm in self._plan.claimed_arms
        ]
        return np.log(np.maximum(np.array(deciles), 1e-3))

    def _add_time_courses(self, profile: LevelProfile) -> None:
        """Add the log ratios of each plain block, averaged over each part of the restart."""
        by_arm = self._logs_of_shared_blocks()
        if not by_arm:
            return
        reference, second_reference = (by_arm[arm] for arm in self._plan.indices("reference"))
        candidate, second_candidate = (by_arm[arm] for arm in self._plan.indices("candidate"))
        same_model = second_reference - reference
        difference = (candidate + second_candidate - reference - second_reference) / 2
        profile.same_model.append(_mean_of_parts(same_model))
        profile.candidate.append(_mean_of_parts(difference))

    def _logs_of_shared_blocks(self) -> dict[int, Matrix]:
        """Return by claimed arm the log µs of the blocks that all of them have, in their order.

        Nothing is returned for fewer than two such blocks.
        """
        metric = "inference" if self._plan.server_timing else "end_to_end"
        blocks, logs = {}, {}
        for arm in self._plan.claimed_arms:
            chosen = self._is_plain & self._of_arm[arm]
            blocks[arm], first = np.unique(self._rows["block_id"][chosen], return_index=True)
            logs[arm] = np.log(np.maximum(self._plain_us(metric, arm)[first], 1e-3))
        shared = functools.reduce(np.intersect1d, blocks.values())
        if len(shared) < 2:
            return {}
        return {arm: logs[arm][np.isin(blocks[arm], shared)] for arm in blocks}

    def _add_phases(self, profile: LevelProfile) -> None:
        total_us = self._us("end_to_end")
        for role, kind in _ROLE_BLOCKS.items():
            names = [self._plan.arms[arm].name for arm in self._plan.indices(role)]
            is_measured = self._rows["slice_id"] == kind if self._level.tuples else self._is_plain
            chosen = self._rows["arm"].isin(names) & is_measured
            if not chosen.any():
                continue
            known = [float(self._rows[f"{phase}_us"][chosen].sum()) for phase in PHASES[:-1]]
            rest = float(total_us[chosen].sum()) - sum(known)
            sums = profile.phases.setdefault(role, PhaseSums())
            sums.requests += int(chosen.sum())
            sums.sums_us += np.array([*known, rest])


def _mean_of_parts(ratios: Matrix) -> Matrix:
    parts = np.array_split(ratios, min(TIME_COURSE_PARTS, len(ratios)))
    return np.array([part.mean() for part in parts])
