"""
Compares a committed verdict with the one that the evidence gives.

A verdict of an earlier schema is compared with what that version's judge concluded.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from proof.evidence.store import EvidenceRejected
from proof.verdict.outcome import level_outcome, worst_outcome
from proof.verdict.schema import ADDED_IN_3, SCHEMA_VERSION, Verdict, read_verdict
from proof.verdict.scope import earlier_sentence, sentence_of_version_2


def check_committed(path: Path, verdict: Verdict) -> None:
    """Raise EvidenceRejected if the committed verdict is not the one that the evidence gives."""
    committed = read_verdict(path)
    expected = verdict if committed.schema_version == SCHEMA_VERSION else _in_version_2(verdict)
    if committed.verdict != expected.verdict:
        raise EvidenceRejected(
            f"{path} says {committed.verdict}, the evidence says {expected.verdict}."
        )
    if committed.sentence == earlier_sentence(expected):
        expected = expected.model_copy(update={"sentence": committed.sentence})
    values = expected.model_dump()
    if committed.schema_version != SCHEMA_VERSION:
        values = _without(values, ADDED_IN_3)
    # Only what the file holds: fields that it lacks are not filled in with their defaults.
    difference = first_difference(committed.model_dump(exclude_unset=True), values)
    if difference is not None:
        raise EvidenceRejected(f"{path} does not follow from the evidence: {difference}.")


def first_difference(before: Any, after: Any, path: str = "verdict") -> str | None:
    """Return the first path at which two verdicts differ, or None.

    Floats may differ by 1e-9, because they are recomputed.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        if before.keys() != after.keys():
            return f"{path}: {', '.join(sorted(before.keys() ^ after.keys()))}"
        parts = [(before[key], after[key], f"{path}.{key}") for key in before]
    elif _are_lists(before, after) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        parts = [(left, right, f"{path}[{i}]") for i, (left, right) in pairs]
    elif isinstance(before, float) and isinstance(after, int | float):
        return None if math.isclose(before, after, rel_tol=1e-9, abs_tol=1e-9) else path
    else:
        return None if before == after else path
    for left, right, inner_path in parts:
        difference = first_difference(left, right, inner_path)
        if difference is not None:
            return difference
    return None


def _are_lists(*values: Any) -> bool:
    return all(isinstance(value, list | tuple) for value in values)


def _in_version_2(verdict: Verdict) -> Verdict:
    """Return the verdict as a judge of schema 2 concluded it, with the new fields still in it.

    That judge had no gate that cannot tell, and its sentence did not name what was claimed.
    """
    levels = {
        name: level.model_copy(
            update={"verdict": level_outcome(level, verdict.claim, may_be_undecided=False)}
        )
        for name, level in verdict.levels.items()
    }
    changed = verdict.model_copy(
        update={"schema_version": 2, "verdict": worst_outcome(levels), "levels": levels}
    )
    return changed.model_copy(update={"sentence": sentence_of_version_2(changed)})


def _without(values: Any, keys: frozenset[str]) -> Any:
    """Return nested values without some keys, at any depth."""
    if isinstance(values, dict):
        return {key: _without(value, keys) for key, value in values.items() if key not in keys}
    if isinstance(values, list):
        return [_without(value, keys) for value in values]
    return values
