"""
TensorRT on an NVIDIA GPU, through ONNX Runtime: an engine that is built once per model, GPU and
version, and kept.

Building takes minutes, and happens again whenever a shape comes that no profile holds. So one
profile holds the whole grid. What TensorRT measured of single kernels (its timing cache) is kept
beside the engines and read by every build on that kind of GPU: two models of one graph are built of
the same kernels, which a comparison of their latency needs.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.artifact import sha256
from service.batching.shapes import Grid, Shapes
from service.host import gpus
from service.runtimes.cuda import AS_IT_COMES, CudaRuntime, GpuOptions, cuda_options, without_graphs
from service.runtimes.onnxruntime import PROVIDERS

log = logging.getLogger(__name__)


class TensorRtRuntime(CudaRuntime):
    name = "tensorrt"

    def __init__(
        self,
        model: Path,
        labels: int,
        max_tokens: int,
        inputs: Sequence[str],
        options: GpuOptions = AS_IT_COMES,
    ) -> None:
        self._inputs = inputs
        began = time.monotonic()
        super().__init__(model, labels, max_tokens, options)
        log.info(
            "TensorRT engine ready",
            extra={"model": str(model), "seconds": round(time.monotonic() - began, 1)},
        )

    def providers(
        self, model: Path, max_tokens: int, options: GpuOptions
    ) -> list[tuple[str, Mapping[str, str]]]:
        import onnxruntime as ort

        folder = (options.cache or default_cache()) / versions(
            ort.__version__, tensorrt_version(), gpus.visible()[0].compute_capability
        )
        folder.mkdir(parents=True, exist_ok=True)
        own = tensorrt_options(
            folder, digest_of(model), self.grid, max_tokens, self._inputs, options
        )
        return [
            (PROVIDERS["tensorrt"], own),
            (PROVIDERS["cuda"], without_graphs(cuda_options(options))),
        ]


def tensorrt_options(
    folder: Path,
    digest: str,
    grid: Grid,
    max_tokens: int,
    inputs: Sequence[str],
    options: GpuOptions,
) -> dict[str, str]:
    """ONNX Runtime's TensorRT provider: strongly typed, one profile over the grid, engine and
    timing cache in `folder`.
    """
    lowest, likely, highest = profile(grid, max_tokens, inputs)
    chosen = {
        "device_id": "0",
        # Off, for the graph is in fp16 already: then TensorRT keeps to the types that it finds
        # there.
        "trt_fp16_enable": "0",
        "trt_profile_min_shapes": lowest,
        "trt_profile_opt_shapes": likely,
        "trt_profile_max_shapes": highest,
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": digest[:16],
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        # Its provider keeps one graph, and replays it whatever the shape.
        "trt_cuda_graph_enable": "0",
    }
    return (
        chosen
        if options.memory_bytes is None
        else chosen | {"trt_max_workspace_size": str(options.memory_bytes)}
    )


def digest_of(model: Path) -> str:
    """Of the graph and of what lies beside it under its name: weights may be in a file of their
    own.
    """
    parts = [sha256(path) for path in sorted(model.parent.glob(f"{model.stem}.*"))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def profile(grid: Grid, max_tokens: int, inputs: Sequence[str]) -> tuple[str, str, str]:
    """The least, the likeliest and the greatest shape of every input, as ONNX Runtime's provider
    reads them.
    """
    shapes = Shapes(max_tokens, grid=grid)
    size = shapes.batch_sizes[len(shapes.batch_sizes) // 2]
    # Lengths of a model that is not padding-safe are as they come, down to one token.
    corners = (
        (1, 1),
        (size, shapes.length(min(128, max_tokens))),
        (shapes.max_batch_size, max_tokens),
    )
    lowest, likely, highest = (
        ",".join(f"{name}:{rows}x{length}" for name in inputs) for rows, length in corners
    )
    return lowest, likely, highest


def versions(onnxruntime: str, tensorrt: str, compute_capability: str) -> str:
    """What an engine depends on beside its model: the folder's name. An engine of another version
    or GPU is never found.
    """
    return f"onnxruntime-{onnxruntime}-tensorrt-{tensorrt}-sm{compute_capability.replace('.', '')}"


def tensorrt_version() -> str:
    """As 10.16.1, asked of the library."""
    number = ctypes.CDLL("libnvinfer.so.10").getInferLibVersion()
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def default_cache() -> Path:
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "drbert-serve"
        / "tensorrt"
    )
