"""
The verdict: the schema of verdict.json, its outcomes, and their exit codes.

The judge and every reader share these classes; an unknown field or version is rejected. Verdicts of
schema 2 lack the fields of ADDED_IN_3 and are still read (proof/verdict/committed.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proof.evidence.store import EvidenceRejected

SCHEMA_VERSION = 3
READABLE_VERSIONS = (2, 3)
Outcome = Literal["equivalent", "not-slower", "inconclusive", "not-equivalent", "invalid"]
EXIT_CODES: dict[Outcome, int] = {
    "equivalent": 0,
    "not-slower": 0,
    "not-equivalent": 1,
    "inconclusive": 2,
    "invalid": 3,
}
Interval = tuple[float, float]
ADDED_IN_3 = frozenset(
    {
        "undecided",
        "autocorrelation",
        "texts",
        "busy_share",
        "scope",
        "claim_digest",
        "number_for_this_claim",
    }
)
"""Keys, at any depth, that verdicts of schema 2 do not have."""


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
    undecided: str = ""
    """Why it holds without telling anything; empty if it tells. With such a gate a level is
    inconclusive at best.
    """


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
    """Geometric mean of the references' statistic over restarts, in microseconds; of the metric
    `dilation`, a ratio.

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
    autocorrelation: float | None = None
    """Lag-1 autocorrelation of the log ratios over restarts, which should be about 0 ± 1/√restarts.
    It decides nothing.
    """


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


class FurthestText(_Part):
    """The text whose median ratio is furthest from 1, and the trend with length."""

    ratio: float
    """Its median ratio."""
    text_id: int
    tokens: int
    trend: float | None
    """Ratio of the longest text over that of the shortest, by a straight line through all texts;
    None if their lengths are unknown or equal.
    """


class LevelTexts(_Part):
    """Ratios by text at one level. They decide nothing."""

    texts: int
    """Number of different texts."""
    candidate: FurthestText
    """Candidate over reference."""
    same_model: FurthestText
    """A/A, the second copies over the first: the yardstick."""


class BusyShare(_Part):
    """Share of time in which the engine was busy, over all slices of all restarts."""

    mean: float
    least: float
    most: float


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
    texts: LevelTexts | None = None
    """Ratios by text; None where arms are not interleaved."""
    busy_share: BusyShare | None = None
    """Load at a level under Poisson arrivals; None where it is not known."""


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
    claim_digest: str | None = None
    """Digest of the claim (proof/plans/claim_digest.py); None in runs of earlier versions."""
    number_for_this_claim: int | None = Field(None, ge=1)
    """Number of the run among those of its claim, whatever else in the plan has changed."""

    @property
    def numbers(self) -> str:
        """Which attempt the run is, in words."""
        of_claim = self.number_for_this_claim
        claim = "runs of its claim not counted" if of_claim is None else f"{of_claim} of its claim"
        return f"run {self.number_for_this_plan} of this plan, {claim}"


class ServedModel(_Part):
    """How one model was served, as the server reported it; None for what it did not report."""

    variant: str | None
    precision: str | None
    runtime: str | None
    engine_version: str | None
    """Release of the engine's package."""
    packs: bool | None
    """Whether several texts share a row."""


class Scope(_Part):
    """What a verdict is about, and what it leaves open."""

    reference: str
    """Name of the reference's first arm."""
    candidate: str
    claimed: dict[str, dict[str, list[str]]]
    """Claimed statistics, by level and metric."""
    not_claimed: dict[str, dict[str, list[str]]]
    """Statistics of the same levels that could have been claimed."""
    widest_margin: float
    """Widest margin of all, with its gain."""
    tokens: tuple[int, int] | None
    """Fewest and most tokens of a measured text; None if no server reported them."""
    served: dict[str, ServedModel]
    """By role, reference and candidate."""
    service_version: str | None
    """Version of drbert-serve; None if it did not serve, or did not say."""
    own_files: bool | None
    """Whether the two copies of each model were loaded from folders of their own; None if the run
    did not start the servers.
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
    scope: Scope | None = None
    """None in verdicts of schema 2."""


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
    if version not in READABLE_VERSIONS:
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
