"""
The gate for a pipeline: two artifacts do the same work, and sealed evidence shows that it takes
the same time.

Weights may have changed since the run, because they are no work; the graphs may not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proof.evidence.audit import loaded_models, read_sealed_plan
from proof.evidence.store import EvidenceRejected, read_manifest_digest
from proof.plans.plan import Plan
from proof.verdict import identity
from proof.verdict.committed import check_committed
from proof.verdict.judge import judge_run
from proof.verdict.schema import EXIT_CODES, Verdict, metric_label
from service.artifact import Artifact, read_artifact

NOT_THE_SAME = 1
"""Exit code of `proof identity` for "different", and of a verdict "not-equivalent"."""


@dataclass(frozen=True)
class Verified:
    """Both halves of a claim: equal work and equal time."""

    compared: dict[str, Any]
    """The two artifacts as `proof identity` compares them."""
    verdict: Verdict
    """The evidence's verdict, judged again."""
    retrained: list[str]
    """Roles whose artifact has other weights than the one that was measured."""
    measured: dict[str, dict[str, Any]]
    """What was loaded for each role when it was measured, as /info reported it."""

    @property
    def exit_code(self) -> int:
        """The verdict's exit code; 1 if equal work is claimed and not done."""
        if self.verdict.claim == "equivalence" and not self.compared["same"]:
            return NOT_THE_SAME
        return EXIT_CODES[self.verdict.verdict]


def verify(
    reference: Path,
    candidate: Path,
    evidence: Path,
    manifest_digest: str | None = None,
    plan_digest: str | None = None,
) -> Verified:
    """Compare the artifacts and judge the evidence again.

    The digests, or at least their first 16 digits, are those that were published for the evidence:
    whoever can write the folder can write another run into it. Raise EvidenceRejected if one does
    not match, or if the evidence was measured on other graphs.
    """
    _check_digest("the manifest", read_manifest_digest(evidence), manifest_digest)
    _check_digest("the plan", read_sealed_plan(evidence).digest, plan_digest)
    compared = identity.compare(reference, candidate)
    verdict = judge_run(evidence)
    check_committed(evidence / "verdict.json", verdict)
    plan = read_sealed_plan(evidence)
    models = loaded_models(evidence)
    retrained = []
    measured_models = {}
    for role, folder in (("reference", reference), ("candidate", candidate)):
        measured = _measured(evidence, plan, models, role)
        artifact = read_artifact(folder)
        _check_measured(evidence, artifact, measured, role)
        measured_models[role] = measured
        if artifact.digest != measured["digest"]:
            retrained.append(role)
    return Verified(compared, verdict, retrained, measured_models)


def _check_digest(name: str, digest: str, expected: str | None) -> None:
    if expected is not None and not digest.startswith(expected.lower()):
        raise EvidenceRejected(f"The digest of {name} is {digest}, not {expected}.")


def _measured(evidence: Path, plan: Plan, models: dict[str, Any], role: str) -> dict[str, Any]:
    name = next(arm.name for arm in plan.arms if arm.role == role)
    if name not in models:
        raise EvidenceRejected(
            f"{evidence}: environment.json does not say what arm {name} had loaded, so it cannot be"
            " compared with an artifact."
        )
    model: dict[str, Any] = models[name]
    missing = [
        key
        for key in ("digest", "variant", "encoder_digest", "head_digest", "precision")
        if not isinstance(model.get(key), str)
    ]
    if missing:
        raise EvidenceRejected(
            f"{evidence}: environment.json does not say the {missing[0]} of what arm {name} had"
            " loaded."
        )
    return model


def _check_measured(
    evidence: Path, artifact: Artifact, measured: dict[str, Any], role: str
) -> None:
    variant = artifact.manifest.variants.get(measured["variant"])
    if variant is None:
        raise EvidenceRejected(
            f"{evidence} measured the variant {measured['variant']}, which {artifact.directory} has"
            " not; export it, or measure again."
        )
    for field in ("encoder_digest", "head_digest", "precision"):
        value = getattr(variant, field)
        if value != measured[field]:
            raise EvidenceRejected(
                f"{evidence} measured another {role} than {artifact.directory}: its"
                f" {field.replace('_', ' ')} is {measured[field][:12]}, not {value[:12]}; measure"
                " again."
            )


def describe(verified: Verified, evidence: Path) -> str:
    """Return the comparison and the verdict as lines for a terminal."""
    lines = [identity.describe(verified.compared)]
    if verified.retrained:
        lines.append(
            f"other weights than those measured: {', '.join(verified.retrained)}; the graphs are"
            " the measured ones."
        )
    verdict = verified.verdict
    lines.append(f"evidence {evidence}: {verdict.verdict}. {verdict.sentence}")
    for role, model in verified.measured.items():
        lines.append(
            f"measured {role}: {model['variant']} in {model['precision']} by"
            f" {model.get('runtime', 'an unknown engine')},"
            f" {'packed' if model.get('packs') else 'unpacked'} rows"
        )
    for name, level in verdict.levels.items():
        claims = ", ".join(
            f"{metric_label(item.metric)} {item.statistic} ±{100 * item.margin:.3g} %"
            for item in level.statistics
        )
        lines.append(f"claimed at {name}: {claims or 'nothing'}")
    lines.append(f"manifest {read_manifest_digest(evidence)}")
    lines.append(f"plan {verdict.plan.digest}")
    return "\n".join(lines)
