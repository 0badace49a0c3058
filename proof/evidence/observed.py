"""
What the judge observes in the rows of a run besides its latencies: answers, and ratios by text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proof.evidence.answers import AnswerAudit
from proof.evidence.store import RestartRecord
from proof.evidence.text_ratios import TextRatios
from proof.plans.plan import Plan


class Observed:
    """Collects what the rows of each restart that counts show, while they are audited."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Begin without any restart; EvidenceRejected if answers.json does not fit the plan."""
        self.answers = AnswerAudit(folder, plan)
        self.texts = TextRatios(plan)

    def add(self, start: RestartRecord, rows: Mapping[str, Any]) -> None:
        """Add one restart and its rows."""
        self.answers.add(start, rows)
        self.texts.add(rows)
