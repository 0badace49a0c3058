"""
What it means that a gate failed, in words.

A gate's name is the property that should hold, so a list of failed gates by their names would say
the opposite of what happened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_FAILURES = (
    (r"(.+) is told apart", r"the slowdown of \1 was not detected"),
    (
        r"(.+) is as slow as it was made",
        r"the slowdown of \1 was measured at another size than it was made",
    ),
    (
        r"A/A: (.+) and (.+) are not biased",
        r"\1 and \2, two copies of one model, were measured as different",
    ),
    (
        r"no drift of the ratio within restarts",
        "the ratio of two copies of one model drifted within restarts",
    ),
    (r"few restarts dropped", "too many restarts were dropped"),
    (
        r"(.+) agrees with and without the adjustment",
        r"\1 differs with and without the adjustment",
    ),
    (r"answers are the artifact's own", "answers were not the artifact's own"),
    (r"each model gives a text one answer", "a model gave different answers for one text"),
    (
        r"no cache answers repeated texts",
        "repeated texts were answered faster than new ones, as by a cache",
    ),
)
"""Names of gates as patterns, each with what happened if the gate failed."""


def describe_failure(gate: str) -> str:
    """Return what happened where the gate of that name failed."""
    for pattern, failure in _FAILURES:
        if match := re.fullmatch(pattern, gate):
            return match.expand(failure)
    return f"this does not hold: {gate}"


def describe_failures(gates: Iterable[str]) -> str:
    """Return what happened where these gates failed, separated by semicolons."""
    return "; ".join(map(describe_failure, gates))
