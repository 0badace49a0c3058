"""
Contrasts of the arms' logs over the restarts, and their intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from proof.evidence.readings import Key, Readings
from proof.evidence.statistics import Estimate, Matrix, adjusted_contrast
from proof.verdict.schema import Interval

CONFIDENCE = 0.90
"""Two one-sided tests at 5 % are one two-sided interval at 90 %."""


def contrast_of(
    readings: Readings, key: Key, arms: Sequence[int], weights: Mapping[int, float]
) -> tuple[Estimate, Matrix]:
    """Return the estimate of Σ weight · log statistic, and its value in each restart.

    `arms`, one for each load position, serve to estimate its effect. `weights` sum to zero.
    """
    y, contrast = readings.logs[key][:, arms], np.array([weights.get(arm, 0.0) for arm in arms])
    return adjusted_contrast(y, readings.positions[:, arms], contrast), y @ contrast


def ratio_interval(estimate: Estimate, confidence: float) -> Interval:
    """Return an estimate's interval as ratios."""
    low, high = estimate.interval(confidence)
    return math.exp(low), math.exp(high)


def corrected_confidence(tests: int) -> float:
    """Return the confidence of an interval that is corrected for a number of one-sided tests."""
    return 1 - 2 * 0.05 / tests
