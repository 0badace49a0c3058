"""How often the judge says "equivalent", in runs whose truth is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import binomtest

from proof.evidence.statistics import Estimate
from proof.verdict.contrasts import CONFIDENCE


@dataclass(frozen=True)
class Rate:
    """How many of some runs had an outcome."""

    case: str
    """What was judged: a latency model, or a level with its metric and statistic."""
    restarts: int
    label: str
    """Statistic or outcome that was counted."""
    hits: int
    runs: int

    @property
    def rate(self) -> float:
        """Share of the runs that had the outcome."""
        return self.hits / self.runs

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval of the rate (Clopper and Pearson)."""
        interval = binomtest(self.hits, self.runs).proportion_ci(method="exact")
        return float(interval.low), float(interval.high)


def is_within(estimate: Estimate, margin: float) -> bool:
    """Return whether the interval of an estimate lies inside ±margin, as the judge asks."""
    low, high = estimate.interval(CONFIDENCE)
    return -math.log1p(margin) < low and high < math.log1p(margin)
