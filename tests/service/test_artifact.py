"""Reading an artifact: it is verified whole, or refused with the file or field that is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.artifact import (
    MANIFEST_BYTES,
    Agreement,
    Artifact,
    ArtifactError,
    ArtifactMissing,
    read_artifact,
)


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
    with pytest.raises(ArtifactMissing, match=r"has no manifest\.json and no config"):
        read_artifact(artifact.directory)


def test_a_missing_folder_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing, match="drbert-export"):
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
        ({"labels": ["POSITIVE", "NEGATIVE"]}, "do not match its checksum"),
        ({"encoder_digest": "0" * 64}, "do not match its checksum"),
        ({"tokenizer_digest": "0" * 64}, "is not the digest of tokenizer.json"),
        ({"labels": ["GOOD", "BAD", "GOOD"]}, "labels: .*two are called 'GOOD'"),
    ],
)
def test_a_changed_field_of_the_manifest_is_refused(
    artifact: Artifact, changes: dict[str, Any], words: str
) -> None:
    change_manifest(artifact, **changes)
    with pytest.raises(ArtifactError, match=words):
        read_artifact(artifact.directory)


RENAMED_FIELDS = {"padding_invariant": "padding_safe", "checksum": "seal"}


def test_the_manifest_keeps_the_keys_of_renamed_fields(artifact: Artifact) -> None:
    written = json.loads(artifact.path("manifest.json").read_text())
    assert written == artifact.manifest.model_dump(mode="json")
    for field, key in RENAMED_FIELDS.items():
        assert written[key] == getattr(artifact.manifest, field)
        assert field not in written


@pytest.mark.parametrize(("field", "key"), RENAMED_FIELDS.items())
def test_a_manifest_with_a_fields_name_in_place_of_its_key_is_refused(
    artifact: Artifact, field: str, key: str
) -> None:
    path = artifact.path("manifest.json")
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, field: values.pop(key)}))
    with pytest.raises(ArtifactError, match=f"{field}: Extra inputs are not permitted"):
        read_artifact(artifact.directory)


def test_an_agreement_keeps_the_keys_of_renamed_fields() -> None:
    values: dict[str, Any] = {
        "texts": 1,
        "agreeing": 1,
        "lower_bound": 0.5,
        "wanted": 0.9,
        "accuracy": None,
        "accuracy_of_fp32": None,
        "labels": {},
        "wanted_per_label": 0.8,
        "rest": "bf16",
    }
    agreement = Agreement.model_validate(values)
    assert agreement.required_lower_bound == 0.9
    assert agreement.required_per_label == 0.8
    assert agreement.unquantized_precision == "bf16"
    assert agreement.model_dump() == values


def test_another_schema_version_is_refused(artifact: Artifact) -> None:
    change_manifest(artifact, schema_version=1)
    with pytest.raises(ArtifactError, match="schema_version is 1, this service reads 2 and 3"):
        read_artifact(artifact.directory)


def test_a_file_outside_the_folder_is_refused(artifact: Artifact) -> None:
    change_manifest(
        artifact, files={"../secret": "0" * 64, "model.onnx": "0" * 64, "tokenizer.json": "0" * 64}
    )
    with pytest.raises(ArtifactError, match="is no plain file name"):
        read_artifact(artifact.directory)


def test_a_manifest_that_is_no_json_is_refused(artifact: Artifact) -> None:
    artifact.path("manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not JSON"):
        read_artifact(artifact.directory)


def too_long(folder: Path) -> Path:
    return folder / ("a" * 5000)


def a_link_to_itself(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def with_a_nul(folder: Path) -> Path:
    return folder / "a\0b"


def with_a_surrogate(folder: Path) -> Path:
    return folder / "\ud800"


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "x"


def regular_file(folder: Path) -> Path:
    return below_a_file(folder).parent


@pytest.mark.parametrize(
    "make",
    [too_long, a_link_to_itself, with_a_nul, with_a_surrogate, below_a_file, regular_file],
    ids=lambda make: make.__name__,
)
def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(ArtifactError):
        read_artifact(make(tmp_path))


def put(path: Path, kind: str) -> None:
    """Replace a file by something else."""
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "FIFO":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)
        case "dangling link":
            path.symlink_to("nowhere")
        case "sparse terabyte":
            with path.open("wb") as file:
                file.truncate(2**40)
        case _:
            path.symlink_to(kind)


KINDS = [
    "folder",
    "FIFO",
    "loop",
    "dangling link",
    "sparse terabyte",
    "/dev/zero",
    "/dev/random",
    "/proc/self/mem",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "tokenizer.json"])
def test_a_path_that_is_no_regular_file_is_refused(
    artifact: Artifact, name: str, kind: str
) -> None:
    put(artifact.path(name), kind)
    with pytest.raises(ArtifactError):
        read_artifact(artifact.directory)


def test_a_socket_is_refused_in_a_files_place(artifact: Artifact) -> None:
    artifact.path("model.onnx").unlink()
    with (
        socket.socket(socket.AF_UNIX) as listening,
        contextlib.chdir(artifact.directory),
    ):  # A socket's path may have 108 bytes.
        listening.bind("model.onnx")
    with pytest.raises(ArtifactError, match="it is no regular file"):
        read_artifact(artifact.directory)


def test_a_file_behind_links_is_read_as_in_the_cache_of_the_hub(
    artifact: Artifact, tmp_path: Path
) -> None:
    for name in ("manifest.json", "model.onnx", "tokenizer.json"):
        (tmp_path / f"blob-{name}").write_bytes(artifact.path(name).read_bytes())
        artifact.path(name).unlink()
        artifact.path(name).symlink_to(Path("..", f"blob-{name}"))
    read_artifact(artifact.directory).check_unchanged()


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"schema_version": 2, "name": ' + b"[" * 100_000,
        b'{"schema_version": 2, "labels": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"a":' * 100_000,
        b"\xff\xfe",
        b'{"schema_version": ' + b"9" * 10_000 + b"}",
        b'{"schema_version": 2, "' + b"x" * 100_000 + b'": 1}',
        b"null",
        b"",
        b'{"schema_version": "' + b"x" * 1_000_000 + b'"}',
    ],
)
def test_an_unusable_manifest_is_refused_with_a_short_message(
    artifact: Artifact, content: bytes
) -> None:
    artifact.path("manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError) as refused:
        read_artifact(artifact.directory)
    assert len(str(refused.value)) < 2000


def test_a_manifest_beyond_its_limit_is_refused(artifact: Artifact) -> None:
    with artifact.path("manifest.json").open("ab") as file:
        file.write(b" " * MANIFEST_BYTES)
    with pytest.raises(ArtifactError, match=f"the limit is {MANIFEST_BYTES}"):
        read_artifact(artifact.directory)


def test_a_text_of_too_many_tokens_is_refused(artifact: Artifact) -> None:
    change_manifest(artifact, max_tokens=1_000_000_000)
    with pytest.raises(
        ArtifactError, match="max_tokens: Input should be less than or equal to 32768"
    ):
        read_artifact(artifact.directory)


def replaced(path: Path) -> None:
    path.with_name("other").write_bytes(path.read_bytes())
    os.replace(path.with_name("other"), path)


def written_to_in_place(path: Path) -> None:
    status = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # As if to hide the change.


def moved_away_and_back(path: Path) -> None:
    os.rename(path, path.with_name("away"))
    os.rename(path.with_name("away"), path)


def made_a_link(path: Path) -> None:
    os.rename(path, path.with_name("away"))
    path.symlink_to("away")


@pytest.mark.parametrize(
    "change",
    [replaced, written_to_in_place, moved_away_and_back, made_a_link, Path.unlink],
    ids=lambda change: change.__name__,
)
def test_a_file_that_changes_after_it_was_verified_is_detected(
    artifact: Artifact, change: Callable[[Path], None]
) -> None:
    verified = read_artifact(artifact.directory)
    verified.check_unchanged()
    time.sleep(0.02)  # File times advance at least a hundred times a second.
    change(verified.path("model.onnx"))
    with pytest.raises(
        ArtifactError, match=r"model\.onnx was changed or touched after it was verified"
    ):
        verified.check_unchanged()


def test_a_link_to_the_folder_that_is_changed_meanwhile_leads_to_no_other_folder(
    artifact: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "current").symlink_to(artifact.directory)
    verified = read_artifact(tmp_path / "current")
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path / "nowhere")
    # Loading the same path again would read the new folder.
    assert verified.directory == tmp_path / "current"
    assert verified.path("model.onnx") == artifact.directory / "model.onnx"
    verified.check_unchanged()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_checkpoint_is_refused_with_the_command_that_exports_it(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "reviews"
    folder.mkdir()
    (folder / name).write_text("{}")
    with pytest.raises(
        ArtifactMissing,
        match=(
            f"{folder} is a checkpoint, not an artifact; export it: `drbert-export {folder}"
            " artifacts/reviews`"
        ),
    ):
        read_artifact(folder)


def test_what_may_be_a_hub_id_is_refused_with_the_form_that_is_one() -> None:
    with pytest.raises(ArtifactMissing, match="write textattack/bert-base-uncased-SST-2@main"):
        read_artifact(Path("textattack/bert-base-uncased-SST-2"))
