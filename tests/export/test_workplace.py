"""An export leaves an artifact or nothing, however it ends, and takes the place of what was there
at once.
"""

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
from export.package import place_of, put_in_place, workplace
from tests.export.factories import write_checkpoint
from tests.factories import write_artifact

Usage = namedtuple("Usage", ("total", "used", "free"))


def test_what_a_killed_export_left_is_removed_by_the_next_and_what_one_works_in_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / ".model-abandond"
    left.mkdir()
    (left / "model.onnx").write_bytes(b"half")
    (tmp_path / ".model-backup").mkdir()  # somebody's own
    with workplace(tmp_path / "model") as first:
        with workplace(tmp_path / "model") as second:
            assert first.is_dir()
            put_in_place(second, tmp_path / "model")
        assert first.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model-backup", "model"]
    assert f"removes {left}, which an export that was killed left behind" in capsys.readouterr().out


def test_the_artifact_that_an_export_was_killed_while_replacing_is_put_back(tmp_path: Path) -> None:
    write_artifact(tmp_path / ".model-12345678-old")
    with workplace(tmp_path / "model"):
        assert (tmp_path / "model/manifest.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_put_in_its_place_leaves_the_old_artifact_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artifact(tmp_path / "model")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == tmp_path / "model" and not self.name.endswith("-old"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), workplace(tmp_path / "model") as folder:
        put_in_place(folder, tmp_path / "model")
    assert (tmp_path / "model/manifest.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_export_that_is_told_to_end_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    # Ended by what began it: in a background shell children ignore SIGINT, and under nohup SIGHUP.
    begin = (
        "import signal, sys; [signal.signal(n, signal.SIG_DFL) for n in (1, 15)]; signal.signal(2,"
        " signal.default_int_handler); from command import finish; finish('export.commands:main')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", begin, str(checkpoint), str(tmp_path / "models/model")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        give_up = time.monotonic() + 120
        while not list(tmp_path.glob("models/.model-*")) and time.monotonic() < give_up:
            time.sleep(0.01)
        process.send_signal(number)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    assert list((tmp_path / "models").iterdir()) == []


def test_a_link_keeps_pointing_where_it_did_and_the_artifact_is_there(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk/model")
    for _ in range(2):
        with workplace(place_of(tmp_path / "model")) as folder:
            shutil.copytree(write_artifact(folder / "made").directory, folder, dirs_exist_ok=True)
            shutil.rmtree(folder / "made")
            put_in_place(folder, place_of(tmp_path / "model"))
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "disk/model/manifest.json").is_file()
    assert os.listdir(tmp_path / "disk") == ["model"]


def test_a_mount_point_is_no_place_for_an_artifact() -> None:
    with pytest.raises(
        BadUsage, match=r"/proc is a mount point.*export to a folder in it, as /proc/model"
    ):
        place_of(Path("/proc"))


def test_a_full_disk_is_named_whatever_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 4_096))
    with (
        pytest.raises(Unavailable, match=rf"The disk of {tmp_path} is full: 4,096 bytes are free"),
        workplace(tmp_path / "model"),
    ):
        raise RuntimeError("basic_ios::clear: iostream error")
    assert list(tmp_path.iterdir()) == []
