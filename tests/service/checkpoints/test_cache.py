"""A checkpoint is exported once; what is cached of it is found again, and never half of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from command import BadInput, Unavailable
from service.artifact import MANIFEST
from service.checkpoints import cache as cache_module
from service.checkpoints.cache import CheckpointCache, default_folder
from service.checkpoints.digest import export_digest
from service.checkpoints.exporter import ExportOptions, run_export
from service.http.admin import build_admin
from service.http.context import HttpContext
from service.settings import Settings
from service.state import ServiceState
from tests.export.factories import write_checkpoint
from tests.factories import write_artifact
from tests.service.test_server import classify, free_port, running, start


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "reviews")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def exported(cache: Path) -> list[Path]:
    """Return the artifacts in a cache; fail if it holds anything else."""
    folders = sorted(cache.iterdir()) if cache.exists() else []
    assert all((folder / MANIFEST).is_file() for folder in folders)
    return folders


def test_a_checkpoint_is_exported_once_and_an_artifact_is_not(
    checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    models = CheckpointCache(cache)
    first = models.fetch(str(checkpoint))
    [folder] = exported(cache)
    stamp = (folder / MANIFEST).stat().st_mtime_ns
    again = CheckpointCache(cache).fetch(str(checkpoint))
    assert again.digest == first.digest
    assert (folder / MANIFEST).stat().st_mtime_ns == stamp
    assert models.fetch_again(first).directory == folder
    artifact = models.fetch(str(write_artifact(tmp_path / "artifact").directory))
    assert models.fetch_again(artifact).directory == artifact.directory
    assert exported(cache) == [folder]


def test_a_cached_artifact_that_was_changed_is_made_again(checkpoint: Path, cache: Path) -> None:
    first = CheckpointCache(cache).fetch(str(checkpoint))
    first.path("model.onnx").write_bytes(b"x")
    again = CheckpointCache(cache).fetch(str(checkpoint))
    again.check_unchanged()
    assert exported(cache) == [first.directory]


def test_a_digest_changes_with_what_an_export_depends_on_and_with_nothing_else(
    checkpoint: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("good\n")
    usual = export_digest(checkpoint, ExportOptions())
    (checkpoint / "README.md").write_text("A model.")
    (checkpoint / "optimizer.pt").write_bytes(b"x")
    (checkpoint / "trainer_state.json").write_text("{}")
    assert export_digest(checkpoint, ExportOptions()) == usual
    digests = {usual}
    digests.add(export_digest(checkpoint, ExportOptions(task="multi_label")))
    digests.add(export_digest(checkpoint, ExportOptions(calibration=texts)))
    digests.add(export_digest(checkpoint, ExportOptions(gate=texts)))
    texts.write_text("bad\n")
    digests.add(export_digest(checkpoint, ExportOptions(gate=texts)))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"classifier_dropout": 0.5}))
    digests.add(export_digest(checkpoint, ExportOptions()))
    assert len(digests) == 6


def test_a_checkpoint_that_cannot_be_exported_says_why_and_leaves_nothing(
    checkpoint: Path, cache: Path
) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "bert", "num_labels": 0}')
    with pytest.raises(BadInput, match=r"reviews cannot be exported: .*config\.json"):
        CheckpointCache(cache).fetch(str(checkpoint))
    assert exported(cache) == []


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_folder() == Path("/caches/drbert-serve/artifacts")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert default_folder() == Path("/home/user/.cache/drbert-serve/artifacts")


def test_a_checkpoint_is_served_by_its_folder_and_by_two_starters_exported_once(
    checkpoint: Path, cache: Path
) -> None:
    environment = {"DRBERT_ARTIFACT_CACHE": str(cache)}
    second = start(str(checkpoint), "--port", str(free_port()), **environment)
    try:
        with running(str(checkpoint), **environment) as (url, _):
            answer = classify(url, "good")
            assert answer["model"] == "reviews"
            assert answer["data"][0]["num_classes"] == 2
    finally:
        second.terminate()
        output = second.communicate(timeout=60)[0]
    assert second.returncode in (0, 128 + signal.SIGTERM)
    assert "Traceback" not in output
    assert len(exported(cache)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_export_leaves_nothing(
    checkpoint: Path, cache: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "service", str(checkpoint), "--port", str(free_port())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"DRBERT_ARTIFACT_CACHE": str(cache)},
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "exporting the graph" in line:
            break
    [child] = children(process.pid)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    assert not Path(f"/proc/{child}").exists()
    assert list(cache.iterdir()) == []


def children(pid: int) -> Iterator[int]:
    """Yield the processes that a process has started."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def test_a_taken_port_is_reported_before_the_export(checkpoint: Path, cache: Path) -> None:
    port = free_port()
    with running(str(write_artifact(checkpoint.parent / "artifact").directory)) as (url, _):
        port = int(url.rpartition(":")[2])
        done = start(str(checkpoint), "--port", str(port), DRBERT_ARTIFACT_CACHE=str(cache))
        output = done.communicate(timeout=60)[0]
    assert done.returncode == 69
    assert f"Port {port}" in output
    assert not cache.exists()


def test_options_of_export_are_refused_for_an_artifact(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "artifact").directory
    done = start(str(folder), "--task", "multi_label")
    output = done.communicate(timeout=60)[0]
    assert done.returncode == 64
    assert "--task is for the export of checkpoints" in output


WITHOUT_TORCH = """
import sys
import importlib.util

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "torch" else find_spec(name, *more)
from service.__main__ import run
run()
"""


def test_without_the_export_packages_a_checkpoint_is_refused_with_the_remedy(
    checkpoint: Path, cache: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(checkpoint), "--port", str(free_port())],
        capture_output=True,
        text=True,
        env=os.environ | {"DRBERT_ARTIFACT_CACHE": str(cache)},
        check=False,
    )
    assert done.returncode == 69
    [line] = [line for line in done.stderr.splitlines() if line.startswith("drbert-serve: ")]
    assert f"{checkpoint} is a checkpoint, and its export needs torch" in line
    assert "pip install '.[export]'" in line
    assert "Traceback" not in done.stderr


async def test_the_private_port_takes_a_checkpoint_and_reloads_what_was_saved_since(
    checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    service = ServiceState({"first": artifact}, Settings(warm_up_s=0, artifact_cache=cache))
    service.lifecycle.load()
    transport = httpx.ASGITransport(build_admin(HttpContext(service), None))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as admin:
        loaded = await admin.post(
            "/models/tickets", json={"artifact": str(checkpoint)}, timeout=120
        )
        assert loaded.status_code == 200, loaded.text
        shutil.rmtree(checkpoint)
        write_checkpoint(checkpoint, seed=1)
        reloaded = await admin.post("/models/tickets", json={}, timeout=120)
        assert reloaded.json()["replaced"] == loaded.json()["digest"]
        assert reloaded.json()["digest"] != loaded.json()["digest"]
    assert len(exported(cache)) == 2
    await service.lifecycle.drain()


def test_a_checkpoint_that_changes_during_its_export_is_not_cached(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_and_train_on(folder: Path, artifact: Path, options: ExportOptions) -> None:
        run_export(folder, artifact, options)
        shutil.rmtree(folder)
        write_checkpoint(folder, seed=1)

    monkeypatch.setattr(cache_module, "run_export", export_and_train_on)
    with pytest.raises(Unavailable, match="was changed while it was exported"):
        CheckpointCache(cache).fetch(str(checkpoint))
    assert exported(cache) == []


def test_what_a_killed_export_left_is_removed_by_the_next_of_any_checkpoint(
    checkpoint: Path, cache: Path
) -> None:
    (cache / ".0123456789abcdef-abcdefgh").mkdir(parents=True)
    CheckpointCache(cache).fetch(str(checkpoint))
    assert len(exported(cache)) == 1


def test_an_export_ends_with_the_process_that_started_it(checkpoint: Path, cache: Path) -> None:
    process = start(str(checkpoint), "--port", str(free_port()), DRBERT_ARTIFACT_CACHE=str(cache))
    assert process.stdout is not None
    for line in process.stdout:
        if "exporting the graph" in line:
            break
    [child] = children(process.pid)
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not is_running(child))
    assert list(cache.iterdir()) == []


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, for half a minute."""
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that nobody waits for has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_user_without_a_home_is_told_where_a_cache_may_be(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(Unavailable, match="set DRBERT_ARTIFACT_CACHE"):
        CheckpointCache().fetch(str(checkpoint))
    artifact = write_artifact(tmp_path / "artifact").directory
    assert CheckpointCache().fetch(str(artifact)).directory == artifact
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be made"):
        CheckpointCache(tmp_path / "file" / "cache").fetch(str(checkpoint))
