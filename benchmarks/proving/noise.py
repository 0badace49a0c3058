"""
Latencies that were never measured: known laws with the noises that real ones have, for trying the
judge on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from proof.evidence.readings import Readings
from proof.evidence.statistics import position_residuals, slope
from proof.plans.counterbalance import balanced_orders
from proof.plans.plan import STATISTICS, Arm, Level, Plan
from proof.sizing.pilot import Noise, Pilot, PilotLevel, resampled_covariance

Array = npt.NDArray[np.float64]

# By load position, as measured on real servers: the first copy loaded is slower.
POSITION = np.array([0.011, 0.001, -0.007, -0.006])
INSTANCE_SD = 0.0035
RESTART_SD = 0.10


@dataclass(frozen=True)
class World:
    """A law of latencies. All shares are of requests, all sizes relative."""

    name: str
    sigma: float = 0.15
    """Of the logarithm, from request to request."""
    drift: float = 0.0
    """Common change from the first to the last request of a restart."""
    burst_share: float = 0.0
    """Of the time a neighbour is busy; bursts last 15 tuples and slow everybody."""
    tail_share: float = 0.0
    """Of requests whose time has a heavy tail (Pareto, index 2) on top."""


WORLDS = (
    World("log-normal"),
    World("common drift", drift=0.3),
    World("neighbours' bursts", burst_share=0.10),
    World("heavy tails", tail_share=0.02),
    World("all of them", drift=0.3, burst_share=0.10, tail_share=0.02),
)


def plan_of(restarts: int, rows: int, margins: Mapping[str, float]) -> Plan:
    """A plan that claims `margins` of inference time at one level."""
    arms = (
        Arm("bert", "reference", artifact="a"),
        Arm("bert-again", "reference", artifact="a"),
        Arm("drbert", "candidate", artifact="b"),
        Arm("drbert-again", "candidate", artifact="b"),
        Arm("bert-delayed", "delayed"),
    )
    level = Level(
        "unloaded", "unloaded", tuples=rows * 4 // 3, margins={"inference": dict(margins)}
    )
    return Plan(
        Path("simulated"),
        hashlib.sha256(b"simulated").hexdigest(),
        "simulated",
        "equivalence",
        0,
        Path("-"),
        arms,
        restarts,
        (level,),
    )


def run_of(
    world: World, restarts: int, rows: int, ratio: float, delay: float, rng: np.random.Generator
) -> Readings:
    """What a run of that size would read: candidates take `ratio` times the references' time."""
    plain, control, positions = _latencies(world, restarts, rows, ratio, delay, rng)
    logs = {}
    for block, latencies in (("plain", plain), ("control", control)):
        quantiles = np.percentile(latencies, (50, 95, 99), axis=-1)
        found = dict(zip(("p50", "p95", "p99"), quantiles, strict=True)) | {
            "mean": latencies.mean(axis=-1)
        }
        for name in STATISTICS:
            y = np.full((restarts, 5), np.nan)
            y[:, :4] = np.log(found[name])
            if block == "control":  # The second reference's place is the delayed arm's.
                y[:, 4], y[:, 1] = y[:, 1].copy(), np.nan
            logs[block, "inference", name] = y
    drift = np.array([slope(np.log(here[1]) - np.log(here[0])) for here in plain])
    return Readings(
        tuple(range(restarts)), np.column_stack([positions, positions[:, 1]]), logs, drift
    )


def pilot_of(world: World, restarts: int, rows: int, rng: np.random.Generator) -> Pilot:
    """What an A/A pilot of that size would say."""
    plan = plan_of(restarts, rows, dict.fromkeys(STATISTICS, 0.02))
    [level] = plan.levels
    plain, _, positions = _latencies(world, restarts, rows, 1.0, 0.0, rng)
    found = Readings(tuple(range(restarts)), positions, _plain_logs(plain), np.empty(0))
    keys = tuple(("inference", name) for name in STATISTICS)
    contrast = np.array([-0.5, -0.5, 0.5, 0.5])
    contrasts = np.stack(
        [position_residuals(found.logs["plain", *key], positions) @ contrast for key in keys],
        axis=1,
    )
    within = np.mean(
        [resampled_covariance({"inference": here}, keys, contrast, rng) for here in plain], axis=0
    )
    noise = dict.fromkeys(keys, Noise(0.0, 0.0, 0.0, 0.0, None, 1000.0))
    return Pilot(
        plan,
        "",
        restarts,
        10.0,
        {"unloaded": PilotLevel(level, rows * 0.05, keys, noise, contrasts, within)},
    )


def _plain_logs(plain: Array) -> dict[tuple[str, str, str], Array]:
    quantiles = np.log(np.percentile(plain, (50, 95, 99), axis=-1))
    found = dict(zip(("p50", "p95", "p99"), quantiles, strict=True)) | {
        "mean": np.log(plain.mean(axis=-1))
    }
    return {("plain", "inference", name): found[name] for name in STATISTICS}


def _latencies(
    world: World, restarts: int, rows: int, ratio: float, delay: float, rng: np.random.Generator
) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """Microseconds of plain (K, 4, n) and control tuples (K, 4, n/3), and load positions (K, 4)."""
    orders = balanced_orders(4, restarts, np.random.RandomState(rng.integers(2**32)))[:restarts]
    positions = np.argsort(orders, axis=1)
    copies = (
        np.log([1.0, 1.0, ratio, ratio])
        + POSITION[positions]
        + INSTANCE_SD * rng.standard_normal((restarts, 4))
    )
    count = rows + rows // 3
    common = RESTART_SD * rng.standard_normal((restarts, 1)) + world.drift * (
        np.arange(count) / count - 0.5
    )
    if world.burst_share:
        begins = rng.random((restarts, count)) < world.burst_share / 15
        height = np.where(begins, rng.exponential(0.5, begins.shape), 0.0)
        for later in range(1, 15):
            height[:, later:] = np.maximum(
                height[:, later:], np.where(begins[:, :-later], height[:, :-later], 0.0)
            )
        common = common + np.log1p(height)
    logs = (
        common[:, None, :]
        + copies[:, :, None]
        + world.sigma * rng.standard_normal((restarts, 4, count))
    )
    if world.tail_share:
        logs += np.where(
            rng.random(logs.shape) < world.tail_share, np.log1p(rng.pareto(2.0, logs.shape)), 0.0
        )
    latencies = 1000 * np.exp(logs)
    plain, control = latencies[:, :, :rows], latencies[:, :, rows:]
    control[:, 1] *= 1 + delay
    return plain, control, positions
