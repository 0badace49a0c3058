"""
evidence/index.json: every run that was started, and what became of it.

An entry is written before a run begins, so that no bad end is forgotten. Published evidence brings
the index that it was published with, `published/index.json`; its runs count as earlier attempts.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atomic import write_text_atomic
from proof.evidence.audit import read_json
from proof.evidence.store import EvidenceRejected
from proof.plans.plan import Plan

INDEX = "index.json"
STARTED = "started"
"""Outcome of a run that has not ended, or was killed."""
STOPPED = "stopped"
"""Outcome of a run that ended before its last restart; it can be resumed."""

Entry = dict[str, Any]


def append_run(evidence: Path, folder: Path, plan: Plan, claim_digest: str) -> Entry:
    """Add a run to the index of `evidence` and return what run.json holds of it."""
    with _locked(evidence):
        runs = _read_runs(evidence)
        entry = {
            "run": folder.name,
            "plan": plan.name,
            "plan_digest": plan.digest,
            "number_for_this_plan": 1 + _count(runs, "plan_digest", plan.digest),
            "claim_digest": claim_digest,
            "number_for_this_claim": 1 + _count(runs, "claim_digest", claim_digest),
        }
        _write(evidence, [*runs, entry | {"outcome": STARTED}])
    return entry


def record_outcome(folder: Path, outcome: str) -> None:
    """Set what became of the run in `folder`, where an index lists it."""
    evidence = folder.parent
    if not (evidence / INDEX).is_file():
        return
    with _locked(evidence):
        runs = _read_runs(evidence)
        for entry in runs:
            if entry.get("run") == folder.name:
                entry["outcome"] = outcome
        _write(evidence, runs)


@contextmanager
def _locked(evidence: Path) -> Iterator[None]:
    with (evidence / ".lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_runs(evidence: Path) -> list[Entry]:
    """Return the entries of published runs, then those of this folder, each run once."""
    runs: dict[str, Entry] = {}
    for path in (evidence / "published" / INDEX, evidence / INDEX):
        if not path.is_file():
            continue
        entries = read_json(path)
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise EvidenceRejected(f"{path} is no list of runs; move it away to begin a new one.")
        for entry in entries:
            runs[str(entry.get("run"))] = entry
    return list(runs.values())


def _count(runs: list[Entry], key: str, digest: str) -> int:
    return sum(entry.get(key) == digest for entry in runs)


def _write(evidence: Path, runs: list[Entry]) -> None:
    write_text_atomic(evidence / INDEX, json.dumps(runs, indent=2) + "\n")
