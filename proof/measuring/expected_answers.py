"""
The answers that a run must get: those of each artifact alone, before any server is started.

They come from `python -m service.plain`, a process of its own that answers unpacked and one text at
a time, and that checks itself against the answers in the artifact's manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from command import Unavailable
from proof.evidence.answers import (
    MOST_TOLERANCE,
    ExpectedAnswer,
    ExpectedAnswers,
    ExpectedModel,
)
from proof.plans.answers import summarize
from proof.plans.plan import Plan
from service.artifact import Artifact, read_artifact

DEFAULT_TOLERANCE = 0.01
"""Tolerance of a score where the artifact holds neither a parity tolerance nor a self-check."""


def expect_answers(plan: Plan) -> ExpectedAnswers:
    """Return the answers of each of the plan's artifacts to each of its texts.

    Raise Unavailable if an artifact cannot be loaded here.
    """
    texts = plan.read_texts()
    arms: dict[str, list[str]] = {}
    for arm in plan.arms:
        if arm.artifact is not None:
            arms.setdefault(arm.artifact, []).append(arm.name)
    return ExpectedAnswers(
        schema_version=1,
        texts_sha256=hashlib.sha256(plan.texts.read_bytes()).hexdigest(),
        models=[_expect(plan, Path(folder), texts, names) for folder, names in arms.items()],
    )


def _expect(plan: Plan, folder: Path, texts: list[str], arms: list[str]) -> ExpectedModel:
    answered = _answer_alone(plan, folder, texts)
    artifact = read_artifact(folder)
    labels = answered["labels"]
    return ExpectedModel(
        artifact=artifact.digest,
        arms=arms,
        variant=answered["variant"],
        tolerance=tolerance_of(artifact, answered["variant"]),
        answers=[expected_answer(labels, scores) for scores in answered["scores"]],
    )


def _answer_alone(plan: Plan, folder: Path, texts: list[str]) -> dict[str, Any]:
    """Return what `service.plain` prints."""
    done = subprocess.run(
        # -P: a folder named service where the run is started is not ours.
        [sys.executable, "-P", "-m", "service.plain", str(folder), "--variant", plan.variant],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        env={**os.environ, **plan.settings},
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise Unavailable(f"The answers of {folder} could not be computed: {lines[-1]}")
    answered: dict[str, Any] = json.loads(done.stdout)
    return answered


def tolerance_of(artifact: Artifact, variant: str) -> float:
    """Return how far a score may be from the verifier's, by the artifact's own measurements.

    It is the larger one of the parity's tolerance, of probabilities, and the self-check's, of
    logits: no probability moves by more than a logit does.
    """
    measured = artifact.manifest.variants[variant]
    tolerances = [
        measured.parity.tolerance if measured.parity is not None else None,
        measured.self_check.tolerance if measured.self_check is not None else None,
    ]
    known = [tolerance for tolerance in tolerances if tolerance is not None]
    return min(MOST_TOLERANCE, max(known, default=DEFAULT_TOLERANCE))


def expected_answer(labels: list[str], scores: list[float]) -> ExpectedAnswer:
    """Return what answers.json holds of a text with these scores."""
    by_label = list(zip(labels, scores, strict=True))
    answer = summarize(by_label)
    others = sorted(by_label, key=lambda each: -each[1])[1:]
    runner_up = summarize(others) if others else None
    return ExpectedAnswer(
        label=answer.label,
        score=answer.score,
        score_count=answer.score_count,
        score_checksum=answer.score_checksum,
        runner_up=runner_up.label if runner_up else None,
        runner_up_score=runner_up.score if runner_up else 0.0,
    )
