"""What a model's name on the command line means: a path, a hub id, or a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from command import BadUsage, Unavailable
from service.checkpoints.source import SHARDS, ModelSource, _is_complete, is_checkpoint
from tests.factories import write_artifact


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "location", "revision", "is_hub_id"),
    [
        ("owner/model", "owner/model", None, True),
        ("owner/model@main", "owner/model", "main", True),
        ("owner/model@refs/pr/3", "owner/model", "refs/pr/3", True),
        ("artifacts/bert@main", "artifacts/bert", "main", True),
        ("artifacts/bert", "artifacts/bert", None, False),
        ("./owner/model", "./owner/model", None, False),
        ("model", "model", None, False),
        ("a/b/c", "a/b/c", None, False),
        ("owner/model@", "owner/model@", None, False),
        ("@main", "@main", None, False),
    ],
)
def test_a_source_is_a_path_or_a_hub_id_with_its_revision(
    text: str, location: str, revision: str | None, is_hub_id: bool
) -> None:
    source = ModelSource.parse(text)
    assert (source.location, source.revision, source.is_hub_id) == (location, revision, is_hub_id)


def test_what_exists_is_a_path_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "owner/model@2").mkdir(parents=True)
    source = ModelSource.parse("owner/model@2")
    assert source == ModelSource("owner/model@2")
    assert not source.is_hub_id
    assert source.folder() == Path("owner/model@2")
    # Its folder exists, so it was meant as a path too.
    assert not ModelSource.parse("owner/other").is_hub_id


def test_a_model_is_called_as_its_folder_or_as_its_id_without_the_owner(tmp_path: Path) -> None:
    assert ModelSource.parse(".").name == tmp_path.name
    assert ModelSource.parse("owner/model@main").name == "model"


def test_a_path_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match=r"^model is not a hub id, so it has no revision 'main'"):
        ModelSource.parse("model@main").folder()


def test_a_mistyped_path_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "tickets/roberta").mkdir(parents=True)
    with pytest.raises(Unavailable, match="did you mean tickets/roberta"):
        ModelSource.parse("ticket/roberta").folder()


def test_a_checkpoint_has_a_configuration_or_weights_and_no_manifest(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact").directory
    assert not is_checkpoint(artifact)
    (artifact / "config.json").write_text("{}")
    assert not is_checkpoint(artifact)
    (tmp_path / "checkpoint").mkdir()
    assert not is_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "checkpoint/config.json").write_text("{}")
    assert is_checkpoint(tmp_path / "checkpoint")
    assert not is_checkpoint(Path("no\0name"))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("revision", ["@main", "", f"@{COMMIT}"])
def test_what_the_hubs_cache_holds_needs_no_hub(tmp_path: Path, revision: str) -> None:
    repository = tmp_path / "hub/models--owner--model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    code = (
        "import sys; from service.checkpoints.source import ModelSource;"
        " print(ModelSource.parse(sys.argv[1]).folder())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"owner/model{revision}"],
        capture_output=True,
        text=True,
        env=os.environ
        | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert done.stdout.strip() == str(snapshot)


@pytest.mark.parametrize(
    ("names", "is_complete"),
    [
        (["config.json", "tokenizer.json", "model.safetensors"], True),
        (["config.json", "vocab.txt", "model.safetensors"], True),
        (["config.json", "tokenizer.json"], False),
        (["config.json", "model.safetensors"], False),
        (["config.json", "tokenizer.json", SHARDS, "a.safetensors"], False),
        (["config.json", "tokenizer.json", SHARDS, "a.safetensors", "b.safetensors"], True),
    ],
)
def test_a_download_that_was_interrupted_is_not_taken_for_a_checkpoint(
    tmp_path: Path, names: list[str], is_complete: bool
) -> None:
    for name in names:
        content = '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
        (tmp_path / name).write_text(content if name == SHARDS else "")
    assert _is_complete(tmp_path) == is_complete


def test_a_hub_that_cannot_be_reached_is_one_line() -> None:
    code = (
        "from command import finish\nfrom service.checkpoints.source import ModelSource\n"
        "finish(lambda _: print(ModelSource.parse('owner/model').folder()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 69
    assert "owner/model is no folder, and it could not be downloaded" in done.stderr
    assert "Traceback" not in done.stderr


ROOT = Path(__file__).parents[3]
