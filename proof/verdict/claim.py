"""
The gate for a pipeline: two artifacts do the same work, and sealed evidence shows that it takes
the same time.

Weights may have changed since the run, because they are no work; the graphs may not. What else the
time depends on, DIFFERENCES, must be as it was measured, unless the caller allows a difference.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proof.evidence.audit import loaded_models, read_json, read_sealed_plan
from proof.evidence.store import EvidenceRejected, read_manifest_digest
from proof.plans.plan import Plan, Role
from proof.verdict import identity
from proof.verdict.committed import check_committed
from proof.verdict.identity import Difference
from proof.verdict.judge import judge_run
from proof.verdict.schema import EXIT_CODES, ServedModel, Verdict, metric_label
from proof.verdict.scope import ENGINE_PACKAGES, describe_model, describe_scope, describe_served
from service.artifact import Artifact, read_artifact

NOT_THE_SAME = 1
"""Exit code of `proof identity` for "different", and of a verdict "not-equivalent"."""


DIFFERENCES = ("variant", "precision", "packing", "graph", "engine", "version")
"""What evidence may differ in from the artifacts and the installation here, if it is allowed."""


@dataclass(frozen=True)
class Verified:
    """Both halves of a claim: equal work and equal time."""

    compared: dict[str, Any]
    """The two artifacts as `proof identity` compares them."""
    verdict: Verdict
    """The evidence's verdict, judged again."""
    retrained: list[str]
    """Roles whose artifact has other weights than the one that was measured."""
    measured: dict[str, ServedModel]
    """How the model of each role was served when it was measured."""
    not_measured: list[str]
    """Variants of these artifacts that the evidence says nothing of."""
    allowed: list[str]
    """Differences that would have been refused, in words."""

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
    allow: Collection[str] = (),
) -> Verified:
    """Compare the artifacts and judge the evidence again.

    The digests, or at least their first 16 digits, are those that were published for the evidence:
    whoever can write the folder can write another run into it. Raise EvidenceRejected if one does
    not match, if the evidence was measured on other graphs, or if it differs in one of DIFFERENCES
    that is not in `allow`.
    """
    _check_digest("the manifest", read_manifest_digest(evidence), manifest_digest)
    _check_digest("the plan", read_sealed_plan(evidence).digest, plan_digest)
    compared = identity.compare(reference, candidate)
    verdict = judge_run(evidence)
    check_committed(evidence / "verdict.json", verdict)
    plan = read_sealed_plan(evidence)
    models = loaded_models(evidence)
    environment = read_json(evidence / "environment.json")
    artifacts = {"reference": read_artifact(reference), "candidate": read_artifact(candidate)}
    measured: dict[str, dict[str, Any]] = {}
    for role in _ROLES:
        measured[role] = _measured(evidence, plan, models, role)
        _check_measured(evidence, artifacts[role], measured[role], role, allow)
    served = {role: describe_served(model, environment) for role, model in measured.items()}
    differences = [
        *_served_differences(artifacts, served, measured),
        *_version_difference(environment.get("server")),
    ]
    _refuse(evidence, [each for each in differences if each.subject not in allow])
    unmeasured = {
        variant
        for role, artifact in artifacts.items()
        for variant in artifact.manifest.variants
        if variant != served[role].variant
    }
    return Verified(
        compared=compared,
        verdict=verdict,
        retrained=[role for role in _ROLES if artifacts[role].digest != measured[role]["digest"]],
        measured=served,
        not_measured=sorted(unmeasured),
        allowed=list(dict.fromkeys(each.detail for each in differences)),
    )


_ROLES: tuple[Role, ...] = ("reference", "candidate")


def _served_differences(
    artifacts: Mapping[str, Artifact],
    served: Mapping[str, ServedModel],
    measured: Mapping[str, Mapping[str, Any]],
) -> Iterator[Difference]:
    for role, artifact in artifacts.items():
        yield from _differences(artifact, served[role], role)
        if served[role].runtime == "openvino" and _installed(ENGINE_PACKAGES["openvino"]):
            yield from _graph_difference(artifact, measured[role], role)
    variants = {role: model.variant for role, model in served.items()}
    if len(set(variants.values())) > 1:
        words = " and ".join(f"{role} {variant}" for role, variant in variants.items())
        yield Difference("variant", f"other variants for each: {words}")


def _differences(artifact: Artifact, served: ServedModel, role: str) -> Iterator[Difference]:
    """Yield in what an artifact that is served here differs from what was measured."""
    variant = artifact.manifest.variants.get(served.variant or "")
    if variant is None:
        yield Difference("variant", f"{role} {served.variant}, which {artifact.directory} has not")
    elif variant.precision != served.precision:
        yield Difference("precision", f"{role} in {served.precision}, here in {variant.precision}")
    packs = served.runtime == "openvino" and artifact.manifest.can_pack
    if served.packs is not packs:
        yield Difference("packing", f"{_packing(served.packs)}, here {_packing(packs)}")
    engine = _installed(ENGINE_PACKAGES.get(served.runtime or "", ()))
    if served.engine_version is None or served.engine_version != engine:
        name = served.runtime or "an unknown engine"
        measured = served.engine_version or "of an unknown release"
        yield Difference("engine", f"{name} {measured}, here {engine or 'not installed'}")


def _graph_difference(
    artifact: Artifact, measured: Mapping[str, Any], role: str
) -> Iterator[Difference]:
    """Yield whether the service here would run another graph than the one that was measured.

    Both come from equal exported graphs; the service changes a graph when it loads it.
    """
    from service.runtimes.forms import forms  # imports an engine

    variant = artifact.manifest.variants.get(measured["variant"])
    if variant is None:
        return  # a difference of its own
    digest = measured.get("graph_digest")
    model = artifact.path(variant.files[0])
    here = next(forms(model, artifact.manifest.can_pack, narrows=True)).digest
    if digest != here:
        known = digest[:12] if isinstance(digest, str) else "unknown"
        yield Difference("graph", f"{role}'s executed graph {known}, here {here[:12]}")


def _packing(packs: bool | None) -> str:
    return {True: "packed rows", False: "unpacked rows", None: "unknown packing"}[packs]


def _installed(packages: Collection[str]) -> str | None:
    """Return the release of the first of these packages that is installed here."""
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def _version_difference(server: Any) -> Iterator[Difference]:
    measured = server.get("version") if isinstance(server, dict) else None
    here = _installed(("drbert-serve",))
    if measured is None or measured != here:
        yield Difference(
            "version", f"drbert-serve {measured or 'of an unknown version'}, here {here}"
        )


def _refuse(evidence: Path, differences: Sequence[Difference]) -> None:
    if differences:
        words = "; ".join(dict.fromkeys(each.detail for each in differences))
        options = " ".join(dict.fromkeys(f"--allow {each.subject}" for each in differences))
        raise EvidenceRejected(
            f"{evidence} was measured with {words}. Measure again, or pass {options}."
        )


def _check_digest(name: str, digest: str, expected: str | None) -> None:
    if expected is not None and not digest.startswith(expected.lower()):
        raise EvidenceRejected(f"The digest of {name} is {digest}, not {expected}.")


def _measured(evidence: Path, plan: Plan, models: dict[str, Any], role: Role) -> dict[str, Any]:
    """Return what /info reported of the first arm of a role; both must be the same artifact."""
    copies = [_loaded(evidence, models, plan.arms[i].name) for i in plan.indices(role)]
    for key in _LOADED:
        if copies[0][key] != copies[1][key]:
            raise EvidenceRejected(
                f"{evidence}: environment.json says that the two copies of the {role} differ in"
                f" their {key.replace('_', ' ')}."
            )
    return copies[0]


_LOADED = ("digest", "variant", "encoder_digest", "head_digest", "precision")


def _loaded(evidence: Path, models: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in models:
        raise EvidenceRejected(
            f"{evidence}: environment.json does not say what arm {name} had loaded, so it cannot be"
            " compared with an artifact."
        )
    model: dict[str, Any] = models[name]
    missing = [key for key in _LOADED if not isinstance(model.get(key), str)]
    if missing:
        raise EvidenceRejected(
            f"{evidence}: environment.json does not say the {missing[0]} of what arm {name} had"
            " loaded."
        )
    return model


def _check_measured(
    evidence: Path,
    artifact: Artifact,
    measured: Mapping[str, Any],
    role: str,
    allow: Collection[str],
) -> None:
    """Reject evidence of other graphs than the artifact's."""
    variants = artifact.manifest.variants
    variant = variants.get(measured["variant"])
    if variant is None and "variant" not in allow:
        return  # a difference of its own
    # Without the variant that was measured, its graph may be that of any other variant.
    for part in ("encoder_digest", "head_digest"):
        graphs = [variant] if variant is not None else list(variants.values())
        digests = [getattr(each, part) for each in graphs]
        if measured[part] not in digests:
            raise EvidenceRejected(
                f"{evidence} measured another {role} than {artifact.directory}: its"
                f" {part.replace('_', ' ')} is {measured[part][:12]}, not {digests[0][:12]};"
                " measure again."
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
    if verdict.scope is not None:
        lines += [f"  {line}" for line in describe_scope(verdict.scope)]
    for name, level in verdict.levels.items():
        claims = ", ".join(
            f"{metric_label(item.metric)} {item.statistic} ±{100 * item.margin:.3g} %"
            for item in level.statistics
        )
        lines.append(f"margins at {name}: {claims or 'too few restarts'}")
    for role, model in verified.measured.items():
        lines.append(f"measured {role}: {describe_model(model)}")
    if verified.not_measured:
        lines.append(f"not measured: the variants {', '.join(verified.not_measured)}")
    if verified.allowed:
        lines.append(f"allowed, measured with: {'; '.join(verified.allowed)}")
    first, second = verified.compared["artifact_bytes"]
    lines.append(f"artifacts: {first:,} and {second:,} bytes")
    lines.append(f"manifest {read_manifest_digest(evidence)}")
    lines.append(f"plan {verdict.plan.digest}")
    return "\n".join(lines)
