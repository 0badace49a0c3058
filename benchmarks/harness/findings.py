"""
What a benchmark found: tables, targets with what was measured beside them, and where all of it ran.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from command import BadInput
from proof.measuring.run import processor_name
from service.host import cpus

PACKAGES = (
    "openvino",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "transformers",
    "nncf",
    "uvicorn",
    "fastapi",
    "tokenizers",
)


@dataclass(frozen=True)
class Target:
    """What was asked, and what was found; `holds` is None where this machine cannot show it."""

    what: str
    asked: str
    found: str
    holds: bool | None


@dataclass(frozen=True)
class Table:
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
    """Every number that the tables are made of, for JSON."""
    measured: str = field(
        default_factory=lambda: f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    )
    """When it was done."""


def markdown(findings: Findings) -> str:
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
        lines += ["| target | asked | measured | |", "|---|--:|--:|---|"]
        lines += [
            _row(
                (
                    t.what,
                    t.asked,
                    t.found,
                    {True: "holds", False: "**missed**", None: "not measurable here"}[t.holds],
                )
            )
            for t in findings.targets
        ]
        lines.append("")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def environment() -> dict[str, Any]:
    """Where this runs, as far as it matters to a time."""
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "processor": processor_name(),
        "processors": os.cpu_count(),
        "usable": cpus.usable(),
        "native_precisions": sorted(cpus.native_precisions()),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": installed(PACKAGES),
    }


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those that are there; a machine with a GPU has others than one that exports."""
    there = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            there[name] = importlib.metadata.version(name)
    return there


def write(path: Path, command: str, all_findings: Sequence[Findings]) -> None:
    """A Markdown page of all findings, and the numbers beside it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = environment()
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    head = [
        "# Benchmarks",
        "",
        (
            f"Made by `{command}` on {where['date']}: {where['processors']} processors"
            f" ({where['processor']}), native precisions {', '.join(where['native_precisions'])},"
            f" Python {where['python']}, {packages}. The numbers behind the tables are in"
            f" [{path.with_suffix('.json').name}]({path.with_suffix('.json').name})."
        ),
        "",
        (
            "Times of a shared machine move; what is compared was measured in one run, in turns,"
            " and is shown as a ratio: the median of the"
        ),
        "rounds' ratios, in brackets their quartiles.",
        "",
    ]
    path.write_text("\n".join(head) + "\n" + "\n".join(map(markdown, all_findings)))
    told = {
        "command": command,
        "environment": where,
        "findings": [asdict(findings) for findings in all_findings],
    }
    path.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")


def read(path: Path, here_only: bool = False) -> list[Findings]:
    """What `write` wrote; nothing if there is no such page. `here_only`: BadInput if it is of
    another machine or other packages.
    """
    try:
        told = json.loads(path.with_suffix(".json").read_text())
    except FileNotFoundError:
        return []
    here, there = environment(), told["environment"]
    if here_only and (
        unlike := [
            name
            for name in ("processor", "usable", "native_precisions", "packages")
            if here[name] != there[name]
        ]
    ):
        raise BadInput(
            f"{path} was measured elsewhere ({', '.join(unlike)} differ), and a page is of one"
            " place; measure it anew, without --resume."
        )
    return [
        Findings(
            **one
            | {
                "tables": [Table(**table) for table in one["tables"]],
                "targets": [Target(**target) for target in one["targets"]],
            }
        )
        for one in told["findings"]
    ]


def spread(values: Sequence[float] | np.ndarray, digits: int = 2) -> str:
    """Median and, of more than one, quartiles."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, middle, high = np.quantile(np.asarray(values, float), (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def at_least(what: str, ratio: float, asked: float, digits: int = 2) -> Target:
    return Target(what, f"≥ {asked:.{digits}f}", f"{ratio:.{digits}f}", ratio >= asked)


def at_most(what: str, value: float, asked: float, unit: str = "", digits: int = 2) -> Target:
    return Target(what, f"≤ {asked:.{digits}f}{unit}", f"{value:.{digits}f}{unit}", value <= asked)
