"""The gate for a pipeline: equal work and sealed evidence of equal time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from command import CommandError
from proof.commands import main
from proof.evidence.store import EvidenceRejected, read_manifest_digest
from proof.measuring.run import finish_run
from proof.verdict.identity import compare
from service.artifact import Artifact
from service.runtimes.forms import forms
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
        graph = artifact.path(variant.files[0])
        described: dict[str, object] = {
            "digest": artifact.digest,
            "variant": "cpu-fp32",
            "encoder_digest": variant.encoder_digest,
            "head_digest": variant.head_digest,
            "precision": variant.precision,
            "runtime": "openvino",
            "packs": artifact.manifest.can_pack,
            "graph_digest": next(forms(graph, artifact.manifest.can_pack, narrows=True)).digest,
        }
        models |= dict.fromkeys(names, described)
    server = {
        "version": importlib.metadata.version("drbert-serve"),
        "engines": {"openvino": importlib.metadata.version("openvino")},
        "models": models,
    }
    (folder / "environment.json").write_text(json.dumps({"server": server}))
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
    for name in ("drbert", "drbert-again"):
        environment["server"]["models"][name]["digest"] = "0" * 64
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
        ({"precision": "bf16"}, "with candidate in bf16, here in f32. .* pass --allow precision"),
        ({"variant": "cpu-int8"}, "with candidate cpu-int8, which .* has not; .*--allow variant"),
        ({"packs": None}, "with unknown packing, here (un)?packed rows. .*--allow packing"),
        ({"graph_digest": "0" * 64}, "candidate's executed graph 000000000000, here"),
        ({"graph_digest": None}, "candidate's executed graph unknown, .*--allow graph"),
        ({"runtime": "cuda"}, "cuda of an unknown release, here .*--allow engine"),
        (None, "does not say what arm drbert had loaded"),
    ],
)
def test_evidence_of_other_graphs_is_refused(
    twins: tuple[Artifact, Artifact], tmp_path: Path, change: dict[str, str] | None, words: str
) -> None:
    evidence = evidence_of(tmp_path / "run", *twins)
    environment = json.loads((evidence / "environment.json").read_text())
    models = environment["server"]["models"]
    for name in ("drbert", "drbert-again"):
        models[name] = models[name] | change if change else None
        if change is None:
            del models[name]
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
    engine = f"openvino {importlib.metadata.version('openvino')}"
    assert re.search(f"measured reference: cpu-fp32 in f32 by {engine}, .* ?rows?", printed)
    assert "margins at unloaded: end to end p50 ±2 %, end to end mean ±2 %," in printed
    assert "claimed: p50 and mean of end to end and p50, mean and p99 of inference" in printed
    assert "artifacts: " in printed
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


def test_another_installation_is_refused_unless_it_is_allowed(
    twins: tuple[Artifact, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence = evidence_of(tmp_path / "run", *twins)
    environment = json.loads((evidence / "environment.json").read_text())
    environment["server"]["engines"]["openvino"] = "2020.1"
    del environment["server"]["version"]
    for model in environment["server"]["models"].values():
        model["packs"] = not model["packs"]
    (evidence / "environment.json").write_text(json.dumps(environment))
    finish_run(evidence)
    command = ["verify-claim", str(twins[0].directory), str(twins[1].directory), str(evidence)]
    with pytest.raises(EvidenceRejected) as refused:
        main(command)
    assert "openvino 2020.1, here 20" in str(refused.value)
    assert "drbert-serve of an unknown version, here" in str(refused.value)
    assert "pass --allow packing --allow engine --allow version." in str(refused.value)
    allowed = ["--allow", "packing", "--allow", "engine"]
    with pytest.raises(EvidenceRejected, match=r"pass --allow version\.$"):
        main([*command, *allowed])
    assert main([*command, *allowed, "--allow", "version"]) == 0
    assert "allowed, measured with: " in capsys.readouterr().out
    with pytest.raises(CommandError, match="invalid choice"):
        main([*command, "--allow", "everything"])


def test_a_variant_that_the_artifact_lacks_may_be_allowed_for_the_same_graph(
    twins: tuple[Artifact, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence = evidence_of(tmp_path / "run", *twins)
    path = evidence / "environment.json"
    path.write_text(path.read_text().replace("cpu-fp32", "cpu-other"))
    finish_run(evidence)
    command = ["verify-claim", str(twins[0].directory), str(twins[1].directory), str(evidence)]
    assert main([*command, "--allow", "variant"]) == 0
    assert "not measured: the variants cpu-fp32" in capsys.readouterr().out
    path.write_text(path.read_text().replace(twins[0].manifest.encoder_digest, "0" * 64))
    finish_run(evidence)
    with pytest.raises(EvidenceRejected, match="encoder digest is 000000000000"):
        main([*command, "--allow", "variant"])


def test_copies_that_differ_are_refused(twins: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    evidence = evidence_of(tmp_path / "run", *twins)
    environment = json.loads((evidence / "environment.json").read_text())
    environment["server"]["models"]["bert-again"]["digest"] = "0" * 64
    (evidence / "environment.json").write_text(json.dumps(environment))
    finish_run(evidence)
    with pytest.raises(EvidenceRejected, match="copies of the reference differ in their digest"):
        verify(twins, evidence)


def test_an_invented_identity_is_refused(twins: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    evidence = evidence_of(tmp_path / "run", *twins)
    compared = compare(twins[0].directory, twins[1].directory)
    (evidence / "identity.json").write_text(json.dumps({"drbert": compared}))
    finish_run(evidence)
    assert verify(twins, evidence) == 0
    compared["variants"]["cpu-fp32"]["encoder"]["digests"] = ["0" * 64, "0" * 64]
    (evidence / "identity.json").write_text(json.dumps({"drbert": compared}))
    finish_run(evidence)
    with pytest.raises(EvidenceRejected, match=r"compared another encoder of bert than"):
        main(["judge", str(evidence)])
