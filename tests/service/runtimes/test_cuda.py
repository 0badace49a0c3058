"""
The parts of the GPU's runtimes that need no GPU: shapes and buffers, run by the CPU's provider, and
the options passed to ONNX Runtime.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command import UNAVAILABLE
from service.artifact import Artifact
from service.batching.shapes import GPU, Grid, Shapes
from service.classifier import Classifier, Encoded
from service.errors import EngineBroken
from service.runtimes import RuntimeUnavailable, pinned
from service.runtimes.cuda import NO_GRAPH, CudaRuntime, GpuOptions, cuda_options, without_graphs
from service.runtimes.onnxruntime import OnnxRuntime, open_session, session_options
from service.runtimes.tensorrt import graph_digest, profile, tensorrt_options, versions
from tests.factories import MAX_TOKENS, write_artifact


class OnTheCpu(CudaRuntime):
    """The runtime with the CPU's provider: the same buffers and bindings without CUDA."""

    device = "CPU"

    def __init__(self, model: Path, labels: int, max_tokens: int, grid: Grid = GPU) -> None:
        self.grid = grid
        self._open(model, labels, max_tokens, [("CPUExecutionProvider", {})], "cpu")


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "bag")


def inputs(rows: Sequence[Sequence[int]], length: int) -> dict[str, np.ndarray]:
    ids = np.zeros((len(rows), length), np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


# A run


def test_a_batch_is_padded_to_the_grid_and_answered_for_its_own_rows_only(
    artifact: Artifact,
) -> None:
    runtime = OnTheCpu(artifact.path("model.onnx"), 2, MAX_TOKENS)
    batch = inputs([[2, 4, 3], [2, 5, 4, 3], [2, 3]], 8)
    expected = OnnxRuntime(artifact.path("model.onnx"), "f32", 1).start(batch)()
    answer = runtime.start(batch)()
    assert answer.dtype == np.float32
    assert answer.tolist() == expected.tolist()
    assert list(runtime._buckets) == [(4, 8)]


def test_every_shape_of_the_grid_is_captured_once_and_no_other_is(artifact: Artifact) -> None:
    runtime = OnTheCpu(artifact.path("model.onnx"), 2, MAX_TOKENS)
    runtime.captures = True
    for rows in (1, 3, 4, 3):
        runtime.start(inputs([[2, 4, 3]] * rows, 8))()
    runtime.start(inputs([[2, 4, 3]], 7))()
    graphs = [
        bucket.options.get_run_config_entry("gpu_graph_id") for bucket in runtime._buckets.values()
    ]
    assert graphs == ["0", "1"]
    assert (
        runtime._make_bucket((1, 7), NO_GRAPH).options.get_run_config_entry("gpu_graph_id") == "-1"
    )


def test_an_answer_outlives_the_next_batch_in_the_same_buffers(artifact: Artifact) -> None:
    runtime = OnTheCpu(artifact.path("model.onnx"), 2, MAX_TOKENS)
    first, second = runtime.start(inputs([[2, 4, 3]], 8)), runtime.start(inputs([[2, 5, 3]], 8))
    assert (first().tolist(), second().tolist()) == ([[0.0, 1.0]], [[1.0, 0.0]])


def test_rows_of_an_earlier_larger_batch_change_nothing(artifact: Artifact) -> None:
    runtime = OnTheCpu(artifact.path("model.onnx"), 2, MAX_TOKENS)
    runtime.start(inputs([[2, 4, 4, 4, 3]] * 4, 8))()
    assert runtime.start(inputs([[2, 5, 3]] * 3, 8))().tolist() == [[1.0, 0.0]] * 3


def failing(
    runtime: OnTheCpu, monkeypatch: pytest.MonkeyPatch, fails: Callable[[str], bool]
) -> list[str]:
    """Let runs with these graph ids fail, and return the ids of all runs."""
    tried: list[str] = []
    real = runtime._session

    class Session:
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            tried.append(options.get_run_config_entry("gpu_graph_id"))
            if fails(tried[-1]):
                raise RuntimeError(
                    "CUDA error 700: an illegal memory access was encountered\nat somewhere.cc"
                )
            real.run_with_iobinding(binding, options)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    monkeypatch.setattr(runtime, "_session", Session())
    return tried


def test_a_shape_is_run_twice_before_it_is_captured(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = OnTheCpu(artifact.path("model.onnx"), 2, MAX_TOKENS)
    runtime.captures = True
    tried = failing(runtime, monkeypatch, lambda _: False)
    for _ in range(2):
        runtime.start(inputs([[2, 4, 3]], 8))()
    assert tried == [NO_GRAPH, NO_GRAPH, "0", "0"]


def test_a_shape_that_cannot_be_captured_fails_with_the_setting_that_turns_graphs_off(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = OnTheCpu(artifact.path("model.onnx"), 2, MAX_TOKENS)
    runtime.captures = True
    failing(runtime, monkeypatch, lambda graph: graph == "0")
    with pytest.raises(
        RuntimeUnavailable,
        match=(
            r"cannot run 1 texts of 8 tokens on CPU \(CUDA error 700: .*encountered\);"
            r" DRBERT_GPU_GRAPHS=false runs without"
        ),
    ) as raised:
        Classifier(artifact, runtime).start([Encoded([2, 4, 3], [0] * 3, False)])()
    assert raised.value.exit_code == UNAVAILABLE
    assert cuda_options(GpuOptions(graphs=False))["enable_cuda_graph"] == "0"


def test_a_broken_gpu_is_distinguished_from_one_failed_run(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = OnTheCpu(artifact.path("model.onnx"), 2, MAX_TOKENS)
    runtime.captures = True
    for rows in (1, 2):
        runtime.start(inputs([[2, 4, 3]] * rows, 8))()
    down: set[str] = {"1"}
    failing(runtime, monkeypatch, lambda graph: graph in down)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runtime.start(inputs([[2, 4, 3]] * 2, 8))()
    down.add("0")
    with pytest.raises(EngineBroken, match="CPU does nothing any more; this replica will end"):
        runtime.start(inputs([[2, 4, 3]] * 2, 8))()


def test_two_models_on_one_gpu_take_turns(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtimes = [OnTheCpu(artifact.path("model.onnx"), 2, MAX_TOKENS) for _ in range(2)]
    running, max_running = 0, 0

    def count_runs(runtime: OnTheCpu) -> None:
        real = runtime._run_locked

        def counted(batch: Any) -> Any:
            nonlocal running, max_running
            running += 1
            max_running = max(max_running, running)
            try:
                return real(batch)
            finally:
                running -= 1

        monkeypatch.setattr(runtime, "_run_locked", counted)

    for runtime in runtimes:
        count_runs(runtime)
    waiting = [runtime.start(inputs([[2, 4, 3]], 8)) for _ in range(50) for runtime in runtimes]
    assert [finish().tolist() for finish in waiting] == [[[0.0, 1.0]]] * 100
    assert max_running == 1


def test_a_runtime_that_captures_warms_up_every_shape_regardless_of_the_time_limit(
    artifact: Artifact,
) -> None:
    classifier = Classifier(artifact, OnTheCpu(artifact.path("model.onnx"), 2, MAX_TOKENS))
    shapes = list(Shapes(MAX_TOKENS, grid=GPU).by_work())
    assert classifier.warm_up(0) == len(shapes) == 16
    buckets = classifier.runtime._buckets  # type: ignore[attr-defined]
    assert list(buckets) == shapes[::-1], "the largest is first, so that others reuse its memory"


# ONNX Runtime's options and errors


def test_a_provider_that_is_not_in_use_is_an_error_and_never_the_cpu(artifact: Artifact) -> None:
    with pytest.raises(RuntimeUnavailable, match="CUDAExecutionProvider") as raised:
        open_session(
            artifact.path("model.onnx"), session_options(1), [("CUDAExecutionProvider", {})]
        )
    assert raised.value.exit_code == UNAVAILABLE


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_onnx_runtimes_own_fallback_is_detected(artifact: Artifact) -> None:
    with pytest.raises(
        RuntimeUnavailable,
        match="was asked for CUDAExecutionProvider and uses CPUExecutionProvider",
    ):
        open_session(
            artifact.path("model.onnx"), session_options(1), [("CUDAExecutionProvider", {})]
        )


def test_cuda_captures_graphs_and_has_a_memory_limit_only_if_set() -> None:
    assert cuda_options(GpuOptions())["enable_cuda_graph"] == "1"
    assert "gpu_mem_limit" not in cuda_options(GpuOptions())
    assert cuda_options(GpuOptions(memory_bytes=2**30))["gpu_mem_limit"] == "1073741824"
    assert without_graphs(cuda_options(GpuOptions()))["enable_cuda_graph"] == "0"


def test_tensorrt_has_one_profile_over_every_shape() -> None:
    lowest, likely, highest = profile(GPU, 512, ["input_ids", "attention_mask"])
    assert lowest == "input_ids:1x1,attention_mask:1x1"
    assert likely == "input_ids:16x128,attention_mask:16x128"
    assert highest == "input_ids:128x512,attention_mask:128x512"
    assert profile(GPU, 64, ["input_ids"]) == (
        "input_ids:1x1",
        "input_ids:16x64",
        "input_ids:128x64",
    )


def test_tensorrt_keeps_the_graphs_types_and_caches_its_engines(tmp_path: Path) -> None:
    options = tensorrt_options(
        tmp_path, "ab" * 32, GPU, 512, ["input_ids"], GpuOptions(memory_bytes=2**30)
    )
    assert options["trt_fp16_enable"] == "0"
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert options["trt_cuda_graph_enable"] == "0", "the provider has one graph for all shapes"
    assert options["trt_engine_cache_prefix"] == "abababababababab"
    assert options["trt_max_workspace_size"] == str(2**30)
    assert all(isinstance(value, str) for value in options.values())


def test_twins_have_engines_of_their_own_and_one_timing_cache(tmp_path: Path) -> None:
    first, second = (
        tensorrt_options(tmp_path, digest * 32, GPU, 512, ["input_ids"], GpuOptions())
        for digest in ("aa", "bb")
    )
    assert first["trt_engine_cache_prefix"] != second["trt_engine_cache_prefix"]
    assert first["trt_timing_cache_path"] == second["trt_timing_cache_path"]


def test_models_with_one_graph_and_different_weights_have_engines_of_their_own(
    tmp_path: Path,
) -> None:
    digests = set()
    for weights in (b"one", b"other"):
        (tmp_path / "cuda-fp16.onnx").write_bytes(b"graph")
        (tmp_path / "cuda-fp16.weights").write_bytes(weights)
        (tmp_path / "cpu-fp32.onnx").write_bytes(weights)
        digests.add(graph_digest(tmp_path / "cuda-fp16.onnx"))
    assert len(digests) == 2


def test_an_engine_is_reused_only_with_the_same_versions_and_gpu() -> None:
    folders = {
        versions("1.31.1", "10.16.1", "9.0"),
        versions("1.31.2", "10.16.1", "9.0"),
        versions("1.31.1", "10.17.0", "9.0"),
        versions("1.31.1", "10.16.1", "8.6"),
    }
    assert len(folders) == 4
    assert versions("1.31.1", "10.16.1", "9.0") == "onnxruntime-1.31.1-tensorrt-10.16.1-sm90"


# Page-locked memory


class CudaRuntimeLibrary:
    """CUDA's runtime library with the registered memory and the number of cleared errors."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.registered: dict[int, int] = {}
        self.cleared = 0

    def cudaHostRegister(  # noqa: N802
        self, address: ctypes.c_void_p, size: ctypes.c_size_t, flags: ctypes.c_uint
    ) -> int:
        if self.status == 0:
            self.registered[address.value or 0] = size.value
        return self.status

    def cudaHostUnregister(self, address: ctypes.c_void_p) -> int:  # noqa: N802
        del self.registered[address.value or 0]
        return 0

    def cudaGetLastError(self) -> int:  # noqa: N802
        self.cleared += 1
        return self.status


def test_a_buffer_is_page_locked_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    library = CudaRuntimeLibrary()
    monkeypatch.setattr(pinned, "_library", lambda: library)
    array = np.zeros((4, 8), np.int32)
    assert pinned.pin(array)
    assert library.registered == {array.ctypes.data: 128}
    del array
    assert library.registered == {}


def test_a_buffer_that_cannot_be_page_locked_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = CudaRuntimeLibrary(status=2)
    monkeypatch.setattr(pinned, "_library", lambda: library)
    assert not pinned.pin(np.zeros(8))
    assert library.cleared == 1
    monkeypatch.setattr(pinned, "_library", lambda: None)
    assert not pinned.pin(np.zeros(8))
