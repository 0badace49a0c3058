"""
Simulated latencies: known distributions with the noises of real ones, to calibrate the judge.
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

POSITION = np.array([0.011, 0.001, -0.007, -0.006])
"""Effect of the load position, as measured on real servers: the copy loaded first is slower."""
INSTANCE_SD = 0.0035
"""Standard deviation of the log latency among loaded copies."""
RESTART_SD = 0.10
"""Standard deviation of the log latency among restarts."""
BURST_BLOCKS = 15
"""Duration of a neighbour's burst, in blocks."""


@dataclass(frozen=True)
class LatencyModel:
    """A distribution of latencies; shares are fractions of requests, sizes relative."""

    name: str
    sigma: float = 0.15
    """Standard deviation of the log latency among requests."""
    drift: float = 0.0
    """Change of all log latencies from the first to the last request of a restart."""
    burst_share: float = 0.0
    """Share of the time in which a neighbour's burst slows all arms."""
    tail_share: float = 0.0
    """Share of the requests that a heavy tail (Pareto, index 2) lengthens."""


LATENCY_MODELS = (
    LatencyModel("log-normal"),
    LatencyModel("common drift", drift=0.3),
    LatencyModel("neighbours' bursts", burst_share=0.10),
    LatencyModel("heavy tails", tail_share=0.02),
    LatencyModel("all of them", drift=0.3, burst_share=0.10, tail_share=0.02),
)


def simulated_plan(restarts: int, rows: int, margins: Mapping[str, float]) -> Plan:
    """Return a plan that claims `margins` for the inference time at one level."""
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


def simulate_run(
    model: LatencyModel,
    restarts: int,
    rows: int,
    ratio: float,
    delay: float,
    rng: np.random.Generator,
) -> Readings:
    """Return the readings of a simulated run of `restarts` restarts with `rows` rows per arm.

    Candidates take `ratio` times the references' time, the positive control 1 + `delay` times.
    """
    plain, control, positions = _latencies(model, restarts, rows, ratio, delay, rng)
    logs = {}
    for block, latencies in (("plain", plain), ("control", control)):
        values = _log_statistics(latencies)
        for name in STATISTICS:
            y = np.full((restarts, 5), np.nan)
            y[:, :4] = values[name]
            if block == "control":  # The delayed arm has the second reference's position.
                y[:, 4], y[:, 1] = y[:, 1].copy(), np.nan
            logs[block, "inference", name] = y
    drift = np.array([slope(np.log(here[1]) - np.log(here[0])) for here in plain])
    return Readings(
        tuple(range(restarts)), np.column_stack([positions, positions[:, 1]]), logs, drift
    )


def simulate_pilot(
    model: LatencyModel, restarts: int, rows: int, rng: np.random.Generator
) -> Pilot:
    """Return a simulated A/A pilot of `restarts` restarts with `rows` rows per arm."""
    plan = simulated_plan(restarts, rows, dict.fromkeys(STATISTICS, 0.02))
    [level] = plan.levels
    plain, _, positions = _latencies(model, restarts, rows, 1.0, 0.0, rng)
    values = _log_statistics(plain)
    logs = {("plain", "inference", name): values[name] for name in STATISTICS}
    keys = tuple(("inference", name) for name in STATISTICS)
    contrast = np.array([-0.5, -0.5, 0.5, 0.5])
    contrasts = np.stack(
        [position_residuals(logs["plain", *key], positions) @ contrast for key in keys],
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


def _log_statistics(latencies: Array) -> dict[str, Array]:
    """Return the logarithm of each statistic over the last axis."""
    p50, p95, p99 = np.log(np.percentile(latencies, (50, 95, 99), axis=-1))
    return {"p50": p50, "p95": p95, "p99": p99, "mean": np.log(latencies.mean(axis=-1))}


def _latencies(
    model: LatencyModel,
    restarts: int,
    rows: int,
    ratio: float,
    delay: float,
    rng: np.random.Generator,
) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """Return latencies and load positions of K restarts.

    They are the microseconds of plain (K, 4, n) and control blocks (K, 4, n/3), and positions
    (K, 4).
    """
    orders = balanced_orders(4, restarts, np.random.RandomState(rng.integers(2**32)))[:restarts]
    positions = np.argsort(orders, axis=1)
    copies = (
        np.log([1.0, 1.0, ratio, ratio])
        + POSITION[positions]
        + INSTANCE_SD * rng.standard_normal((restarts, 4))
    )
    count = rows + rows // 3
    drift = model.drift * (np.arange(count) / count - 0.5)
    common = RESTART_SD * rng.standard_normal((restarts, 1)) + drift
    if model.burst_share:
        common = common + np.log1p(_bursts(model, restarts, count, rng))
    logs = (
        common[:, None, :]
        + copies[:, :, None]
        + model.sigma * rng.standard_normal((restarts, 4, count))
    )
    if model.tail_share:
        lengthened = rng.random(logs.shape) < model.tail_share
        logs += np.where(lengthened, np.log1p(rng.pareto(2.0, logs.shape)), 0.0)
    latencies = 1000 * np.exp(logs)
    plain, control = latencies[:, :, :rows], latencies[:, :, rows:]
    control[:, 1] *= 1 + delay
    return plain, control, positions


def _bursts(model: LatencyModel, restarts: int, count: int, rng: np.random.Generator) -> Array:
    """Return the relative slowdown by neighbours' bursts, (restarts, count)."""
    begins = rng.random((restarts, count)) < model.burst_share / BURST_BLOCKS
    height = np.where(begins, rng.exponential(0.5, begins.shape), 0.0)
    for later in range(1, BURST_BLOCKS):
        height[:, later:] = np.maximum(
            height[:, later:], np.where(begins[:, :-later], height[:, :-later], 0.0)
        )
    return height
