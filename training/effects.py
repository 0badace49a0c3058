"""
Effects of arms on what an encoder holds, from differences within pairs.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from training.metrics import paired_interval
from training.pair_records import Record


@dataclass(frozen=True)
class Effect:
    """The mean difference of an arm from another one in a measurement, over the pairs of both."""

    arm: str
    against: str
    measurement: str
    differences: tuple[float, ...]
    """Arm minus the other, a pair each."""

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self.differences)

    @property
    def interval(self) -> tuple[float, float, float]:
        """The mean, and Student's 95 % interval; it is infinite with a single pair."""
        return paired_interval(np.array(self.differences))

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        mean, _, high = self.interval
        return high - mean

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does not contain 0."""
        if self.pairs < 2:
            return False
        _, low, high = self.interval
        return low > 0 or high < 0

    @property
    def deviation(self) -> float:
        """Standard deviation of the differences; NaN with a single pair."""
        return float(np.std(self.differences, ddof=1)) if self.pairs > 1 else math.nan

    @property
    def p_value(self) -> float:
        """Two-sided p-value of no difference, by Student's t; 1 with a single pair."""
        if self.pairs < 2:
            return 1.0
        error = self.deviation / math.sqrt(self.pairs)
        mean = abs(self.interval[0])
        if error == 0:
            return float(mean == 0)
        return float(2 * stats.t.sf(mean / error, self.pairs - 1))

    def pairs_for(self, half_width: float) -> int:
        """Return the number of pairs with which the interval is no wider, by this deviation.

        Raises ValueError with less than two pairs.
        """
        if self.pairs < 2:
            raise ValueError("a deviation needs two pairs")
        most = 2
        while interval_half_width(self.deviation, most) > half_width:
            most *= 2
        enough = range(2, most + 1)
        return enough[
            bisect.bisect_left(
                enough, -half_width, key=lambda n: -interval_half_width(self.deviation, n)
            )
        ]


def effect(records: Sequence[Record], arm: str, against: str, measurement: str) -> Effect:
    """Return the effect of an arm; without a common pair it has no differences."""
    by_arm = {
        name: {each.pair: each.measured[measurement] for each in records if each.arm == name}
        for name in (arm, against)
    }
    pairs = sorted(by_arm[arm].keys() & by_arm[against].keys())
    differences = tuple(by_arm[arm][pair] - by_arm[against][pair] for pair in pairs)
    return Effect(arm, against, measurement, differences)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979, Scand. J. Statist. 6, 65-70)."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def interval_half_width(deviation: float, pairs: int) -> float:
    """Return the half-width of Student's 95 % interval of a mean difference, in its own unit.

    There must be two pairs at least.
    """
    return float(stats.t.ppf(0.975, pairs - 1)) * deviation / math.sqrt(pairs)


def detectable(deviation: float, pairs: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest mean difference that a two-sided test detects with that power.

    It is in the unit of `deviation`, and follows from the noncentral t distribution. There must be
    two pairs at least.
    """
    freedom = pairs - 1
    critical = float(stats.t.ppf(1 - alpha / 2, freedom))
    # The other tail, a detection with the wrong sign, adds nothing at this power.
    shift = optimize.brentq(
        lambda shift: float(stats.nct.sf(critical, freedom, shift)) - power, 0.0, 40 * critical
    )
    return float(shift) * deviation / math.sqrt(pairs)


def deviation_interval(deviation: float, pairs: int) -> tuple[float, float]:
    """Return the 95 % interval of a standard deviation that was estimated from two or more pairs.

    It follows from the chi-square distribution.
    """
    freedom = pairs - 1
    largest, smallest = (float(stats.chi2.ppf(share, freedom)) for share in (0.975, 0.025))
    return deviation * math.sqrt(freedom / largest), deviation * math.sqrt(freedom / smallest)
