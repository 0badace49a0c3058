"""
The verdict: the schema of verdict.json, its outcomes, and their exit codes.

The judge and every reader share these classes; an unknown field or version is rejected.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proof.evidence.store import EvidenceRejected

SCHEMA_VERSION = 2
Outcome = Literal["equivalent", "not-slower", "inconclusive", "not-equivalent", "invalid"]
EXIT_CODES: dict[Outcome, int] = {
    "equivalent": 0,
    "not-slower": 0,
    "not-equivalent": 1,
    "inconclusive": 2,
    "invalid": 3,
}
Interval = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_by_name=True, serialize_by_alias=True
    )


def _field_of_key(key: str) -> Any:
    """Return a field that has another key in verdict.json: published files keep theirs."""
    return Field(validation_alias=key, serialization_alias=key)


class Gate(_Part):
    """One condition of a valid run, and whether it holds."""

    name: str
    passed: bool
    measured: str = _field_of_key("found")
    """The numbers that decided it, as text."""


class Contrast(_Part):
    """A/A: the second load of a model over the first."""

    arms: tuple[str, str]
    metric: str
    statistic: str
    margin: float
    ratio: float
    interval: Interval
    """90 % interval of the ratio."""
    restart_ratios: list[float]
    """Ratio of each restart."""
    equivalent: bool
    """Whether the interval lies inside the margin. Printed, not required: requiring it would make
    most honest runs invalid.
    """
    biased: bool
    """Whether the interval lies wholly beyond half the margin."""


class Statistic(_Part):
    """One claimed statistic: candidate over reference."""

    metric: str
    statistic: str
    margin: float
    """Margin with the gain in it: log(1 + margin) = gain × log(1 + the plan's margin)."""
    gain: float
    """Factor by which the queue multiplies a change of service time; 1 without a queue."""
    ratio: float
    interval: Interval
    """90 % interval of the ratio."""
    strict_interval: Interval
    """Interval corrected for the number of claimed statistics. Wholly beyond the margin it says
    "not equivalent".
    """
    reference_us: float
    """Geometric mean of the references' statistic over restarts, in microseconds.

    Arms are interleaved, so caches are colder than in production: compare, do not quote.
    """
    restart_ratios: list[float]
    """Ratio of each restart."""
    not_slower: bool
    """Whether the interval ends below the margin."""
    equivalent: bool
    """Whether the interval lies inside the margin."""
    outside: Literal["slower", "faster"] | None
    """Direction, if the strict interval lies wholly beyond the margin."""
    sign_flip_p: float
    """p-value for equivalence that assumes no normal distribution; small says equivalent."""


class Control(_Part):
    """A positive control: an arm that must be detected as slower than the reference."""

    arm: str
    metric: str
    statistic: str
    margin: float
    ratio: float
    interval: Interval
    """90 % interval of the ratio."""
    wide_interval: Interval
    """99.5 % interval of the ratio."""
    restart_ratios: list[float]
    """Ratio of each restart."""
    detected: bool = _field_of_key("told_apart")
    """Whether its interval, corrected for the number of statistics, lies beyond the margin."""
    expected: float | None
    """Ratio that it was made to have, where no queue multiplies it."""
    as_expected: bool | None
    """Whether the wide interval holds the expected ratio."""


class LevelVerdict(_Part):
    """The verdict at one level, with everything that it rests on."""

    verdict: Outcome
    not_slower: bool
    """Whether no claimed statistic can be slower than its margin."""
    equivalent: bool
    """Whether every claimed statistic lies inside its margin."""
    direction: str | None
    """Directions in which claimed statistics lie outside, joined by a slash."""
    breached: list[str]
    """Names of the gates that failed."""
    restarts_planned: int
    restarts_kept: int
    """Number of restarts that count."""
    restarts_dropped: int
    statistics: list[Statistic]
    same_model: list[Contrast]
    controls: list[Control]
    gates: list[Gate]


class PlanName(_Part):
    """A plan's name and the SHA-256 of its file."""

    name: str
    digest: str


class RunName(_Part):
    """run.json: the run's entry in evidence/index.json."""

    run: str
    plan: str
    plan_digest: str
    number_for_this_plan: int = Field(ge=1)
    """Number of the run among those of its plan: a repeated run after `inconclusive` or `invalid`
    is a new one.
    """


class Verdict(_Part):
    """verdict.json."""

    schema_version: int
    verdict: Outcome
    """The worst outcome of its levels."""
    sentence: str
    claim: Literal["equivalence", "non-inferiority"]
    plan: PlanName
    run: RunName
    levels: dict[str, LevelVerdict]
    """Verdicts by level."""


def read_run(path: Path, plan_digest: str) -> RunName:
    """Return run.json; EvidenceRejected if it cannot be read or names another plan."""
    try:
        run = RunName.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvidenceRejected(f"{path} cannot be read: {str(error).splitlines()[0]}.") from None
    if run.plan_digest != plan_digest:
        raise EvidenceRejected(
            f"{path} tells of another plan ({run.plan_digest[:16]}) than plan.toml"
            f" ({plan_digest[:16]})."
        )
    return run


def read_verdict(path: Path) -> Verdict:
    """Return a committed verdict; EvidenceRejected if it cannot be read or has another schema."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.get("schema_version")
    except (OSError, ValueError, AttributeError) as error:
        raise EvidenceRejected(f"{path} cannot be read: {error}.") from None
    if version != SCHEMA_VERSION:
        raise EvidenceRejected(
            f"{path}: schema_version {version!r} is unknown; this judge writes {SCHEMA_VERSION}."
        )
    try:
        return Verdict.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise EvidenceRejected(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}."
        ) from None


def check_committed(path: Path, verdict: Verdict) -> None:
    """Raise EvidenceRejected if the committed verdict is not the one that the evidence gives."""
    committed = read_verdict(path)
    if committed.verdict != verdict.verdict:
        raise EvidenceRejected(
            f"{path} says {committed.verdict}, the evidence says {verdict.verdict}."
        )
    difference = first_difference(committed.model_dump(), verdict.model_dump())
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


def format_percent(ratio: float) -> str:
    """Format a ratio as its difference from 1: 1.02 is "+2.00%"."""
    return f"{ratio - 1:+.2%}"


def format_interval(interval: Interval) -> str:
    """Format an interval of ratios: "-1.00% to +2.00%"."""
    low, high = interval
    return f"{format_percent(low)} to {format_percent(high)}"


def metric_label(metric: str) -> str:
    """Return a metric's name as words: "end to end"."""
    return metric.replace("_", " ")


def describe_statistic(item: Statistic, claim: str) -> str:
    """Return what one statistic says, in a word or two."""
    if item.equivalent:
        return "equivalent"
    if claim == "non-inferiority" and item.not_slower:
        return "not slower"
    return f"outside: {item.outside}" if item.outside else "undecided"


def describe(verdict: Verdict) -> str:
    """Return the verdict with every claimed interval, as lines for a terminal."""
    lines = []
    for name, level in verdict.levels.items():
        lines.append(
            f"level {name}: {level.verdict}; {level.restarts_kept} restarts count,"
            f" {level.restarts_dropped} dropped"
        )
        for item in level.statistics:
            lines.append(
                f"  {metric_label(item.metric):<13} {item.statistic:<5}"
                f" {format_percent(item.ratio):>8}   90 % interval"
                f" {format_interval(item.interval)}   margin ±{100 * item.margin:.3g} %  "
                f" {describe_statistic(item, verdict.claim)}"
            )
        for control in level.controls:
            detected = "detected" if control.detected else "not detected"
            expected = f", expected {format_percent(control.expected)}" if control.expected else ""
            lines.append(
                f"  control {control.arm} {metric_label(control.metric)} {control.statistic}:"
                f" {format_percent(control.ratio)} ({format_interval(control.interval)}){expected},"
                f" {detected}"
            )
        for gate in level.gates:
            lines.append(f"  gate {'ok  ' if gate.passed else 'FAIL'} {gate.name}: {gate.measured}")
    lines.append(
        f"verdict: {verdict.verdict}. {verdict.sentence} (run {verdict.run.number_for_this_plan} of"
        " this plan)"
    )
    return "\n".join(lines)
