"""
What an A/A run tells about a machine's noise: the numbers that a plan's size rests on.

    evidence of a pilot → read_pilot → Pilot: covariance between restarts, noise within, seconds,
        gain
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from command import BadInput
from proof.evidence.audit import audit_rows, check_restarts, loaded_models, read_sealed_plan
from proof.evidence.readings import Readings, claimable, collect_readings, latencies_us
from proof.evidence.statistics import Matrix, plain_contrast, position_residuals
from proof.evidence.store import MANIFEST, Requests, at_level, check_manifest, read_starts
from proof.plans.plan import MOST_GAIN, Level, Plan
from proof.plans.schedule import PLAIN

FEWEST_PILOT_RESTARTS = 12
# Consecutive tuples are resampled together, for neighbours in time share their noise.
BLOCK_TUPLES = 8
RESAMPLES = 60
# Sets of slices in a restart from which their scatter can be told; with fewer it counts as the
# restart's.
FEWEST_SETS = 4


@dataclass(frozen=True)
class Noise:
    """One statistic's noise at the pilot's size, on the log scale."""

    position_effect: float
    """Between the slowest and the fastest load position."""
    instance_sd: float
    """Of the contrast, from start to start, beyond what its rows explain."""
    w: float
    """Standard deviation of the contrast within a restart × √rows an arm."""
    autocorrelation: float
    """Of neighbouring requests to one arm."""
    gain: float | None
    """`switchback`: lower 80 % bound of what the queue makes of 1 % of service time."""
    reference_us: float


@dataclass(frozen=True)
class PilotLevel:
    level: Level
    seconds: float
    """Of one restart, spent at this level."""
    keys: tuple[tuple[str, str], ...]
    """(metric, statistic)"""
    noise: Mapping[tuple[str, str], Noise]
    contrasts: Matrix
    """(K, q) position-adjusted contrasts of candidate and reference, which are one model here"""
    within: Matrix
    """(q, q) covariance of the contrast that a restart's own rows explain"""


@dataclass(frozen=True)
class Pilot:
    plan: Plan
    evidence_digest: str
    restarts: int
    start_s: float
    """A start of the servers, and whatever else is no request."""
    levels: Mapping[str, PilotLevel]

    def to_json(self) -> str:
        """pilot.json: what the plan was computed from, for whoever wants to compute it again."""
        return (
            json.dumps(
                {
                    "schema_version": 1,
                    "pilot_evidence": self.evidence_digest,
                    "pilot_plan": self.plan.digest,
                    "restarts": self.restarts,
                    "start_s": round(self.start_s, 3),
                    "capacity_per_s": self.plan.capacity_per_s,
                    "levels": {name: _described(level) for name, level in self.levels.items()},
                },
                indent=1,
            )
            + "\n"
        )


def _described(found: PilotLevel) -> dict[str, Any]:
    return {
        "seconds": round(found.seconds, 3),
        "tuples": found.level.tuples,
        "slice_requests": found.level.slice_requests,
        "sets": found.level.sets,
        "statistics": {
            f"{metric}.{name}": {
                key: None if value is None else float(f"{value:.6g}")
                for key, value in vars(noise).items()
            }
            for (metric, name), noise in found.noise.items()
        },
    }


def read_pilot(folder: Path) -> Pilot:
    """The noise in a sealed A/A run; BadInput if its arms are not one model or its restarts too
    few, EvidenceRejected if it is not sound.
    """
    check_manifest(folder)
    plan, starts = read_sealed_plan(folder), read_starts(folder)
    _check_same(folder, plan)
    lines = audit_rows(folder, plan, starts)
    check_restarts(folder, lines)
    kept = [start for start in starts if not start.dropped]
    if len(kept) < FEWEST_PILOT_RESTARTS:
        raise BadInput(
            f"{folder} holds {len(kept)} restarts that count; a pilot needs"
            f" {FEWEST_PILOT_RESTARTS}."
        )
    requests = Requests(folder)
    seconds: dict[str, list[float]] = {level.name: [] for level in plan.levels}
    within: dict[str, list[Matrix]] = {level.name: [] for level in plan.levels}
    correlation: dict[str, list[float]] = {level.name: [] for level in plan.levels}
    for start in kept:
        rows = requests.of(start.restart)
        rng = np.random.default_rng(start.restart)
        for level in plan.levels:
            here = at_level(rows, level.name)
            seconds[level.name].append(
                (int(here["done_ns"].max()) - int(here["scheduled_ns"].min())) / 1e9
            )
            if level.kind != "capacity":
                within[level.name].append(_resampled(plan, level, here, rng))
                correlation[level.name].append(_autocorrelation(plan, level, here))
    levels = {}
    for level in plan.levels:
        found = collect_readings(plan, level, lines)
        levels[level.name] = _level(
            plan,
            level,
            found,
            float(np.mean(seconds[level.name])),
            within[level.name],
            correlation[level.name],
        )
    measured = np.sum([seconds[level.name] for level in plan.levels], axis=0)
    start_s = float(np.mean(np.array([start.seconds for start in kept]) - measured))
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return Pilot(plan, digest, len(kept), max(0.0, start_s), levels)


def _check_same(folder: Path, plan: Plan) -> None:
    models = loaded_models(folder)
    arms = [plan.arms[i] for i in plan.claimed_arms]
    digests = {
        models.get(arm.name, {}).get("digest") if arm.artifact else f"{arm.url} {arm.model}"
        for arm in arms
    }
    if None in digests:
        raise BadInput(
            f"{folder}: environment.json does not say what every arm had loaded, so this cannot be"
            " told to be an A/A run."
        )
    if len(digests) != 1:
        raise BadInput(
            f"{folder} is no A/A run: its arms load {len(digests)} different artifacts; a pilot"
            " loads the reference four times."
        )


def _claim(plan: Plan) -> dict[int, float]:
    return dict.fromkeys(plan.indices("reference"), -0.5) | dict.fromkeys(
        plan.indices("candidate"), 0.5
    )


def _level(
    plan: Plan,
    level: Level,
    found: Readings,
    seconds: float,
    within: Sequence[Matrix],
    correlation: Sequence[float],
) -> PilotLevel:
    keys = tuple(
        (metric, name) for metric, name in claimable(level) if ("plain", metric, name) in found.logs
    )
    arms = plan.claimed_arms
    c = np.array([_claim(plan)[a] for a in arms])
    contrasts = np.stack(
        [
            position_residuals(found.logs["plain", m, s][:, arms], found.positions[:, arms]) @ c
            for m, s in keys
        ],
        axis=1,
    )
    covariance = np.mean(within, axis=0) if within else np.zeros((len(keys), len(keys)))
    rows = _rows_an_arm(level)
    noise = {}
    for i, (metric, name) in enumerate(keys):
        y = found.logs["plain", metric, name][:, arms]
        e = y - y.mean(axis=1, keepdims=True)
        effects = [e[found.positions[:, arms] == p].mean() for p in range(len(arms))]
        total = float((contrasts[:, i] ** 2).sum() / (len(contrasts) - 2))
        noise[metric, name] = Noise(
            position_effect=float(max(effects) - min(effects)),
            instance_sd=math.sqrt(max(0.0, total - covariance[i, i])),
            w=math.sqrt(covariance[i, i] * rows),
            autocorrelation=float(np.mean(correlation)) if correlation else 0.0,
            gain=_gain(plan, level, found, metric, name),
            reference_us=float(np.exp(y.mean())),
        )
    return PilotLevel(level, seconds, keys, noise, contrasts, covariance)


def _rows_an_arm(level: Level) -> int:
    return level.tuples * 3 // 4 if level.tuples else level.slice_requests * level.sets or 1


def _gain(plan: Plan, level: Level, found: Readings, metric: str, name: str) -> float | None:
    """log ratio of delayed and plain slices of the second reference / log(1 + d): its lower 80 %
    bound, within what is allowed.
    """
    if level.kind != "switchback":
        return None
    [delayed], again = plan.indices("delayed"), plan.indices("reference")[1]
    y = found.logs["plain", metric, name]
    low, _ = plain_contrast((y[:, delayed] - y[:, again]) / math.log1p(plan.delay)).interval(0.6)
    return float(np.clip(low, 1.0, MOST_GAIN[level.percent]))


def _resampled(
    plan: Plan, level: Level, rows: Mapping[str, Any], rng: np.random.Generator
) -> Matrix:
    """(q, q) covariance of the contrast that one restart's own rows explain."""
    keys = [(m, s) for m, s in claimable(level) if m != "inference" or plan.server_timing]
    plain = rows["slice_id"] >= PLAIN if level.kind == "switchback" else rows["slice_id"] == PLAIN
    arms = plan.claimed_arms
    table = {
        metric: np.stack(
            [
                latencies_us(level, metric, rows)[plain & (rows["arm"] == plan.arms[a].name)]
                for a in arms
            ]
        )
        for metric in dict.fromkeys(metric for metric, _ in keys)
    }
    sets = level.kind == "switchback" and level.sets >= FEWEST_SETS
    return resampled_covariance(
        table,
        keys,
        np.array([_claim(plan)[a] for a in arms]),
        rng,
        level.slice_requests if sets else 0,
    )


def resampled_covariance(
    table: Mapping[str, Matrix],
    keys: Sequence[tuple[str, str]],
    contrast: Matrix,
    rng: np.random.Generator,
    slice_requests: int = 0,
) -> Matrix:
    """(q, q) covariance of Σ contrast · log statistic, by resampling blocks of neighbours from
    latencies (arms, n) by metric.

    Blocks are neighbouring tuples, or, with `slice_requests`, whole sets of slices: a slice has a
    speed of its own, which its rows know nothing of. Few sets scatter less than what they came
    from, by (sets − 1)/sets, which is given back.
    """
    count = next(iter(table.values())).shape[1]
    size = slice_requests or min(BLOCK_TUPLES, count)
    places = np.arange(0, count - size + 1, slice_requests or 1)
    draws = np.zeros((RESAMPLES, len(keys)))
    for draw in range(RESAMPLES):
        first = rng.choice(places, max(1, count // size))
        chosen = (first[:, None] + np.arange(size)).ravel()
        for metric, latencies in table.items():
            quantiles = np.log(np.percentile(latencies[:, chosen], (50, 95, 99), axis=1))
            found = dict(zip(("p50", "p95", "p99"), quantiles, strict=True)) | {
                "mean": np.log(latencies[:, chosen].mean(axis=1))
            }
            for i, (m, name) in enumerate(keys):
                if m == metric:
                    draws[draw, i] = contrast @ found[name]
    covariance: Matrix = np.atleast_2d(np.cov(draws, rowvar=False))
    return covariance * len(places) / (len(places) - 1) if slice_requests else covariance


def _autocorrelation(plan: Plan, level: Level, rows: Mapping[str, Any]) -> float:
    metric = "inference" if plan.server_timing else "end_to_end"
    mine = (rows["arm"] == plan.arms[plan.indices("reference")[0]].name) & (
        rows["slice_id"] >= PLAIN
    )
    x = np.log(latencies_us(level, metric, rows)[mine])
    x = x - x.mean()
    return float((x[1:] @ x[:-1]) / max(1e-30, x @ x))
