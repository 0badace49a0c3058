"""
From latencies to an interval: one number for each restart, Student's t over restarts.

The scatter between restarts already contains the noise inside a restart, autocorrelation included.
So nothing is resampled, and K × arms numbers are enough to check a result by hand.
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
    """Return p50, p95, p99 (NumPy's linear interpolation) and mean of latencies, in their unit."""
    p50, p95, p99 = np.percentile(latencies, (50, 95, 99)).tolist()
    return {"p50": p50, "mean": float(latencies.mean()), "p95": p95, "p99": p99}


@dataclass(frozen=True)
class Estimate:
    """An estimated difference δ on the log scale."""

    delta: float
    """The difference: the log of a ratio."""
    error: float
    """Its standard error."""
    freedom: int
    """Degrees of freedom of the error."""

    @property
    def ratio(self) -> float:
        """The estimated ratio, exp(δ)."""
        return math.exp(self.delta)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the two-sided interval of that confidence, on the log scale."""
        reach = t_quantile(0.5 + confidence / 2, self.freedom) * self.error
        return self.delta - reach, self.delta + reach


@functools.lru_cache(maxsize=1024)
def t_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t.

    Cached: SciPy takes 0.1 ms for each, and simulations need the same ones over and over.
    """
    return float(student_t.ppf(probability, freedom))


def adjusted_contrast(y: Matrix, positions: npt.NDArray[np.int64], contrast: Matrix) -> Estimate:
    """Estimate the mean contrast over restarts, without the scatter that load position causes.

    `y` (K, arms) are log statistics, `positions` (K, arms) each arm's position in the load order,
    `contrast` (arms,) sums to zero. With e the deviations from each restart's mean, π[p] the mean
    of e over the cells loaded at p, and û = e − (arm means of e) − π:

        δ = mean_r Σ_a c·y      s² = Σ_r (Σ_a c·û)² / (K − 2)      error = s / √K

    with K − 2 degrees of freedom.
    """
    restarts = len(y)
    residual = position_residuals(y, positions) @ contrast
    s = math.sqrt(float((residual**2).sum()) / (restarts - 2))
    return Estimate(float((y @ contrast).mean()), s / math.sqrt(restarts), restarts - 2)


def position_residuals(y: Matrix, positions: npt.NDArray[np.int64]) -> Matrix:
    """Return û, (K, arms): y without the effects of restart, arm and load position."""
    e = y - y.mean(axis=1, keepdims=True)
    pi = np.zeros_like(e)
    for p in np.unique(positions):
        pi[positions == p] = e[positions == p].mean()
    residuals: Matrix = e - e.mean(axis=0, keepdims=True) - pi
    return residuals


def plain_contrast(differences: npt.NDArray[np.float64]) -> Estimate:
    """Estimate the mean of one difference per restart, with Student's usual error."""
    restarts = len(differences)
    return Estimate(
        float(differences.mean()),
        float(differences.std(ddof=1)) / math.sqrt(restarts),
        restarts - 1,
    )


def slope(values: npt.NDArray[np.float64]) -> float:
    """Return the least-squares change of `values` from the first to the last of them."""
    x = np.linspace(-0.5, 0.5, len(values))
    return float((x @ (values - values.mean())) / (x @ x))


def lag_one_autocorrelation(values: npt.NDArray[np.float64]) -> float | None:
    """Return how much each value resembles the one before it, −1 to 1; None if all are equal.

    Student's interval assumes independent restarts; K of those have about 0 ± 1/√K.
    """
    deviations = values - values.mean()
    total = float(deviations @ deviations)
    if total <= 0:
        return None
    return float(deviations[1:] @ deviations[:-1]) / total


def sign_flip_p(differences: npt.NDArray[np.float64], bound: float, seed: int = 0) -> float:
    """Return a p-value for equivalence that assumes no normal distribution; small says equivalent.

    Tests |δ| ≥ bound against |δ| < bound, one-sided, from one difference per restart, (K,): how
    often is the mean of randomly signed deviations from the nearer bound as small? All patterns of
    signs are tried up to K = 12, and 4,096 seeded ones beyond.

    `scipy.stats.permutation_test(permutation_type="samples")` returns the same up to K = 12. Beyond
    it draws other signs and adds one to both counts, which differs by up to 0.007 on published runs
    (K = 16 and 48). Published verdicts hold this value and are compared digit by digit.
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
    """Return (patterns, count) of −1 and 1."""
    if count <= 12:
        return np.array(list(itertools.product((-1.0, 1.0), repeat=count)))
    signs: Matrix = np.where(
        np.random.RandomState(seed).random_sample((4096, count)) < 0.5, -1.0, 1.0
    )
    return signs
