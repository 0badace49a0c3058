"""
The section of a report on counted instructions, from work.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from proof.reports.page import Cell, Column, Row, Table, Tone
from proof.work.schema import LIMITS, Work, WorkOutcome, how_counted, read_work, sentence
from proof.work.sealed import WORK

TONES: Mapping[WorkOutcome, Tone] = {"same": "good", "different": "bad", "inconclusive": "open"}


@dataclass(frozen=True)
class WorkSection:
    """The counts of reference and candidate."""

    verdict: Cell
    sentence: str
    method: str
    """How and what was counted."""
    limits: str
    """What the counts cannot show."""
    table: Table


def build_work(folder: Path) -> WorkSection | None:
    """Return the counts of a run; None if it counted none."""
    path = folder / WORK
    if not path.exists():
        return None
    work = read_work(path)
    first = work.artifacts[0]
    return WorkSection(
        verdict=Cell(work.verdict, TONES[work.verdict]),
        sentence=sentence(work),
        method=(
            f"{first.variant} by {first.runtime}, which computes in {first.computes_in}, in one"
            f" thread; counted by {how_counted(work)}"
        ),
        limits=LIMITS[work.method],
        table=_table(work),
    )


def _table(work: Work) -> Table:
    columns = [
        Column("batch"),
        *(Column(artifact.name, is_numeric=True) for artifact in work.artifacts),
        Column("difference", is_numeric=True),
        Column("two copies", is_numeric=True),
    ]
    rows: list[Row] = [
        [
            each.batch,
            *(f"{mean:,.0f}" for mean in each.means),
            f"{each.ratio - 1:+.4%}",
            f"{each.spread:.4%}",
        ]
        for each in work.measurements
    ]
    return Table("Instructions for one text", columns, rows, layout="wide")
