"""
What a judge says: verdict.json's schema, its words, and the exit codes.

The writer and every reader share these classes; an unknown field or version is refused.
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


def _named(key: str) -> Any:
    """Return a field whose key in verdict.json is another one: published files keep theirs."""
    return Field(validation_alias=key, serialization_alias=key)


class Gate(_Part):
    """One condition, what was found, and whether it holds."""

    name: str
    passed: bool
    found: str


class Contrast(_Part):
    """The second load of a model against the first."""

    arms: tuple[str, str]
    metric: str
    statistic: str
    margin: float
    ratio: float
    interval: Interval
    """90 %"""
    restart_ratios: list[float]
    equivalent: bool
    """Printed, not required: requiring it would void most honest runs."""
    biased: bool
    """The interval lies wholly beyond half the margin."""


class Statistic(_Part):
    """One claimed statistic: candidate over reference."""

    metric: str
    statistic: str
    margin: float
    """With the gain in it: log(1 + margin) = gain × log(1 + the plan's margin)."""
    gain: float
    ratio: float
    interval: Interval
    """90 %"""
    strict_interval: Interval
    """Corrected for the number of statistics claimed; wholly beyond the margin it says not
    equivalent.
    """
    reference_us: float
    """The references' statistic, geometric mean over restarts. Interleaved, so colder than
    production: compare, do not quote.
    """
    restart_ratios: list[float]
    not_slower: bool
    equivalent: bool
    outside: Literal["slower", "faster"] | None
    sign_flip_p: float
    """A second opinion without a normal law; small says equivalent."""


class Control(_Part):
    """An arm that must be told apart from the reference."""

    arm: str
    metric: str
    statistic: str
    margin: float
    ratio: float
    interval: Interval
    """90 %"""
    wide_interval: Interval
    """99.5 %"""
    restart_ratios: list[float]
    detected: bool = _named("told_apart")
    """Whether its interval, corrected for the number of statistics, lies beyond the margin."""
    expected: float | None
    """The ratio it was made to have, where no queue multiplies it."""
    as_expected: bool | None


class LevelVerdict(_Part):
    verdict: Outcome
    not_slower: bool
    equivalent: bool
    direction: str | None
    breached: list[str]
    restarts_planned: int
    restarts_kept: int
    restarts_dropped: int
    statistics: list[Statistic]
    same_model: list[Contrast]
    controls: list[Control]
    gates: list[Gate]


class PlanName(_Part):
    name: str
    digest: str


class RunName(_Part):
    """run.json, and the run's place in evidence/index.json."""

    run: str
    plan: str
    plan_digest: str
    number_for_this_plan: int = Field(ge=1)
    """A rerun after `inconclusive` or `invalid` is a new run, and says which."""


class Verdict(_Part):
    schema_version: int
    verdict: Outcome
    """The worst of its levels."""
    sentence: str
    claim: Literal["equivalence", "non-inferiority"]
    plan: PlanName
    run: RunName
    levels: dict[str, LevelVerdict]


def read_run(path: Path, plan_digest: str) -> RunName:
    """run.json; EvidenceRejected if it cannot be read or tells of another plan."""
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
    """A committed verdict; EvidenceRejected if its schema is another or it cannot be read."""
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


def check_committed(path: Path, found: Verdict) -> None:
    """EvidenceRejected if the verdict that was committed is not the one found."""
    committed = read_verdict(path)
    if committed.verdict != found.verdict:
        raise EvidenceRejected(
            f"{path} says {committed.verdict}, the evidence says {found.verdict}."
        )
    if (where := first_difference(committed.model_dump(), found.model_dump())) is not None:
        raise EvidenceRejected(f"{path} does not follow from the evidence: {where}.")


def first_difference(before: Any, after: Any, where: str = "verdict") -> str | None:
    """The first place where two verdicts differ; floats may by 1e-9, for they are recomputed."""
    if isinstance(before, dict) and isinstance(after, dict):
        if before.keys() != after.keys():
            return f"{where}: {', '.join(sorted(before.keys() ^ after.keys()))}"
        parts = [(before[key], after[key], f"{where}.{key}") for key in before]
    elif (
        isinstance(before, list | tuple)
        and isinstance(after, list | tuple)
        and len(before) == len(after)
    ):
        parts = [
            (b, a, f"{where}[{i}]") for i, (b, a) in enumerate(zip(before, after, strict=True))
        ]
    elif isinstance(before, float) and isinstance(after, int | float):
        return None if math.isclose(before, after, rel_tol=1e-9, abs_tol=1e-9) else where
    else:
        return None if before == after else where
    return next((found for part in parts if (found := first_difference(*part))), None)


def percent(ratio: float) -> str:
    return f"{ratio - 1:+.2%}"


def metric_label(metric: str) -> str:
    return metric.replace("_", " ")


def describe_statistic(item: Statistic, claim: str) -> str:
    """What one statistic says, in a word or two."""
    if item.equivalent:
        return "equivalent"
    if claim == "non-inferiority" and item.not_slower:
        return "not slower"
    return f"outside: {item.outside}" if item.outside else "undecided"


def describe(verdict: Verdict) -> str:
    """The verdict in words, with every claimed interval; for a terminal."""
    lines = []
    for name, level in verdict.levels.items():
        lines.append(
            f"level {name}: {level.verdict}; {level.restarts_kept} restarts count,"
            f" {level.restarts_dropped} dropped"
        )
        for item in level.statistics:
            low, high = item.interval
            lines.append(
                f"  {metric_label(item.metric):<13} {item.statistic:<5} {percent(item.ratio):>8}"
                f"   90 % interval {percent(low)} to {percent(high)}"
                f"   margin ±{100 * item.margin:.3g} %   {describe_statistic(item, verdict.claim)}"
            )
        for control in level.controls:
            said = "told apart" if control.detected else "not told apart"
            made = f", made {percent(control.expected)}" if control.expected else ""
            lines.append(
                f"  control {control.arm} {metric_label(control.metric)} {control.statistic}:"
                f" {percent(control.ratio)} ({percent(control.interval[0])} to"
                f" {percent(control.interval[1])}){made}, {said}"
            )
        for gate in level.gates:
            lines.append(f"  gate {'ok  ' if gate.passed else 'FAIL'} {gate.name}: {gate.found}")
    lines.append(
        f"verdict: {verdict.verdict}. {verdict.sentence} (run {verdict.run.number_for_this_plan} of"
        " this plan)"
    )
    return "\n".join(lines)
