"""The gate for a pipeline: equal work and sealed evidence of equal time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from command import CommandError
from proof.commands import main
from proof.evidence.store import EvidenceRejected, read_manifest_digest
from proof.measuring.run import finish_run
from service.artifact import Artifact
from tests.proof.factories import write_evidence
from tests.proof.measuring.test_run import honest_artifact


def evidence_of(folder: Path, reference: Artifact, candidate: Artifact, **how: object) -> Path:
    """Evidence that says it was measured on these two artifacts."""
    write_evidence(folder, **({"noise": 0.02} | how))
    models: dict[str, dict[str, object]] = {}
    for names, artifact in (
        (("bert", "bert-again"), reference),
        (("drbert", "drbert-again"), candidate),
    ):
        variant = artifact.manifest.variants["cpu-fp32"]
        described: dict[str, object] = {
            "digest": artifact.digest,
            "variant": "cpu-fp32",
            "encoder_digest": variant.encoder_digest,
            "head_digest": variant.head_digest,
            "precision": variant.precision,
        }
        models |= dict.fromkeys(names, described)
    (folder / "environment.json").write_text(json.dumps({"server": {"models": models}}))
    finish_run(folder)
    return folder


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Artifact, Artifact]:
    return honest_artifact(tmp_path / "a"), honest_artifact(tmp_path / "b")


def verify(twins: tuple[Artifact, Artifact], evidence: Path) -> int:
    return main(["verify-claim", str(twins[0].directory), str(twins[1].directory), str(evidence)])


def test_equal_work_and_equal_time_pass(
    twins: tuple[Artifact, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(twins, evidence_of(tmp_path / "run", *twins)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("same: ")
    assert "equivalent. drbert is as fast as bert" in printed


def test_the_verdicts_code_is_the_gates(twins: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    slower = evidence_of(tmp_path / "slower", *twins, factors={"drbert": 1.1, "drbert-again": 1.1})
    assert verify(twins, slower) == 1
    assert verify(twins, evidence_of(tmp_path / "noisy", *twins, noise=0.2, seed=1)) == 2
    assert (
        verify(twins, evidence_of(tmp_path / "blind", *twins, factors={"bert-delayed": 1.0})) == 3
    )


def test_other_weights_pass_and_are_reported(
    twins: tuple[Artifact, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence = evidence_of(tmp_path / "run", *twins)
    environment = json.loads((evidence / "environment.json").read_text())
    environment["server"]["models"]["drbert"]["digest"] = "0" * 64
    (evidence / "environment.json").write_text(json.dumps(environment))
    finish_run(evidence)
    assert verify(twins, evidence) == 0
    assert "other weights than those measured: candidate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"encoder_digest": "0" * 64},
            "measured another candidate than .*encoder digest is 000000000000",
        ),
        ({"precision": "bf16"}, "its precision is bf16, not f32"),
        ({"variant": "cpu-int8"}, "measured the variant cpu-int8, which"),
        (None, "does not say what arm drbert had loaded"),
    ],
)
def test_evidence_of_other_graphs_is_refused(
    twins: tuple[Artifact, Artifact], tmp_path: Path, change: dict[str, str] | None, words: str
) -> None:
    evidence = evidence_of(tmp_path / "run", *twins)
    environment = json.loads((evidence / "environment.json").read_text())
    models = environment["server"]["models"]
    models["drbert"] = models["drbert"] | change if change else None
    if change is None:
        del models["drbert"]
    (evidence / "environment.json").write_text(json.dumps(environment))
    finish_run(evidence)
    with pytest.raises(EvidenceRejected, match=words):
        verify(twins, evidence)


def test_the_claim_is_printed_with_what_it_covers_and_its_digests(
    twins: tuple[Artifact, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence = evidence_of(tmp_path / "run", *twins)
    assert verify(twins, evidence) == 0
    printed = capsys.readouterr().out
    assert "measured reference: cpu-fp32 in f32 by an unknown engine, unpacked rows" in printed
    assert "claimed at unloaded: end to end p50 ±2 %, end to end mean ±2 %," in printed
    assert f"manifest {read_manifest_digest(evidence)}" in printed
    assert main(["judge", str(evidence)]) == 0
    assert f"manifest {read_manifest_digest(evidence)}" in capsys.readouterr().out


def test_other_evidence_than_the_published_digests_name_is_rejected(
    twins: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    evidence = evidence_of(tmp_path / "run", *twins)
    command = ["verify-claim", str(twins[0].directory), str(twins[1].directory), str(evidence)]
    manifest = read_manifest_digest(evidence)
    plan = hashlib.sha256((evidence / "plan.toml").read_bytes()).hexdigest()
    assert main([*command, "--manifest", manifest[:16], "--plan", plan]) == 0
    with pytest.raises(EvidenceRejected, match="digest of the manifest is"):
        main([*command, "--manifest", "0" * 16])
    with pytest.raises(EvidenceRejected, match="digest of the plan is"):
        main([*command, "--plan", "0" * 64])
    with pytest.raises(CommandError, match="16 to 64 hexadecimal digits"):
        main([*command, "--plan", "abc"])
