"""Nothing phones home: what is run connects nowhere, leaves nothing in the home folder, and starts
no child that would.
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

# Python imports it at every start, in children too: it notes each connect, lookup of a name,
# datagram and child.
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
# Its own processors are looked up by platform.processor, and the compiler by torch: programs of
# this machine.
OWN_CHILDREN = ("uname", "gcc", "g++", "c++", "ldconfig", "lscpu", "/proc")


@pytest.fixture
def trapped(tmp_path: Path) -> dict[str, str]:
    """The environment of a process with a fresh home and the trap."""
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "sitecustomize.py").write_text(TRAP)
    (tmp_path / "home").mkdir()
    path = os.pathsep.join(filter(None, (str(tmp_path / "trap"), os.environ.get("PYTHONPATH"))))
    return {
        "PYTHONPATH": path,
        "TRAP": str(tmp_path / "noted"),
        "HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "home" / "cache"),
    }


def noted(environment: dict[str, str]) -> list[str]:
    path = Path(environment["TRAP"])
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if not any(name in line for name in OWN_CHILDREN)]


def home(environment: dict[str, str]) -> list[str]:
    folder = Path(environment["HOME"])
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_service_connects_nowhere_and_writes_nothing_at_home(
    artifact: Artifact, trapped: dict[str, str]
) -> None:
    with serving(artifact, **trapped):
        pass
    assert noted(trapped) == []
    assert home(trapped) == []


@strace
def test_no_engine_connects_by_itself_beneath_python(
    tmp_path: Path, trapped: dict[str, str]
) -> None:
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
    assert home(trapped) == []


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
    assert noted(trapped) == []
    assert home(trapped) == []


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
def test_the_reporter_is_out_of_reach_whatever_is_imported_first(
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
    assert noted(trapped) == []
