"""An export leaves an artifact or nothing, however it ends, and replaces an old one atomically."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from command import BadUsage, Unavailable
from export.package import draft_artifact, replace_artifact, resolve_target
from tests.export.factories import write_checkpoint
from tests.factories import write_artifact

Usage = namedtuple("Usage", ("total", "used", "free"))


def test_the_draft_of_a_killed_export_is_removed_by_the_next_and_a_draft_in_use_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    abandoned = tmp_path / ".model-abandond"
    abandoned.mkdir()
    (abandoned / "model.onnx").write_bytes(b"half")
    (tmp_path / ".model-backup").mkdir()  # not a draft: the suffix is too short
    with draft_artifact(tmp_path / "model") as first:
        with draft_artifact(tmp_path / "model") as second:
            assert first.is_dir()
            replace_artifact(second, tmp_path / "model")
        assert first.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model-backup", "model"]
    printed = capsys.readouterr().out
    assert f"removing {abandoned}, left behind by an export that was killed" in printed


def test_an_artifact_is_restored_if_an_export_was_killed_while_replacing_it(tmp_path: Path) -> None:
    write_artifact(tmp_path / ".model-12345678-old")
    with draft_artifact(tmp_path / "model"):
        assert (tmp_path / "model/manifest.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_draft_that_cannot_be_renamed_leaves_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artifact(tmp_path / "model")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == tmp_path / "model" and not self.name.endswith("-old"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), draft_artifact(tmp_path / "model") as folder:
        replace_artifact(folder, tmp_path / "model")
    assert (tmp_path / "model/manifest.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_export_that_gets_a_signal_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    # Signal handlers are reset, because a child ignores SIGINT in a background shell, and SIGHUP
    # under nohup.
    code = (
        "import signal, sys; [signal.signal(n, signal.SIG_DFL) for n in (1, 15)]; signal.signal(2,"
        " signal.default_int_handler); from command import finish; finish('export.commands:main')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "models/model")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("models/.model-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    assert list((tmp_path / "models").iterdir()) == []


def test_a_link_is_kept_and_the_artifact_is_written_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk/model")
    for _ in range(2):
        with draft_artifact(resolve_target(tmp_path / "model")) as folder:
            shutil.copytree(write_artifact(folder / "made").directory, folder, dirs_exist_ok=True)
            shutil.rmtree(folder / "made")
            replace_artifact(folder, resolve_target(tmp_path / "model"))
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "disk/model/manifest.json").is_file()
    assert os.listdir(tmp_path / "disk") == ["model"]


def test_a_mount_point_is_refused_as_a_target() -> None:
    with pytest.raises(
        BadUsage, match=r"/proc is a mount point.*export to a folder inside it, such as /proc/model"
    ):
        resolve_target(Path("/proc"))


def test_any_failure_on_a_full_disk_reports_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 4_096))
    with (
        pytest.raises(Unavailable, match=rf"The disk of {tmp_path} is full: 4,096 bytes are free"),
        draft_artifact(tmp_path / "model"),
    ):
        raise RuntimeError("basic_ios::clear: iostream error")
    assert list(tmp_path.iterdir()) == []
