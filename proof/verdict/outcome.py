"""
From intervals and gates to one word: the outcome of a level, and of a run.
"""

from __future__ import annotations

from collections.abc import Mapping

from proof.plans.plan import FEWEST_RESTARTS, Claim
from proof.verdict.schema import LevelVerdict, Outcome

OUTCOMES_BY_SEVERITY: tuple[Outcome, ...] = (
    "equivalent",
    "not-slower",
    "inconclusive",
    "not-equivalent",
    "invalid",
)


def level_outcome(level: LevelVerdict, claim: Claim, *, may_be_undecided: bool = True) -> Outcome:
    """Return the outcome that follows from everything else in a level's verdict.

    Without `may_be_undecided`, a gate that cannot tell counts as one that holds.
    """
    if level.breached:
        return "invalid"
    if level.direction:
        return "not-equivalent"
    counted = level.restarts_kept
    enough = counted >= FEWEST_RESTARTS and counted >= level.restarts_planned
    if not enough or (may_be_undecided and any(gate.undecided for gate in level.gates)):
        return "inconclusive"
    if claim == "equivalence" and level.equivalent:
        return "equivalent"
    if claim == "non-inferiority" and level.not_slower:
        return "not-slower"
    return "inconclusive"


def worst_outcome(levels: Mapping[str, LevelVerdict]) -> Outcome:
    """Return the worst outcome of a run's levels, which is the run's."""
    return max((level.verdict for level in levels.values()), key=OUTCOMES_BY_SEVERITY.index)
