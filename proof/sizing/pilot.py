"""
The noise of a machine, from a pilot: an A/A run, whose arms are all the reference.

    evidence of a pilot → read_pilot → Pilot: covariance between restarts, noise within a restart,
                                       seconds, gain
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from command import BadInput
from proof.evidence.audit import audit_rows, check_restarts, loaded_models, read_sealed_plan
from proof.evidence.readings import (
    Readings,
    claimable,
    collect_readings,
    latencies_us,
    measured_metrics,
    read_restart,
)
from proof.evidence.slices import TAILS, Slices, read_slices, without_late_sets
from proof.evidence.statistics import Matrix, plain_contrast, position_residuals
from proof.evidence.store import (
    MANIFEST,
    Requests,
    RestartRecord,
    at_level,
    check_manifest,
    read_starts,
)
from proof.plans.plan import ADJUSTED, CLAIMABLE, DILATION, MOST_GAIN, Level, Plan
from proof.plans.schedule import PLAIN, load_positions

FEWEST_PILOT_RESTARTS = 12
"""Fewest restarts of a pilot that must count."""
RESAMPLED_TOGETHER = 8
"""Consecutive blocks that are resampled together, because neighbours in time share their noise."""
RESAMPLES = 60
"""Number of resamples of each restart."""
FEWEST_SETS = 4
"""Fewest sets of slices that show their own scatter; that of fewer counts as the restart's."""


@dataclass(frozen=True)
class Noise:
    """One statistic's noise at the pilot's size, on the log scale."""

    position_effect: float
    """Difference between the slowest and the fastest load position."""
    instance_sd: float
    """Standard deviation of the contrast between starts, beyond what the rows explain."""
    w: float
    """Standard deviation of the contrast within a restart, × √(rows of an arm)."""
    autocorrelation: float
    """Correlation of neighbouring requests to one arm."""
    gain: float | None
    """`switchback`: lower 80 % bound of the factor by which the queue multiplies a change of
    service time.
    """
    reference_us: float
    """The statistic itself in microseconds, over all arms."""
    beta: float | None = None
    """Of an adjusted statistic: the change of a slice's log latency for each unit of its log
    dilation.
    """


@dataclass(frozen=True)
class PilotLevel:
    """The noise at one level."""

    level: Level
    seconds: float
    """Mean duration of the level in one restart."""
    keys: tuple[tuple[str, str], ...]
    """(metric, statistic) of the q columns below."""
    noise: Mapping[tuple[str, str], Noise]
    """Noise of each of them."""
    contrasts: Matrix
    """(K, q) position-adjusted contrasts of candidate and reference, which are one model here."""
    within: Matrix
    """(q, q) covariance of the contrast that a restart's own rows explain."""
    busy_share: float = math.nan
    """Mean share of time in which the engine was busy; NaN where it is not known."""


@dataclass(frozen=True)
class Pilot:
    """The noise that a plan's size is computed from."""

    plan: Plan
    """The pilot's own plan."""
    evidence_digest: str
    """SHA-256 of the manifest of its evidence."""
    restarts: int
    """Number of restarts that count."""
    start_s: float
    """Seconds of a restart without its requests: the start of the servers."""
    levels: Mapping[str, PilotLevel]
    """Levels by their names."""

    def to_json(self) -> str:
        """Return pilot.json: what the plan was computed from, so that it can be checked."""
        return (
            json.dumps(
                {
                    "schema_version": 1,
                    "pilot_evidence": self.evidence_digest,
                    "pilot_plan": self.plan.digest,
                    "restarts": self.restarts,
                    "start_s": round(self.start_s, 3),
                    "capacity_per_s": self.plan.capacity_per_s,
                    "levels": {name: _level_to_json(level) for name, level in self.levels.items()},
                },
                indent=1,
            )
            + "\n"
        )


def _level_to_json(pilot: PilotLevel) -> dict[str, Any]:
    statistics = {}
    for (metric, name), noise in pilot.noise.items():
        statistics[f"{metric}.{name}"] = {
            key: None if value is None else float(f"{value:.6g}")
            for key, value in vars(noise).items()
            if key != "beta" or value is not None
        }
    load: dict[str, Any] = {}
    if not math.isnan(pilot.busy_share):
        load = {"rate_per_s": pilot.level.rate_per_s, "busy_share": round(pilot.busy_share, 4)}
    return load | {
        "seconds": round(pilot.seconds, 3),
        "tuples": pilot.level.tuples,
        "slice_requests": pilot.level.slice_requests,
        "sets": pilot.level.sets,
        "statistics": statistics,
    }


def read_pilot(folder: Path) -> Pilot:
    """Return the noise in a sealed A/A run.

    Raise BadInput if its arms are not one model or its restarts too few, EvidenceRejected if the
    evidence is not sound.
    """
    check_manifest(folder)
    plan, starts = read_sealed_plan(folder), read_starts(folder)
    _check_is_a_a(folder, plan)
    lines = audit_rows(folder, plan, starts)
    check_restarts(folder, lines)
    # What a level without a verdict takes, every restart takes: it counts as the start.
    plan = replace(plan, levels=plan.judged_levels)
    counted = [start for start in starts if not start.dropped]
    if len(counted) < FEWEST_PILOT_RESTARTS:
        raise BadInput(
            f"{folder} holds {len(counted)} restarts that count; a pilot needs"
            f" {FEWEST_PILOT_RESTARTS}."
        )
    if plan.schedule_version > 1:
        plan = _with_betas(folder, plan, counted)
        lines = _read_again(folder, plan, counted)
    samples = _read_samples(folder, plan, counted)
    levels = {}
    for level in plan.levels:
        readings = collect_readings(plan, level, lines)
        levels[level.name] = _pilot_level(plan, level, readings, samples[level.name])
    measured_s = np.sum([samples[level.name].seconds for level in plan.levels], axis=0)
    start_s = float(np.mean(np.array([start.seconds for start in counted]) - measured_s))
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return Pilot(plan, digest, len(counted), max(0.0, start_s), levels)


@dataclass
class _Samples:
    """What the rows of a level show, with one entry for each restart."""

    seconds: list[float] = field(default_factory=list)
    within: list[Matrix] = field(default_factory=list)
    """(q, q) covariances of the contrast; none at the level `capacity`."""
    autocorrelation: list[float] = field(default_factory=list)
    """Likewise."""


def _with_betas(folder: Path, plan: Plan, starts: Sequence[RestartRecord]) -> Plan:
    """Return the pilot's plan with the β of its slices, by least squares within sets.

    All arms are one model, so what differs within a set is noise, and the delay of the delayed
    arm, which is left out.
    """
    slices_by_level: dict[str, list[Slices]] = {}
    requests = Requests(folder)
    for start in starts:
        rows = requests.of(start.restart)
        for level in plan.levels:
            if level.kind == "switchback":
                level_rows = without_late_sets(plan, level, at_level(rows, level.name))
                slices = _slices(plan, level, start, level_rows)
                if (DILATION, "mean") in slices.logs:
                    slices_by_level.setdefault(level.name, []).append(slices)
    levels = []
    for level in plan.levels:
        of_level = slices_by_level.get(level.name)
        if of_level:
            betas = {name: _beta(plan, of_level, name) for name in CLAIMABLE[level.kind][ADJUSTED]}
            level = replace(level, betas={ADJUSTED: betas})
        levels.append(level)
    return replace(plan, levels=tuple(levels))


def _beta(plan: Plan, slices: Sequence[Slices], name: str) -> float:
    """Return the least-squares slope of log latency on log dilation, within sets of slices."""
    latency, dilation = (
        np.concatenate([_within_sets(each.table(key, plan.claimed_arms)) for each in slices])
        for key in (("end_to_end", name), (DILATION, "mean"))
    )
    return round(float((latency * dilation).sum() / max(1e-30, (dilation**2).sum())), 3)


def _within_sets(table: Matrix) -> Matrix:
    deviations: Matrix = table - table.mean(axis=1, keepdims=True)
    return deviations


def _slices(plan: Plan, level: Level, start: RestartRecord, rows: Mapping[str, Any]) -> Slices:
    latencies = {
        metric: latencies_us(level, metric, rows) for metric in measured_metrics(plan, level, rows)
    }
    return read_slices(plan, level, load_positions(plan, start.slot), rows, latencies)


def _read_again(folder: Path, plan: Plan, starts: Sequence[RestartRecord]) -> list[dict[str, Any]]:
    """Return the lines of restarts.csv with the adjusted statistics in them."""
    requests = Requests(folder)
    lines = []
    for start in starts:
        rows, positions = requests.of(start.restart), load_positions(plan, start.slot)
        for level in plan.levels:
            lines += read_restart(plan, level, start.restart, positions, rows)
    return lines


def _read_samples(folder: Path, plan: Plan, starts: Sequence[RestartRecord]) -> dict[str, _Samples]:
    requests = Requests(folder)
    samples = {level.name: _Samples() for level in plan.levels}
    for start in starts:
        rows = requests.of(start.restart)
        rng = np.random.default_rng(start.restart)
        for level in plan.levels:
            level_rows = at_level(rows, level.name)
            if plan.schedule_version > 1:
                level_rows = without_late_sets(plan, level, level_rows)
            duration_ns = int(level_rows["done_ns"].max()) - int(level_rows["scheduled_ns"].min())
            sample = samples[level.name]
            sample.seconds.append(duration_ns / 1e9)
            if level.kind != "capacity":
                if plan.schedule_version > 1 and level.kind == "switchback":
                    slices = _slices(plan, level, start, level_rows)
                    covariance = _covariance_of_sets(plan, level, slices, level_rows, rng)
                else:
                    covariance = _covariance_within(plan, level, level_rows, rng)
                sample.within.append(covariance)
                sample.autocorrelation.append(_autocorrelation(plan, level, level_rows))
    return samples


def _check_is_a_a(folder: Path, plan: Plan) -> None:
    """Raise BadInput unless all claimed arms are one model."""
    models = loaded_models(folder)
    arms = [plan.arms[i] for i in plan.claimed_arms]
    digests = {
        models.get(arm.name, {}).get("digest") if arm.artifact else f"{arm.url} {arm.model}"
        for arm in arms
    }
    if None in digests:
        raise BadInput(
            f"{folder}: environment.json does not say what every arm had loaded, so this cannot be"
            " known to be an A/A run."
        )
    if len(digests) != 1:
        raise BadInput(
            f"{folder} is no A/A run: its arms load {len(digests)} different artifacts; a pilot"
            " loads the reference four times."
        )


def _contrast(plan: Plan) -> Matrix:
    """Return the claim's weight of each claimed arm: candidates less references, half each."""
    references = plan.indices("reference")
    return np.array([-0.5 if arm in references else 0.5 for arm in plan.claimed_arms])


def _pilot_level(plan: Plan, level: Level, readings: Readings, samples: _Samples) -> PilotLevel:
    keys = tuple(key for key in claimable(level) if ("plain", *key) in readings.logs)
    arms, weights = plan.claimed_arms, _contrast(plan)
    positions = readings.positions[:, arms]
    logs = [readings.logs["plain", metric, name][:, arms] for metric, name in keys]
    contrasts = np.stack([position_residuals(y, positions) @ weights for y in logs], axis=1)
    within = np.zeros((len(keys), len(keys)))
    autocorrelation = 0.0
    if samples.within:
        within = np.mean(samples.within, axis=0)
        autocorrelation = float(np.mean(samples.autocorrelation))
    noise = {}
    for i, (metric, name) in enumerate(keys):
        deviations = logs[i] - logs[i].mean(axis=1, keepdims=True)
        effects = [deviations[positions == p].mean() for p in range(len(arms))]
        total = float((contrasts[:, i] ** 2).sum() / (len(contrasts) - 2))
        noise[metric, name] = Noise(
            position_effect=float(max(effects) - min(effects)),
            instance_sd=math.sqrt(max(0.0, total - within[i, i])),
            w=math.sqrt(within[i, i] * _rows_per_arm(level)),
            autocorrelation=autocorrelation,
            gain=_gain(plan, level, readings, metric, name),
            reference_us=float(np.exp(logs[i].mean())),
            beta=level.betas.get(metric, {}).get(name),
        )
    seconds = float(np.mean(samples.seconds))
    shares = readings.busy_shares[:, 0]
    busy_share = float(shares.mean()) if len(shares) else math.nan
    return PilotLevel(level, seconds, keys, noise, contrasts, within, busy_share)


def _rows_per_arm(level: Level) -> int:
    return level.tuples * 3 // 4 if level.tuples else level.slice_requests * level.sets or 1


def _gain(plan: Plan, level: Level, readings: Readings, metric: str, name: str) -> float | None:
    """Return the lower 80 % bound of the gain, within what is allowed; None without slices.

    The gain is the log ratio of delayed and plain slices of the second reference over log(1 + d),
    where d is the delay.
    """
    if level.kind != "switchback" or metric == DILATION:
        return None
    if plan.schedule_version > 1:
        if (metric, name) not in readings.delays:  # A tail has too few requests in a slice.
            return None
        log_ratios = readings.delays[metric, name]
    else:
        [delayed] = plan.indices("delayed")
        second_reference = plan.indices("reference")[1]
        y = readings.logs["plain", metric, name]
        log_ratios = y[:, delayed] - y[:, second_reference]
    low, _ = plain_contrast(log_ratios / math.log1p(plan.delay)).interval(0.6)
    return float(np.clip(low, 1.0, MOST_GAIN[plan.schedule_version][level.percent]))


def _covariance_within(
    plan: Plan, level: Level, rows: Mapping[str, Any], rng: np.random.Generator
) -> Matrix:
    """Return (q, q): the covariance of the contrast that one restart's own rows explain."""
    measured = measured_metrics(plan, level, rows)
    keys = [(metric, name) for metric, name in claimable(level) if metric in measured]
    slice_ids = rows["slice_id"]
    is_plain = slice_ids >= PLAIN if level.kind == "switchback" else slice_ids == PLAIN
    chosen = [is_plain & (rows["arm"] == plan.arms[arm].name) for arm in plan.claimed_arms]
    latencies = {}
    for metric, _ in keys:
        if metric not in latencies:
            values = latencies_us(level, metric, rows)
            latencies[metric] = np.stack([values[is_arm] for is_arm in chosen])
    sets = level.kind == "switchback" and level.sets >= FEWEST_SETS
    slice_requests = level.slice_requests if sets else 0
    return resampled_covariance(latencies, keys, _contrast(plan), rng, slice_requests)


def _covariance_of_sets(
    plan: Plan, level: Level, slices: Slices, rows: Mapping[str, Any], rng: np.random.Generator
) -> Matrix:
    """Return (q, q): the covariance of the contrast that one restart's sets of slices explain.

    Whole sets are resampled. The correction is that of `resampled_covariance`.
    """
    arms, weights = plan.claimed_arms, _contrast(plan)
    tails_us = {
        metric: _by_set(plan, level, latencies_us(level, metric, rows), rows)
        for metric in measured_metrics(plan, level, rows)
    }
    keys = [
        key
        for key in claimable(level)
        if key in slices.logs or (key[0] in tails_us and key[1] in TAILS)
    ]
    tables = {key: slices.table(key, arms) @ weights for key in keys if key in slices.logs}
    sets = len(np.unique(slices.set_number))
    draws = np.zeros((RESAMPLES, len(keys)))
    for draw in range(RESAMPLES):
        drawn = rng.integers(sets, size=sets)
        for column, (metric, name) in enumerate(keys):
            if (metric, name) in tables:
                draws[draw, column] = tables[metric, name][drawn].mean()
            else:
                us = tails_us[metric][:, drawn].reshape(len(arms), -1)
                draws[draw, column] = _log_statistics(us)[name] @ weights
    covariance: Matrix = np.atleast_2d(np.cov(draws, rowvar=False))
    return covariance * sets / max(1, sets - 1)


def _by_set(plan: Plan, level: Level, us: Matrix, rows: Mapping[str, Any]) -> Matrix:
    """Return latencies as (arms, sets, requests of a slice)."""
    by_arm = [us[rows["arm"] == plan.arms[arm].name] for arm in plan.claimed_arms]
    return np.stack([of_arm.reshape(-1, level.slice_requests) for of_arm in by_arm])


def resampled_covariance(
    latencies: Mapping[str, Matrix],
    keys: Sequence[tuple[str, str]],
    contrast: Matrix,
    rng: np.random.Generator,
    slice_requests: int = 0,
) -> Matrix:
    """Return (q, q): the covariance of Σ contrast · log statistic, by a block bootstrap.

    `latencies` are (arms, n) by metric, `keys` the q pairs of metric and statistic. Neighbouring
    blocks are resampled together. With `slice_requests`, whole sets of slices are: a slice has a
    speed of its own that its rows do not show. Few sets scatter less than the population that they
    come from, by (sets − 1)/sets, which is corrected.
    """
    count = next(iter(latencies.values())).shape[1]
    size = slice_requests or min(RESAMPLED_TOGETHER, count)
    begins = np.arange(0, count - size + 1, slice_requests or 1)
    draws = np.zeros((RESAMPLES, len(keys)))
    for draw in range(RESAMPLES):
        drawn = rng.choice(begins, max(1, count // size))
        chosen = (drawn[:, None] + np.arange(size)).ravel()
        logs = {metric: _log_statistics(us[:, chosen]) for metric, us in latencies.items()}
        draws[draw] = [contrast @ logs[metric][name] for metric, name in keys]
    covariance: Matrix = np.atleast_2d(np.cov(draws, rowvar=False))
    return covariance * len(begins) / (len(begins) - 1) if slice_requests else covariance


def _log_statistics(latencies: Matrix) -> dict[str, Matrix]:
    """Return the log of each statistic, (arms,), of (arms, n) latencies."""
    p50, p95, p99 = np.log(np.percentile(latencies, (50, 95, 99), axis=1))
    return {"p50": p50, "p95": p95, "p99": p99, "mean": np.log(latencies.mean(axis=1))}


def _autocorrelation(plan: Plan, level: Level, rows: Mapping[str, Any]) -> float:
    metric = "inference" if plan.server_timing else "end_to_end"
    reference = plan.arms[plan.indices("reference")[0]].name
    chosen = (rows["arm"] == reference) & (rows["slice_id"] >= PLAIN)
    x = np.log(latencies_us(level, metric, rows)[chosen])
    x = x - x.mean()
    return float((x[1:] @ x[:-1]) / max(1e-30, x @ x))
