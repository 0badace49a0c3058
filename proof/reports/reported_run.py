"""
One run as its report needs it: verdict, plan, starts, and a profile of each level.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proof.evidence.audit import read_sealed_plan
from proof.evidence.store import Requests, RestartRecord, read_starts
from proof.plans.plan import Level, Plan, Role
from proof.reports.distributions import LevelProfile, profile_levels
from proof.reports.page import Tone
from proof.verdict.schema import LevelVerdict, Outcome, Verdict


@dataclass(frozen=True)
class OutcomeStyle:
    """How a report shows a verdict."""

    title: str
    tone: Tone
    meaning: str
    """What the verdict says, in one or two sentences."""
    icon: str
    """Path of a 24 × 24 SVG icon, so that a verdict is recognised without its colour."""


_CHECK_MARK = "M7 12.5l3.5 3.5 7-8"
OUTCOME_STYLES: Mapping[Outcome, OutcomeStyle] = {
    "equivalent": OutcomeStyle(
        "Equivalent", "good", "Every claimed 90 % interval lies inside its margin.", _CHECK_MARK
    ),
    "not-slower": OutcomeStyle(
        "Not slower",
        "good",
        "Every claimed 90 % interval ends below its margin; being faster was allowed.",
        _CHECK_MARK,
    ),
    "inconclusive": OutcomeStyle(
        "Inconclusive",
        "open",
        "The intervals are too wide or the restarts too few to decide. It is never rounded up.",
        "M7 12h.1M12 12h.1M17 12h.1",
    ),
    "not-equivalent": OutcomeStyle(
        "Not equivalent",
        "bad",
        "A claimed interval, corrected for the number of claims, lies wholly beyond its margin.",
        "M6 9.5h12M6 14.5h12M15 6l-6 12",
    ),
    "invalid": OutcomeStyle(
        "Invalid",
        "bad",
        "A gate failed: this run could not have shown what it claims.",
        "M8 8l8 8M16 8l-8 8",
    ),
}


@dataclass(frozen=True)
class ReportedLevel:
    """One level of a run: how requests were sent, what was concluded, and what they looked like."""

    plan: Level
    verdict: LevelVerdict
    profile: LevelProfile

    @property
    def name(self) -> str:
        """Name of the level in the plan."""
        return self.plan.name

    @property
    def style(self) -> OutcomeStyle:
        """How the level's verdict is shown."""
        return OUTCOME_STYLES[self.verdict.verdict]


@dataclass(frozen=True)
class ReportedRun:
    """Everything that the sections of a report are computed from."""

    folder: Path
    verdict: Verdict
    plan: Plan
    starts: Sequence[RestartRecord]
    profiles: Mapping[str, LevelProfile]
    """Profile of each level, by the level's name."""

    @property
    def levels(self) -> Iterator[ReportedLevel]:
        """The levels that were judged, in the plan's order."""
        for level in self.plan.levels:
            if level.name in self.verdict.levels:
                yield ReportedLevel(
                    level, self.verdict.levels[level.name], self.profiles[level.name]
                )

    @property
    def counted_restarts(self) -> list[int]:
        """Numbers of the restarts that count. A restart counts at every level or at none."""
        return [start.restart for start in self.starts if not start.dropped]

    def arms(self, role: Role) -> list[str]:
        """Return the names of the arms with a role, in the plan's order."""
        return [self.plan.arms[index].name for index in self.plan.indices(role)]


def read_reported_run(folder: Path, verdict: Verdict) -> ReportedRun:
    """Read a sealed run; `verdict` is what was concluded from it."""
    plan, starts = read_sealed_plan(folder), read_starts(folder)
    profiles = profile_levels(Requests(folder), plan, starts)
    return ReportedRun(folder, verdict, plan, starts, profiles)
