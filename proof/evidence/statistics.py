"""
From latencies to an interval: one number a restart, Student's t over restarts.

Noise inside a restart, autocorrelation included, is in the scatter between restarts already,
so nothing is resampled and K × arms numbers are enough to check a result by hand.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

Matrix = npt.NDArray[np.float64]


def summarize_latencies(latencies: npt.NDArray[np.float64]) -> dict[str, float]:
    """p50, p95, p99 (numpy's linear interpolation) and the mean of latencies, in their unit."""
    p50, p95, p99 = np.percentile(latencies, (50, 95, 99)).tolist()
    return {"p50": p50, "mean": float(latencies.mean()), "p95": p95, "p99": p99}


@dataclass(frozen=True)
class Estimate:
    """δ, its standard error and degrees of freedom; all on the log scale."""

    delta: float
    error: float
    freedom: int

    @property
    def ratio(self) -> float:
        return math.exp(self.delta)

    def interval(self, confidence: float) -> tuple[float, float]:
        """The two-sided interval of that confidence, log scale."""
        reach = t_quantile(0.5 + confidence / 2, self.freedom) * self.error
        return self.delta - reach, self.delta + reach


@functools.lru_cache(maxsize=1024)
def t_quantile(probability: float, freedom: int) -> float:
    """Student's t; scipy takes a tenth of a millisecond for each, and a simulation asks for the
    same ones.
    """
    return float(student_t.ppf(probability, freedom))


def adjusted_contrast(y: Matrix, positions: npt.NDArray[np.int64], contrast: Matrix) -> Estimate:
    """The mean contrast over restarts, with the scatter that load position causes taken out of its
    error.

    `y` (K, arms) holds log statistics, `positions` (K, arms) each arm's place in the load order,
    `contrast` (arms,) sums to zero. With e the deviations from each restart's mean, π[p] the mean
    of e over the cells loaded at p, and û = e − (arm means of e) − π:

        δ = mean_r Σ_a c·y      s² = Σ_r (Σ_a c·û)² / (K − 2)      error = s / √K,  K − 2 degrees of
            freedom
    """
    restarts = len(y)
    residual = position_residuals(y, positions) @ contrast
    s = math.sqrt(float((residual**2).sum()) / (restarts - 2))
    return Estimate(float((y @ contrast).mean()), s / math.sqrt(restarts), restarts - 2)


def position_residuals(y: Matrix, positions: npt.NDArray[np.int64]) -> Matrix:
    """û, (K, arms): what is left of y when restart, arm and load position are taken out."""
    e = y - y.mean(axis=1, keepdims=True)
    pi = np.zeros_like(e)
    for p in np.unique(positions):
        pi[positions == p] = e[positions == p].mean()
    residuals: Matrix = e - e.mean(axis=0, keepdims=True) - pi
    return residuals


def plain_contrast(differences: npt.NDArray[np.float64]) -> Estimate:
    """The mean of one difference a restart, with Student's usual error."""
    restarts = len(differences)
    return Estimate(
        float(differences.mean()),
        float(differences.std(ddof=1)) / math.sqrt(restarts),
        restarts - 1,
    )


def slope(values: npt.NDArray[np.float64]) -> float:
    """Least-squares change of `values` from the first to the last of them."""
    place = np.linspace(-0.5, 0.5, len(values))
    return float((place @ (values - values.mean())) / (place @ place))


def sign_flip_p(differences: npt.NDArray[np.float64], bound: float, seed: int = 0) -> float:
    """A second opinion without a normal law: how often the mean of randomly signed deviations from
    the nearer bound is as small.

    Tests |δ| ≥ bound against |δ| < bound, one-sided, from one difference a restart, (K,): every
    pattern of signs up to K = 12, 4,096 seeded ones beyond. Small says equivalent.
    """
    deviations = (
        np.abs(differences.mean())
        - bound
        + (differences - differences.mean()) * np.sign(differences.mean() or 1.0)
    )
    count = len(deviations)
    means = _signs(count, seed) @ deviations / count
    return float((means <= deviations.mean() + 1e-15).mean())


@functools.lru_cache(maxsize=32)
def _signs(count: int, seed: int) -> Matrix:
    """(patterns, count) of −1 and 1."""
    if count <= 12:
        return np.array(list(itertools.product((-1.0, 1.0), repeat=count)))
    signs: Matrix = np.where(
        np.random.RandomState(seed).random_sample((4096, count)) < 0.5, -1.0, 1.0
    )
    return signs
