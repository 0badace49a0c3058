"""
The digest of a claim: equal for every run that tries to show the same of the same models.

A plan's digest changes with every byte of its file. This one does not change with the plan's name,
seed, size or comments, so that repeated attempts can be counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from proof.plans.plan import Arm, Plan


def digest_claim(plan: Plan, artifacts: Mapping[str, str], texts: bytes) -> str:
    """Return the SHA-256 of what a plan claims, about what, on which texts.

    `artifacts` holds the digest of each arm's artifact, where the run starts the servers itself;
    `texts` is the content of the file of texts.
    """
    claim = {
        "claim": plan.claim,
        "arms": {
            role: sorted({_subject(arm, artifacts) for arm in plan.arms if arm.role == role})
            for role in ("reference", "candidate")
        },
        "levels": {level.name: _margins(level.margins) for level in plan.judged_levels},
        "texts": hashlib.sha256(texts).hexdigest(),
    }
    return hashlib.sha256(json.dumps(claim, sort_keys=True).encode()).hexdigest()


def _subject(arm: Arm, artifacts: Mapping[str, str]) -> str:
    return artifacts.get(arm.name) or f"{arm.dialect} {arm.url} {arm.model}"


def _margins(margins: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    return {metric: dict(values) for metric, values in margins.items() if values}
