"""No command sends telemetry: it opens no connection, and writes no file in the home folder.

It starts no child process that would do so either.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.artifact import Artifact
from tests.export.factories import write_checkpoint
from tests.factories import write_model
from tests.requirements import strace
from tests.service.test_server import serving

# Python imports sitecustomize at every start, also in child processes. The trap records each
# connection, name lookup, datagram and child process.
TRAP = """
import os, sys
def note(event, arguments):
    if event in (
        "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
        "os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen",
    ):
        with open(os.environ["TRAP"], "a") as file:
            print(event, [str(argument)[:200] for argument in arguments], file=file)
sys.addaudithook(note)
"""
# Local programs: platform.processor reads the processor's name by them, and torch the compiler's.
LOCAL_PROGRAMS = ("uname", "gcc", "g++", "c++", "ldconfig", "lscpu", "/proc")


@pytest.fixture
def trapped(tmp_path: Path) -> dict[str, str]:
    """The environment of a process with an empty home folder and the trap."""
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "sitecustomize.py").write_text(TRAP)
    (tmp_path / "home").mkdir()
    path = os.pathsep.join(filter(None, (str(tmp_path / "trap"), os.environ.get("PYTHONPATH"))))
    return {
        "PYTHONPATH": path,
        "TRAP": str(tmp_path / "events"),
        "HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "home" / "cache"),
    }


def recorded_events(environment: dict[str, str]) -> list[str]:
    """Return the events that the trap recorded, without those of local programs."""
    path = Path(environment["TRAP"])
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if not any(name in line for name in LOCAL_PROGRAMS)]


def files_at_home(environment: dict[str, str]) -> list[str]:
    """Return the paths of all files in the home folder."""
    folder = Path(environment["HOME"])
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_service_connects_nowhere_and_writes_nothing_at_home(
    artifact: Artifact, trapped: dict[str, str]
) -> None:
    with serving(artifact, **trapped):
        pass
    assert recorded_events(trapped) == []
    assert files_at_home(trapped) == []


def test_the_service_writes_only_the_rates_of_its_engines(
    artifact: Artifact, trapped: dict[str, str]
) -> None:
    with serving(artifact, **trapped, DRBERT_MEASURE_ENGINES="true"):
        pass
    assert recorded_events(trapped) == []
    [path] = files_at_home(trapped)
    assert path.startswith("cache/drbert-serve/engines/")


@strace
def test_no_engine_connects_from_native_code(tmp_path: Path, trapped: dict[str, str]) -> None:
    code = (
        "import sys, command, openvino, onnxruntime\n"
        "openvino.Core().compile_model(sys.argv[1], 'CPU')\n"
        "onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
    )
    write_model(tmp_path / "model.onnx")
    calls = tmp_path / "calls"
    command = [
        "strace",
        "-f",
        "-e",
        "trace=connect,sendto",
        "-o",
        str(calls),
        sys.executable,
        "-c",
        code,
        str(tmp_path / "model.onnx"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | trapped
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in calls.read_text().splitlines() if "AF_INET" in line] == []
    assert files_at_home(trapped) == []


def test_export_connects_nowhere_and_writes_nothing_at_home(
    tmp_path: Path, trapped: dict[str, str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "texts.txt").write_text("".join(f"a film number {i}\n" for i in range(20)))
    command = [
        sys.executable,
        "-m",
        "export",
        str(checkpoint),
        str(tmp_path / "artifact"),
        "--variants",
        "cpu-fp32,cpu-int8",
        "--gate",
        str(tmp_path / "texts.txt"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | trapped
    )
    assert done.returncode == 0, done.stderr
    assert recorded_events(trapped) == []
    assert files_at_home(trapped) == []


@pytest.mark.parametrize(
    "module",
    [
        "service.runtimes.openvino",
        "service.runtimes.packed",
        "export.commands",
        "export.graph.variants",
        "graphs.files",
        "benchmarks.commands",
        "proof.commands",
    ],
)
def test_the_telemetry_package_cannot_be_imported_after_any_module(
    module: str, trapped: dict[str, str]
) -> None:
    code = (
        f"import {module}, sys, json; import openvino;"
        " print(json.dumps(sys.modules['openvino_telemetry']))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | trapped,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) is None
    assert recorded_events(trapped) == []
