"""Runtimes on the CPU: flush-to-zero, shown by a product of subnormal numbers, and packing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.artifact import Artifact
from service.classifier import Classifier
from service.runtimes import onnxruntime
from service.runtimes.onnxruntime import OnnxRuntime
from service.runtimes.openvino import OpenVinoRuntime

TINY = 1e-39
RUNTIMES = [OpenVinoRuntime, OnnxRuntime]


def write_model(path: Path, weight: float) -> None:
    """Write a model of x · W with equal weights, so that every term of every sum is that small."""
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["wide", "w"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.full((4, 3), weight, np.float32), "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )


def product(runtime: OpenVinoRuntime | OnnxRuntime) -> float:
    return float(runtime.start({"x": np.ones((2, 4), np.int64)})()[0, 0])


def load_elsewhere(
    engine: type[OpenVinoRuntime | OnnxRuntime], model: Path, threads: int
) -> OpenVinoRuntime | OnnxRuntime:
    """Return a runtime that was loaded in a thread that has ended, as in the service."""
    loaded: list[OpenVinoRuntime | OnnxRuntime] = []
    thread = threading.Thread(target=lambda: loaded.append(engine(model, "f32", threads)))
    thread.start()
    thread.join()
    return loaded[0]


def test_a_graph_that_cannot_be_packed_has_a_row_for_each_text(
    artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    packing = OpenVinoRuntime(artifact.path("model.onnx"), "f32", 1, packs=True)
    assert not packing.grid.supports_packing
    assert caplog.records[0].message == "every text has a row of its own"
    classifier = Classifier(artifact, packing)
    assert classifier.packing is None
    assert classifier.predict(
        [classifier.encode("good good"), classifier.encode("bad")]
    ).tolist() == [[0.0, 2.0], [1.0, 0.0]]


@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_flushes_subnormal_weights_whichever_thread_loads_and_runs_it(
    threads: int, tmp_path: Path
) -> None:
    write_model(tmp_path / "tiny.onnx", TINY)
    write_model(tmp_path / "small.onnx", 1e-30)
    tiny, small = (
        load_elsewhere(OpenVinoRuntime, tmp_path / name, threads)
        for name in ("tiny.onnx", "small.onnx")
    )
    assert tiny.flush_to_zero
    assert product(tiny) == 0
    assert product(small) == pytest.approx(4e-30)


# Graphs that select between integers, each with the right answer for ids of 1, 2, 3 and -1.
CHOICES = {
    "positive": (("Greater", ("x", "zero")), ("x", "zero"), [1, 2, 3, 0]),
    "not minus one": (("Equal", ("x", "minus")), ("one", "x"), [1, 2, 3, 1]),
    "neither": (("Less", ("x", "two")), ("two", "zero"), [2, 0, 0, 2]),
}


def write_choice(path: Path, name: str) -> None:
    """Write a graph whose logits are selected integers."""
    (comparison, compared), branches, _ = CHOICES[name]
    nodes = [
        helper.make_node(comparison, compared, ["chooses"]),
        helper.make_node("Where", ["chooses", *branches], ["chosen"]),
        helper.make_node("Cast", ["chosen"], ["logits"], to=TensorProto.FLOAT),
    ]
    constants = {"zero": 0, "one": 1, "two": 2, "minus": -1}
    graph = helper.make_graph(
        nodes,
        "choice",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )


@pytest.mark.parametrize("name", CHOICES)
def test_integers_are_selected_rightly_by_avx2_code_too(name: str, tmp_path: Path) -> None:
    write_choice(tmp_path / "choice.onnx", name)
    code = (
        "import sys; import numpy as np; from pathlib import Path;"
        " from tests.service.runtimes.test_runtimes import OpenVinoRuntime\n"
        "runtime = OpenVinoRuntime(Path(sys.argv[1]), 'f32', 1)\n"
        "print(runtime.flush_to_zero,"
        " runtime.start({'x': np.array([[1, 2, 3, -1]])})()[0].tolist())"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "choice.onnx")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    )
    assert process.stdout == f"False {[float(value) for value in CHOICES[name][2]]}\n", (
        process.stderr
    )


def test_onnx_runtime_reports_rightly_whether_it_flushes_subnormal_weights(
    tmp_path: Path,
) -> None:
    write_model(tmp_path / "tiny.onnx", TINY)
    runtime = load_elsewhere(OnnxRuntime, tmp_path / "tiny.onnx", 1)
    assert (product(runtime) == 0) == runtime.flush_to_zero


def test_in_a_process_of_its_own_onnx_runtime_flushes_subnormal_weights_in_every_model(
    tmp_path: Path,
) -> None:
    write_model(tmp_path / "tiny.onnx", TINY)
    code = (
        "import sys; from pathlib import Path;"
        " from tests.service.runtimes.test_runtimes import OnnxRuntime,"
        " load_elsewhere, product\nfor threads in (1, 2):\n    runtime ="
        " load_elsewhere(OnnxRuntime, Path(sys.argv[1]), threads)\n    print(runtime.flush_to_zero,"
        " product(runtime))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tiny.onnx")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.splitlines() == ["True 0.0"] * 2, process.stderr


@pytest.mark.parametrize("engine", RUNTIMES)
def test_loading_and_running_a_model_does_not_change_the_callers_arithmetic(
    engine: type[OpenVinoRuntime | OnnxRuntime], tmp_path: Path
) -> None:
    write_model(tmp_path / "tiny.onnx", TINY)
    product(engine(tmp_path / "tiny.onnx", "f32", 1))
    assert np.float32(TINY) * np.float32(1) != 0


@pytest.mark.parametrize("engine", RUNTIMES)
def test_a_batchs_arrays_live_until_they_have_been_read(
    engine: type[OpenVinoRuntime | OnnxRuntime], tmp_path: Path
) -> None:
    write_model(tmp_path / "ones.onnx", 1.0)
    runtime = engine(tmp_path / "ones.onnx", "f32", 1)
    array = np.ones((2, 4), np.int64)
    reference = weakref.ref(array)
    finish = runtime.start({"x": array})
    del array
    # An engine that shares the caller's memory would otherwise read what is there next.
    assert reference() is not None or engine is OnnxRuntime
    assert finish().tolist() == [[4.0] * 3] * 2


def test_a_session_that_opens_slowly_does_not_stop_those_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "ones.onnx", 1.0)
    running = OnnxRuntime(tmp_path / "ones.onnx", "f32", 1)
    is_opening, may_end = threading.Event(), threading.Event()
    really_open = onnxruntime.open_session

    def open_slowly(*arguments: Any) -> Any:
        is_opening.set()
        assert may_end.wait(30)
        return really_open(*arguments)

    monkeypatch.setattr(onnxruntime, "open_session", open_slowly)
    opened: list[OnnxRuntime] = []
    loader = threading.Thread(
        target=lambda: opened.append(OnnxRuntime(tmp_path / "ones.onnx", "f32", 1))
    )
    loader.start()
    assert is_opening.wait(30)
    inputs = {"x": np.ones((2, 4), np.int64)}
    assert running.start(inputs)().tolist() == [[4.0] * 3] * 2
    may_end.set()
    loader.join(30)
    assert opened[0].start(inputs)().tolist() == [[4.0] * 3] * 2
