"""
Write report.html: one file, no network, the verdict first and everything it rests on below.

    verdict → levels → differences → restarts → deciles → distributions → along a restart →
    where the time goes → numbers → gates → starts → same work? → where it ran → limits

This module and the modules of sections compute the data; templates/ holds text and markup.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from proof.evidence.audit import read_json
from proof.evidence.store import EvidenceRejected
from proof.plans.plan import Level
from proof.reports import chart_sections, table_sections
from proof.reports.chart_sections import LevelDifferences, LevelPhases
from proof.reports.distributions import PHASES, TIME_COURSE_PARTS, LevelProfile
from proof.reports.page import Figure, Table, render, renderer_version
from proof.reports.report_environment import (
    ArtifactComparison,
    EnvironmentSection,
    build_comparisons,
    build_environment,
    describe_machine,
)
from proof.reports.reported_run import (
    OUTCOME_STYLES,
    OutcomeStyle,
    ReportedLevel,
    ReportedRun,
    read_reported_run,
)
from proof.reports.table_sections import LevelNumbers, StartsSection
from proof.reports.work_section import WorkSection, build_work
from proof.verdict.failures import describe_failures
from proof.verdict.schema import Verdict
from proof.verdict.scope import describe_scope

PAGE = "report.html"
_GENERATOR = re.compile(r'<meta name="generator" content="drbert-prove report ([0-9a-f]{16})"/>')


@dataclass(frozen=True)
class LevelSummary:
    """The verdict of one level in a few lines."""

    name: str
    style: OutcomeStyle
    restarts: int
    """Number of restarts that count."""
    restarts_planned: int
    restarts_dropped: int
    requests: str
    """Number of requests that count."""
    load: str
    """How requests were sent."""
    failed_gates: str
    """What happened where gates failed; empty if none did."""


@dataclass(frozen=True)
class Report:
    """The variables of templates/report.html.j2."""

    version: str
    """Version of the renderer."""
    verdict: Verdict
    style: OutcomeStyle
    """How the verdict is shown."""
    when: str
    """Date and time of the run's start; empty if its name does not say."""
    where: str
    """Processor and number of processors; empty if environment.json does not say."""
    scope: Sequence[str]
    """What was claimed, not claimed and measured, in lines."""
    pilot: str | None
    """SHA-256 of the plan's pilot, if it has one."""
    reference: Sequence[str]
    """Names of the reference's arms."""
    candidate: Sequence[str]
    """Names of the candidate's arms."""
    has_server_timing: bool
    """Whether the servers report how long inference took."""
    phase_names: Sequence[str]
    parts: int
    """Number of parts of a restart in `time_courses`."""
    levels: Sequence[LevelSummary]
    differences: Sequence[LevelDifferences]
    restarts: Sequence[Figure]
    deciles: Sequence[Figure]
    distributions: Sequence[Figure]
    time_courses: Sequence[Figure]
    phases: Sequence[LevelPhases]
    numbers: Sequence[LevelNumbers]
    gates: Sequence[Table]
    starts: StartsSection
    comparisons: Sequence[ArtifactComparison]
    environment: EnvironmentSection
    work: WorkSection | None
    """Counted instructions; None where the run counted none."""


def write(folder: Path, verdict: Verdict, path: Path | None = None) -> Path:
    """Write the report of a run to `path` and return it; the default is report.html in its folder.

    Raises EvidenceRejected if the evidence cannot be read.
    """
    path = path or folder / PAGE
    path.write_text(_render(folder, verdict), encoding="utf-8")
    return path


def check_page(folder: Path, verdict: Verdict) -> str:
    """Render the sealed report.html of a run again and compare the two.

    Return an empty string if they are equal, or a sentence if the page says that another version
    made it, or says nothing: it is then not compared. Raise EvidenceRejected if it differs.
    """
    path = folder / PAGE
    try:
        page = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvidenceRejected(f"{path} cannot be read: {error}.") from None
    version = _GENERATOR.search(page)
    if version is None or version[1] != renderer_version():
        return (
            f"{path} was made by another version of the report, so it was not compared with the"
            " evidence. Its checksum holds, and everything above was computed again;"
            f" `drbert-prove report {folder}` renders it anew."
        )
    if page != _render(folder, verdict):
        raise EvidenceRejected(
            f"{path} is not the page that follows from the evidence; `drbert-prove report"
            f" {folder}` renders it anew."
        )
    return ""


def _render(folder: Path, verdict: Verdict) -> str:
    report = build_report(read_reported_run(folder, verdict))
    return render("report.html.j2", **vars(report))


def build_report(run: ReportedRun) -> Report:
    """Return the data of every section."""
    environment = read_json(run.folder / "environment.json")
    return Report(
        version=renderer_version(),
        verdict=run.verdict,
        style=OUTCOME_STYLES[run.verdict.verdict],
        when=describe_start(run.verdict.run.run),
        where=describe_machine(environment),
        scope=[] if run.verdict.scope is None else list(describe_scope(run.verdict.scope)),
        pilot=run.plan.pilot,
        reference=run.arms("reference"),
        candidate=run.arms("candidate"),
        has_server_timing=run.plan.server_timing,
        phase_names=PHASES,
        parts=TIME_COURSE_PARTS,
        levels=[_summarize_level(level) for level in run.levels],
        differences=chart_sections.build_differences(run),
        restarts=chart_sections.build_restarts(run),
        deciles=chart_sections.build_deciles(run),
        distributions=chart_sections.build_distributions(run),
        time_courses=chart_sections.build_time_courses(run),
        phases=chart_sections.build_phases(run),
        numbers=table_sections.build_numbers(run),
        gates=table_sections.build_gates(run),
        starts=table_sections.build_starts(run),
        comparisons=build_comparisons(read_json(run.folder / "identity.json"), run.arms("control")),
        environment=build_environment(environment),
        work=build_work(run.folder),
    )


def describe_start(run: str) -> str:
    """Return the date and time that a run's name begins with; empty if it has none."""
    match = re.match(r"(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)\d\d-", run)
    if match is None:
        return ""
    year, month, day, hour, minute = match.groups()
    return f"{year}-{month}-{day} {hour}:{minute} UTC"


def _summarize_level(level: ReportedLevel) -> LevelSummary:
    verdict = level.verdict
    return LevelSummary(
        name=level.name,
        style=level.style,
        restarts=verdict.restarts_kept,
        restarts_planned=verdict.restarts_planned,
        restarts_dropped=verdict.restarts_dropped,
        requests=f"{level.profile.requests:,}",
        load=_describe_load(level.plan) + _describe_late_sets(level.profile),
        failed_gates=describe_failures(verdict.breached),
    )


def _describe_late_sets(profile: LevelProfile) -> str:
    """Return how many sets were left out, to follow `_describe_load`; empty without sets."""
    if not profile.sets:
        return ""
    return f"; {profile.late_sets:,} of {profile.sets:,} sets were sent late and are left out"


def _describe_load(level: Level) -> str:
    arrivals = f"Poisson arrivals at {level.percent} % of the reference's capacity"
    if level.rate_per_s:
        arrivals = (
            f"{level.rate_per_s:.4g} Poisson arrivals a second, to keep the engine busy"
            f" {level.percent} % of the time"
        )
    descriptions = {
        "unloaded": (
            "one request in flight, a pause after each answer; each text goes once to every arm"
        ),
        "mixed": (
            f"{arrivals}; each text goes once to every arm, and the server's inference time is"
            " judged"
        ),
        "switchback": (
            f"{arrivals}; slices of {level.slice_requests:,} requests to one arm at a time, all"
            " with the same gaps and texts"
        ),
        "capacity": (
            f"{level.in_flight} in flight, slices of {level.slice_s:g} s to one arm at a time; the"
            " time per text is judged"
        ),
    }
    return descriptions[level.kind]
