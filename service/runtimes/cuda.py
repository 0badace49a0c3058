"""
ONNX Runtime on an NVIDIA GPU, with a captured CUDA graph for every shape of the grid.

A BERT is some hundred small kernels. For a short text, starting them one by one takes longer than
they compute. A captured graph starts them all at once. It reads and writes the same addresses each
time, so every shape has buffers of its own:

    start → pad the rows to the grid → copy them into the shape's buffers → replay the graph → copy
        the logits out

One thread owns the session, because ONNX Runtime captures per thread. While it waits for the GPU,
the batcher prepares the next batch. Any other work on the GPU breaks a capture in progress, so all
runtimes share one lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.batching.shapes import GPU, Shapes, read_grid
from service.errors import EngineBroken
from service.host import gpus
from service.runtimes import Inputs, Logits, RuntimeUnavailable
from service.runtimes.onnxruntime import (
    PROVIDERS,
    input_types,
    missing_requirement,
    open_session,
    session_options,
)
from service.runtimes.pinned import pin

log = logging.getLogger(__name__)

GRAPH = "gpu_graph_id"
# This graph id makes ONNX Runtime run without a graph, for shapes off the grid.
NO_GRAPH = "-1"
# A shape runs so often before it is captured: kernels do work in their first runs that cannot be
# captured, such as choosing an algorithm.
RUNS_BEFORE_CAPTURE = 2

_gpu_lock = threading.Lock()


@dataclass(frozen=True)
class GpuOptions:
    """The settings of the GPU's runtimes."""

    memory_bytes: int | None = None
    """Upper limit of the GPU memory of a model's session; None: what it needs."""
    shapes_file: Path | None = None
    """The grid of shapes that was measured on this GPU; None: a grid that suits most GPUs."""
    cache: Path | None = None
    """Folder of the engines that TensorRT built; None: the user's cache folder."""
    graphs: bool = True
    """Whether shapes are captured as CUDA graphs."""


DEFAULT_GPU_OPTIONS = GpuOptions()


@dataclass
class _Bucket:
    """A shape's buffers, with the binding and the options of a run that uses them."""

    host: dict[str, npt.NDArray[Any]]
    inputs: dict[str, Any]
    output: Any
    binding: Any
    options: Any
    works: bool = False
    """Whether a run of this shape has succeeded."""


class CudaRuntime:
    """A model's session on the first visible GPU, in fp16."""

    name = "cuda"
    precision = computes_in = "f16"
    graph_digest: str | None = None
    in_flight = 2
    flush_to_zero = False
    """False, because a GPU computes with subnormal numbers as fast as with others."""

    def __init__(
        self, model: Path, labels: int, max_tokens: int, options: GpuOptions = DEFAULT_GPU_OPTIONS
    ) -> None:
        if (reason := missing_requirement(self.name)) is not None:
            raise RuntimeUnavailable(f"{model.name} needs {PROVIDERS[self.name]}: {reason}.")
        device = gpus.visible()[0]
        self.device = f"{device.name} ({device.uuid})"
        self.grid = (
            GPU if options.shapes_file is None else read_grid(options.shapes_file, device.name)
        )
        self._open(model, labels, max_tokens, self.providers(model, max_tokens, options), "cuda")

    def providers(
        self, model: Path, max_tokens: int, options: GpuOptions
    ) -> list[tuple[str, Mapping[str, str]]]:
        """Return ONNX Runtime's execution providers with their options, the one to use first."""
        return [(PROVIDERS["cuda"], cuda_options(options))]

    def _open(
        self,
        model: Path,
        labels: int,
        max_tokens: int,
        providers: list[tuple[str, Mapping[str, str]]],
        place: str,
    ) -> None:
        self._labels, self._place = labels, place
        self._shapes = Shapes(max_tokens, grid=self.grid)
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._session = self._thread.submit(self._open_here, model, providers).result()
        self._types = input_types(self._session)

    def _open_here(self, model: Path, providers: list[tuple[str, Mapping[str, str]]]) -> Any:
        try:
            self.captures = any(
                "1" in (options.get("enable_cuda_graph"), options.get("trt_cuda_graph_enable"))
                for _, options in providers
            )
            return open_session(model, session_options(1), providers)
        except RuntimeUnavailable as error:
            if "graph capture" not in str(error):
                raise
            # A graph with steps on the CPU cannot be captured. It still runs on the GPU, kernel by
            # kernel.
            log.warning("runs without CUDA graphs", extra={"model": model.name, "why": str(error)})
            self.captures = False
            return open_session(
                model,
                session_options(1),
                [(name, without_graphs(options)) for name, options in providers],
            )

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        """Start a batch in the session's thread and return a function that waits for its logits."""
        return self._thread.submit(self._run, inputs).result

    def replayed(
        self, rows: int, length: int, at_least: int = 1, seconds: float = 0.0
    ) -> list[float]:
        """Return the seconds of each run of a shape that ran before, on its buffers' content.

        Nothing is copied, so this measures the engine alone. The shape runs as often as fits into
        `seconds`, and `at_least` that often.
        """
        bucket, durations = self._buckets[rows, length], list[float]()

        def run() -> None:
            began = now = time.perf_counter()
            while len(durations) < at_least or now - began < seconds:
                self._session.run_with_iobinding(bucket.binding, bucket.options)
                before, now = now, time.perf_counter()
                durations.append(now - before)

        self._thread.submit(run).result()
        return durations

    def _run(self, inputs: Inputs) -> Logits:
        with _gpu_lock:
            return self._run_locked(inputs)

    def _run_locked(self, inputs: Inputs) -> Logits:
        items, length = inputs["input_ids"].shape
        bucket = self._bucket(items, length)
        for name, host in bucket.host.items():
            host[:items] = inputs[name]
            # Rows without a text are one token long: softmax over no token would be NaN.
            host[items:] = 0
            if name == "attention_mask":
                host[items:, 0] = 1
            bucket.inputs[name].update_inplace(host)
        try:
            if not bucket.works and bucket.options.get_run_config_entry(GRAPH) != NO_GRAPH:
                for _ in range(RUNS_BEFORE_CAPTURE):
                    self._session.run_with_iobinding(bucket.binding, _run_options(NO_GRAPH))
            self._session.run_with_iobinding(bucket.binding, bucket.options)
            # A copy: the next batch of this shape overwrites it.
            logits = np.array(bucket.output.numpy()[:items], np.float32)
        except Exception as error:  # ONNX Runtime raises a class of its own for each of its codes.
            raise self._diagnosed(error, bucket) from error
        bucket.works = True
        return logits

    def _diagnosed(self, error: Exception, failed: _Bucket) -> Exception:
        """Return the error to raise for a failed run.

        RuntimeUnavailable: the shape's first run failed, as where it cannot be captured.
        EngineBroken: the GPU no longer runs anything. Otherwise it is the error itself.
        """
        rows, length = next(iter(failed.host.values())).shape
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not failed.works:
            graphs = "; DRBERT_GPU_GRAPHS=false runs without CUDA graphs" if self.captures else ""
            return RuntimeUnavailable(
                f"ONNX Runtime cannot run {rows} texts of {length} tokens on {self.device}"
                f" ({message}){graphs}."
            )
        # After an error of CUDA itself, every later call in the process fails. So a shape that has
        # worked before shows whether the GPU still does.
        proven = next((bucket for bucket in self._buckets.values() if bucket.works), None)
        try:
            if proven is not None:
                self._session.run_with_iobinding(proven.binding, proven.options)
                proven.output.numpy()
        except Exception:  # Any failure here means the same, and `error` is the one that is logged.
            return EngineBroken(
                f"{self.device} does nothing any more; this replica will end. The failure is in the"
                " log."
            )
        return error

    def _bucket(self, items: int, length: int) -> _Bucket:
        """Return the buffers for a batch; those of shapes on the grid are kept."""
        on_grid = items <= self._shapes.max_batch_size and length in self._shapes.lengths
        shape = (self._shapes.rows(items) if on_grid else items, length)
        bucket = self._buckets.get(shape)
        if bucket is None:
            graph = str(len(self._buckets)) if on_grid and self.captures else NO_GRAPH
            bucket = self._make_bucket(shape, graph)
            if on_grid:
                self._buckets[shape] = bucket
        return bucket

    def _make_bucket(self, shape: tuple[int, int], graph: str) -> _Bucket:
        import onnxruntime as ort

        host: dict[str, npt.NDArray[Any]] = {
            name: np.zeros(shape, dtype) for name, dtype in self._types.items()
        }
        if self._place == "cuda":
            for array in host.values():
                pin(array)
        inputs = {
            name: ort.OrtValue.ortvalue_from_numpy(array, self._place, 0)
            for name, array in host.items()
        }
        output = ort.OrtValue.ortvalue_from_shape_and_type(
            (shape[0], self._labels), np.float32, self._place, 0
        )
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(self._session.get_outputs()[0].name, output)
        return _Bucket(host, inputs, output, binding, _run_options(graph))


def _run_options(graph: str) -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry(GRAPH, graph)
    return options


def cuda_options(options: GpuOptions) -> dict[str, str]:
    """Return the options of ONNX Runtime's CUDA provider.

    It captures graphs, does not use TF32, and extends its memory by no more than it needs.
    """
    chosen = {
        "device_id": "0",
        "enable_cuda_graph": "1" if options.graphs else "0",
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
    }
    if options.memory_bytes is not None:
        chosen["gpu_mem_limit"] = str(options.memory_bytes)
    return chosen


def without_graphs(options: Mapping[str, str]) -> dict[str, str]:
    """Return a provider's options with CUDA graphs turned off."""
    return {
        name: "0" if name in ("enable_cuda_graph", "trt_cuda_graph_enable") else value
        for name, value in options.items()
    }
