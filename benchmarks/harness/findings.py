"""
The findings of a benchmark: its tables, and its targets with the values that were measured.

`write` stores them as a Markdown page and as JSON; `read` reads that JSON back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import pages
from command import BadInput

# What a stored page must share with this machine before a run may continue it.
_MACHINE = ("processor", "processor_model", "usable", "native_precisions", "packages")
_OUTCOMES = {True: "holds", False: "**missed**", None: "not measurable here"}


@dataclass(frozen=True)
class Target:
    """A limit, and the value that was measured."""

    name: str
    limit: str
    measured: str
    holds: bool | None
    """Whether the limit holds; None if this machine cannot show it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the target as JSON has it, under the keys of the published pages."""
        return {
            "what": self.name,
            "asked": self.limit,
            "found": self.measured,
            "holds": self.holds,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Target:
        """Return the target that `to_dict` stored."""
        return cls(stored["what"], stored["asked"], stored["found"], stored["holds"])


@dataclass(frozen=True)
class Table:
    """A table of a page, and a note below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Findings:
    """The result of one benchmark."""

    name: str
    question: str
    tables: Sequence[Table]
    targets: Sequence[Target] = ()
    values: dict[str, Any] = field(default_factory=dict)
    """All numbers behind the tables, for JSON."""
    measured: str = field(default_factory=pages.now)
    """Date and time of the measurement, in UTC."""

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON has them."""
        return asdict(self) | {"targets": [target.to_dict() for target in self.targets]}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Findings:
        """Return the findings that `to_dict` stored."""
        tables = [Table(**table) for table in stored["tables"]]
        targets = [Target.from_dict(target) for target in stored["targets"]]
        return cls(**stored | {"tables": tables, "targets": targets})


def markdown(findings: Findings) -> str:
    """Return the findings as a section of a Markdown page."""
    lines = [f"## {findings.name}", "", f"{findings.question} ({findings.measured})", ""]
    for table in findings.tables:
        if table.title:
            lines += [f"**{table.title}**", ""]
        lines += [
            _row(table.columns),
            "|---|" + "--:|" * (len(table.columns) - 1),
            *map(_row, table.rows),
            "",
        ]
        if table.note:
            lines += [table.note, ""]
    if findings.targets:
        lines += ["| target | limit | measured | |", "|---|--:|--:|---|"]
        for target in findings.targets:
            cells = (target.name, target.limit, target.measured, _OUTCOMES[target.holds])
            lines.append(_row(cells))
        lines.append("")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(path: Path, command: str, all_findings: Sequence[Findings]) -> None:
    """Write a Markdown page of all findings, and their numbers as JSON next to it."""
    numbers = path.with_suffix(".json")
    text = "\n".join(
        [
            f"The numbers behind the tables are in [{numbers.name}]({numbers.name}).",
            "",
            "Times on a shared machine vary. Values that are compared were measured in one run, in"
            " turns, and are shown as a ratio:",
            "the median of the rounds' ratios, with their quartiles in brackets.",
            "",
            *map(markdown, all_findings),
        ]
    )
    machine = pages.write(path, "Benchmarks", command, text)
    stored = {
        "command": command,
        "environment": machine,
        "findings": [findings.to_dict() for findings in all_findings],
    }
    numbers.write_text(json.dumps(stored, indent=1) + "\n")


def read(path: Path, here_only: bool = False) -> list[Findings]:
    """Return the findings of the page `path`; an empty list if there is no such page.

    With `here_only`, raises BadInput if another machine or other packages produced the page.
    """
    try:
        stored = json.loads(path.with_suffix(".json").read_text())
    except FileNotFoundError:
        return []
    if here_only:
        here, there = pages.environment(), stored["environment"]
        differing = [name for name in _MACHINE if here.get(name) != there.get(name)]
        if differing:
            raise BadInput(
                f"{path} was measured elsewhere ({', '.join(differing)} differ). A page must come"
                " from one machine; measure again without --resume."
            )
    return [Findings.from_dict(findings) for findings in stored["findings"]]


def spread(values: Sequence[float] | np.ndarray, digits: int = 2) -> str:
    """Return the median and, for more than one value, the quartiles in brackets."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, middle, high = np.quantile(np.asarray(values, float), (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def at_least(name: str, value: float, limit: float, digits: int = 2) -> Target:
    """Return a target that holds if `value` is at least `limit`."""
    return Target(name, f"≥ {limit:.{digits}f}", f"{value:.{digits}f}", value >= limit)


def at_most(name: str, value: float, limit: float, unit: str = "", digits: int = 2) -> Target:
    """Return a target that holds if `value` is at most `limit`."""
    return Target(name, f"≤ {limit:.{digits}f}{unit}", f"{value:.{digits}f}{unit}", value <= limit)
