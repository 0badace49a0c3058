"""
Gates of a whole run: its answers are its models' own, and no cache gave them.

A server that answers anything quickly, or from memory, would be as fast as any claim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from proof.evidence.answers import AnswerCheck
from proof.evidence.readings import Readings
from proof.evidence.statistics import plain_contrast
from proof.plans.plan import Plan, Role
from proof.verdict.schema import Gate, Interval, format_interval, format_percent

MOST_GAIN_OF_REPEATS = 0.15
"""Largest share by which repeated answers may be faster than first ones.

Without a cache they compute as much, but on a busy machine the wall clock of a run is several
percent off.
"""
CACHE_CONFIDENCE = 0.98
"""Confidence of the interval of repeats over firsts: one side of it is 99 %."""
FEWEST_FOR_CACHE = 4
"""Fewest restarts for which the interval is estimated."""


def answer_gates(check: AnswerCheck | None) -> list[Gate]:
    """Return the gate on a run's answers; none for runs that recorded no answers."""
    if check is None:
        return []
    name = (
        "answers are the artifact's own" if check.verified else "each model gives a text one answer"
    )
    measured = f"{check.differing:,} of {check.compared:,} answers differ"
    if check.first:
        measured += f", the first of request {check.first}"
    measured += f" (scores within {check.tolerance:.2g})"
    if check.agreement is not None:
        measured += (
            f"; reference and candidate give {check.agreement:.1%} of the texts the same label"
        )
    return [Gate(name=name, passed=not check.differing, measured=measured)]


def cache_gates(plan: Plan, readings: Mapping[str, Readings]) -> list[Gate]:
    """Return the gate against a cache of answers; none without a level `repeat`."""
    repeats = [readings[level.name] for level in plan.levels if level.kind == "repeat"]
    return [_cache_gate(plan, each) for each in repeats if len(each.restarts) >= FEWEST_FOR_CACHE]


def _cache_gate(plan: Plan, readings: Readings) -> Gate:
    first, repeated = (readings.logs[block, "end_to_end", "p50"] for block in ("first", "repeat"))
    limit = math.log1p(-MOST_GAIN_OF_REPEATS)
    parts = []
    has_cache = False
    roles: Sequence[Role] = ("reference", "candidate")
    for role in roles:
        arms = plan.indices(role)
        change = plain_contrast(np.mean((repeated - first)[:, arms], axis=1))
        low, high = change.interval(CACHE_CONFIDENCE)
        has_cache = has_cache or high < limit
        interval: Interval = math.exp(low), math.exp(high)
        # An interval on both sides of the limit neither shows a cache nor excludes one.
        unknown = ", cannot tell" if low < limit <= high else ""
        parts.append(
            f"{role} {format_percent(change.ratio)} ({format_interval(interval)}{unknown})"
        )
    return Gate(
        name="no cache answers repeated texts",
        passed=not has_cache,
        measured=(
            f"repeated over first answers, end to end p50, 98 %: {'; '.join(parts)}; may not lie"
            f" wholly below {-MOST_GAIN_OF_REPEATS:+.0%}"
        ),
    )
