from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.artifact import Artifact, ArtifactError, ArtifactMissing, read_artifact


def change_manifest(artifact: Artifact, **changes: Any) -> None:
    path = artifact.path("manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_artifact_as_written_is_read(artifact: Artifact) -> None:
    assert read_artifact(artifact.directory).manifest.labels == ["NEGATIVE", "POSITIVE"]


def test_one_changed_byte_is_refused_and_the_file_named(artifact: Artifact) -> None:
    path = artifact.path("model.onnx")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx has changed since export"):
        read_artifact(artifact.directory)


def test_a_folder_without_a_manifest_is_refused(artifact: Artifact) -> None:
    artifact.path("manifest.json").unlink()
    with pytest.raises(ArtifactMissing, match=r"has no manifest\.json; export writes it last"):
        read_artifact(artifact.directory)


def test_a_missing_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing, match="python -m export"):
        read_artifact(tmp_path / "nowhere")


def test_a_missing_file_is_named(artifact: Artifact) -> None:
    artifact.path("tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"lacks tokenizer\.json"):
        read_artifact(artifact.directory)


def test_a_file_the_manifest_does_not_list_is_refused(artifact: Artifact) -> None:
    artifact.path("extra.bin").write_bytes(b"?")
    with pytest.raises(ArtifactError, match=r"holds extra\.bin, which its manifest does not list"):
        read_artifact(artifact.directory)


def test_an_unknown_field_is_named(artifact: Artifact) -> None:
    change_manifest(artifact, colour="red")
    with pytest.raises(ArtifactError, match="colour: Extra inputs are not permitted"):
        read_artifact(artifact.directory)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": ["POSITIVE", "NEGATIVE"]}, "do not give its seal"),
        ({"encoder_digest": "0" * 64}, "do not give its seal"),
        ({"tokenizer_digest": "0" * 64}, "is not the digest of tokenizer.json"),
        ({"labels": ["GOOD", "BAD", "GOOD"]}, "labels: .*two are called 'GOOD'"),
    ],
)
def test_a_changed_field_of_the_manifest_is_refused(artifact: Artifact, changes: dict[str, Any], words: str) -> None:
    change_manifest(artifact, **changes)
    with pytest.raises(ArtifactError, match=words):
        read_artifact(artifact.directory)


def test_another_schema_version_is_refused(artifact: Artifact) -> None:
    change_manifest(artifact, schema_version=1)
    with pytest.raises(ArtifactError, match="schema_version is 1, this service reads 2 and 3"):
        read_artifact(artifact.directory)


def test_a_file_outside_the_folder_is_refused(artifact: Artifact) -> None:
    change_manifest(artifact, files={"../secret": "0" * 64, "model.onnx": "0" * 64, "tokenizer.json": "0" * 64})
    with pytest.raises(ArtifactError, match="is no plain file name"):
        read_artifact(artifact.directory)


def test_a_manifest_that_is_no_json_is_refused(artifact: Artifact) -> None:
    artifact.path("manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not JSON"):
        read_artifact(artifact.directory)
