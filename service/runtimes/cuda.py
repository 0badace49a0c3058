"""
ONNX Runtime on an NVIDIA GPU: one captured CUDA graph, with buffers of its own, for every shape of
the grid.

A BERT is some hundred small kernels; starting them one by one costs more than they compute for a
short text. A captured graph starts them all at once, and reads and writes the same addresses each
time:

    start → rows padded to the grid → copied into the shape's buffers → graph replayed → logits
        copied out

One thread owns the session: ONNX Runtime captures per thread. While it waits for the GPU, the
batcher packs the next batch. Whatever is done on the GPU breaks a capture that is under way, so
runtimes take turns: one lock for all of them.
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
    lacks,
    open_session,
    session_options,
)
from service.runtimes.pinned import pin

log = logging.getLogger(__name__)

GRAPH = "gpu_graph_id"
# Shapes off the grid run without a graph; this is how ONNX Runtime is told so.
NO_GRAPH = "-1"
# Runs of a shape before it is captured: what kernels do at their first, such as choosing an
# algorithm, cannot be captured.
RUNS_BEFORE = 2

_turn = threading.Lock()


@dataclass(frozen=True)
class GpuOptions:
    """What a user may say about the GPU."""

    memory_bytes: int | None = None
    """The most that a model's session may take of the GPU's memory; None: what it needs."""
    shapes_file: Path | None = None
    """The grid that was measured on this GPU; None: one that suits most."""
    cache: Path | None = None
    """Where TensorRT keeps what it built; None: the user's cache folder."""
    graphs: bool = True
    """Whether shapes are captured as CUDA graphs."""


AS_IT_COMES = GpuOptions()


@dataclass
class _Bucket:
    """A shape's buffers, and the run that reads and writes them."""

    host: dict[str, npt.NDArray[Any]]
    inputs: dict[str, Any]
    output: Any
    binding: Any
    options: Any
    works: bool = False
    """Whether it has run."""


class CudaRuntime:
    name = "cuda"
    precision = computes_in = "f16"
    in_flight = 2
    flush_to_zero = False
    """A GPU computes with subnormal numbers as fast as with others."""

    def __init__(
        self, model: Path, labels: int, max_tokens: int, options: GpuOptions = AS_IT_COMES
    ) -> None:
        if (reason := lacks(self.name)) is not None:
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
        """What ONNX Runtime is asked for, the one to be in use first."""
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
            # Not every family's graph can be captured: one with steps on the CPU cannot. It still
            # runs on the GPU, kernel by kernel.
            log.warning("runs without CUDA graphs", extra={"model": model.name, "why": str(error)})
            self.captures = False
            return open_session(
                model,
                session_options(1),
                [(name, without_graphs(options)) for name, options in providers],
            )

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        return self._thread.submit(self._run, inputs).result

    def replayed(
        self, rows: int, length: int, at_least: int = 1, seconds: float = 0.0
    ) -> list[float]:
        """Seconds of each run of a shape that ran before, on what its buffers hold: nothing is
        copied. For whoever measures the engine alone.

        As many runs as fit into so many `seconds`, and `at_least` that many.
        """
        bucket, taken = self._buckets[rows, length], list[float]()

        def run() -> None:
            began = now = time.perf_counter()
            while len(taken) < at_least or now - began < seconds:
                self._session.run_with_iobinding(bucket.binding, bucket.options)
                before, now = now, time.perf_counter()
                taken.append(now - before)

        self._thread.submit(run).result()
        return taken

    def _run(self, inputs: Inputs) -> Logits:
        with _turn:
            return self._run_in_turn(inputs)

    def _run_in_turn(self, inputs: Inputs) -> Logits:
        items, length = inputs["input_ids"].shape
        bucket = self._bucket(items, length)
        for name, host in bucket.host.items():
            host[:items] = inputs[name]
            # Rows that nobody asked for are one token long: softmax over none would be no number.
            host[items:] = 0
            if name == "attention_mask":
                host[items:, 0] = 1
            bucket.inputs[name].update_inplace(host)
        try:
            if not bucket.works and bucket.options.get_run_config_entry(GRAPH) != NO_GRAPH:
                for _ in range(RUNS_BEFORE):
                    self._session.run_with_iobinding(bucket.binding, _run_options(NO_GRAPH))
            self._session.run_with_iobinding(bucket.binding, bucket.options)
            # A copy: the next batch of this shape overwrites it.
            logits = np.array(bucket.output.numpy()[:items], np.float32)
        except Exception as error:  # ONNX Runtime raises a class of its own for each of its codes.
            raise self._diagnosed(error, bucket) from error
        bucket.works = True
        return logits

    def _diagnosed(self, error: Exception, failed: _Bucket) -> Exception:
        """What a run's error comes down to: a shape that cannot be captured, a GPU that can do
        nothing any more, or itself.
        """
        rows, length = next(iter(failed.host.values())).shape
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not failed.works:
            graphs = "; DRBERT_GPU_GRAPHS=false runs without CUDA graphs" if self.captures else ""
            return RuntimeUnavailable(
                f"ONNX Runtime cannot run {rows} texts of {length} tokens on {self.device}"
                f" ({told}){graphs}."
            )
        # An error of CUDA's own stays with the process: then the shape that is least likely to fail
        # fails as well.
        least = next((bucket for bucket in self._buckets.values() if bucket.works), None)
        try:
            if least is not None:
                self._session.run_with_iobinding(least.binding, least.options)
                least.output.numpy()
        except Exception:
            return EngineBroken(
                f"{self.device} does nothing any more; this replica will end. The failure is in the"
                " log."
            )
        return error

    def _bucket(self, items: int, length: int) -> _Bucket:
        on_grid = items <= self._shapes.max_batch_size and length in self._shapes.lengths
        shape = (self._shapes.rows(items) if on_grid else items, length)
        if (found := self._buckets.get(shape)) is not None:
            return found
        made = self._make_bucket(
            shape, str(len(self._buckets)) if on_grid and self.captures else NO_GRAPH
        )
        if on_grid:
            self._buckets[shape] = made
        return made

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
    """ONNX Runtime's CUDA provider, told to capture graphs and to take no more memory than it
    needs.
    """
    chosen = {
        "device_id": "0",
        "enable_cuda_graph": "1" if options.graphs else "0",
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
    }
    return (
        chosen
        if options.memory_bytes is None
        else chosen | {"gpu_mem_limit": str(options.memory_bytes)}
    )


def without_graphs(options: Mapping[str, str]) -> dict[str, str]:
    return {
        name: "0" if name in ("enable_cuda_graph", "trt_cuda_graph_enable") else value
        for name, value in options.items()
    }
