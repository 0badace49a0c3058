"""A model that does not fit into memory is reported as such, whichever library notices it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from service.artifact import Artifact, read_artifact, sha256, with_checksum
from service.host import cgroups, memory
from service.runtimes import RuntimeUnavailable
from tests.service.test_server import free_port

MIB = 2**20


def with_ballast(artifact: Artifact, mib: int) -> Artifact:
    """Return the model with a table of so many MiB that does not change its answers."""
    model = onnx.load(artifact.path("model.onnx"))
    graph = model.graph
    graph.node[-1].output[0] = "unburdened"
    graph.initializer.extend(
        [
            numpy_helper.from_array(
                np.random.default_rng(0).random((mib * MIB // 4 // 512, 512), np.float32), "ballast"
            ),
            numpy_helper.from_array(np.zeros((), np.float32), "zero"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("Gather", ["ballast", "input_ids"], ["heavy"]),
            helper.make_node("ReduceSum", ["heavy"], ["sum"], keepdims=0),
            helper.make_node("Mul", ["sum", "zero"], ["nought"]),
            helper.make_node("Add", ["unburdened", "nought"], ["logits"]),
        ]
    )
    onnx.save(model, artifact.path("model.onnx"))
    manifest = artifact.manifest.model_copy(
        update={
            "files": {**artifact.manifest.files, "model.onnx": sha256(artifact.path("model.onnx"))}
        }
    )
    artifact.path("manifest.json").write_text(
        with_checksum(manifest).model_dump_json(), encoding="utf-8"
    )
    return read_artifact(artifact.directory)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_a_model_that_does_not_fit_ends_with_69_and_the_limit(
    artifact: Artifact, runtime: str
) -> None:
    directory = with_ballast(artifact, 300).directory
    process = subprocess.run(
        [sys.executable, "-m", "service", f"reviews={directory}", "--port", str(free_port())],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"DRBERT_RUNTIME": runtime},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (700 * MIB, 700 * MIB)),
    )
    assert process.returncode == 69, process.stderr
    last = process.stderr.splitlines()[-1]
    assert "There is not enough memory to load reviews: cpu-fp32 has 96 bytes of weights" in last
    assert f"{700 * MIB:,} bytes (ulimit -v)" in last
    assert "export it again" not in last


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        OSError(12, "Cannot allocate memory"),
        RuntimeUnavailable(
            "OpenVINO cannot run model.onnx: x.so: failed to map segment from shared object"
        ),
        RuntimeUnavailable(
            "[ONNXRuntimeError] : 6 : BFCArena::AllocateRawInternal Failed to allocate memory for"
            " requested buffer"
        ),
    ],
)
def test_messages_of_libraries_about_memory_are_recognised_also_as_a_cause(
    error: Exception,
) -> None:
    assert memory.ran_out(error)
    outer = RuntimeUnavailable("the variant cannot compute")
    outer.__cause__ = error
    assert memory.ran_out(outer)
    assert not memory.ran_out(RuntimeError("the graph is wrong"))


NO_LIMIT = str(2**63 - 4096)
"""What version 1 writes."""
VERSIONS = {
    1: (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
        "9223372036854771712",
    ),
    2: ("memory.max", "memory.current", "inactive_file", "max"),
}


@pytest.fixture(params=VERSIONS)
def cgroup(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, str]:
    """A cgroup of which 300 MiB are used, 100 as a cache; and the file of its limit: none yet."""
    limit, usage, freeable, unlimited = VERSIONS[request.param]
    monkeypatch.setattr(memory, "LIMITS", ())
    monkeypatch.setattr(cgroups, "folders", lambda controller: [tmp_path / "no", tmp_path])
    (tmp_path / limit).write_text(f"{unlimited}\n")
    (tmp_path / usage).write_text(f"{300 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\n{freeable} {100 * MIB}\nshmem 1\n")
    return tmp_path, limit


def test_the_memory_limit_is_reported_where_there_is_one(
    cgroup: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, limit = cgroup
    assert "this host has" in memory.limit()
    (folder / limit).write_text("1073741824\n")
    assert memory.limit() == "its container is limited to 1,073,741,824 bytes"
    (folder / limit).unlink()
    monkeypatch.setattr(memory, "MEMINFO", folder / "nowhere")
    assert memory.limit() == "its limit is not known"
    assert memory.available_bytes() == 0


def test_what_a_cgroup_leaves_is_available(cgroup: tuple[Path, str]) -> None:
    folder, limit = cgroup
    on_host = memory.available_bytes()
    assert on_host > 500 * MIB
    (folder / limit).write_text(str(500 * MIB))
    assert memory.available_bytes() == 300 * MIB
    (folder / limit).write_text(str(100 * MIB))
    assert memory.available_bytes() == 0


def test_without_a_line_of_available_memory_none_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 4 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.available_bytes() == 0


def test_a_limit_of_the_address_space_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda number: (MIB, MIB))
    assert memory.available_bytes() == 0
