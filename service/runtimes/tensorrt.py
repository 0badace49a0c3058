"""
TensorRT on an NVIDIA GPU, through ONNX Runtime. An engine is built once per model, GPU and version,
and cached.

Building takes minutes, and is repeated for every shape outside the engine's profile. So one profile
covers the whole grid. TensorRT's measurements of single kernels (its timing cache) are stored next
to the engines and read by every build on that kind of GPU. Two models with one graph are then built
of the same kernels, which a comparison of their latency needs.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.artifact import sha256
from service.batching.shapes import Grid, Shapes
from service.host import gpus
from service.host.cache_folder import cache_folder
from service.runtimes.cuda import (
    DEFAULT_GPU_OPTIONS,
    CudaRuntime,
    GpuOptions,
    cuda_options,
    without_graphs,
)
from service.runtimes.onnxruntime import PROVIDERS

log = logging.getLogger(__name__)


class TensorRtRuntime(CudaRuntime):
    """A model's TensorRT engine on the first visible GPU, in fp16."""

    name = "tensorrt"

    def __init__(
        self,
        model: Path,
        labels: int,
        max_tokens: int,
        inputs: Sequence[str],
        options: GpuOptions = DEFAULT_GPU_OPTIONS,
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
        """Return TensorRT's provider, and CUDA's for what TensorRT does not support."""
        import onnxruntime as ort

        folder = (options.cache or default_cache()) / versions(
            ort.__version__, tensorrt_version(), gpus.visible()[0].compute_capability
        )
        folder.mkdir(parents=True, exist_ok=True)
        digest = graph_digest(model)
        chosen = tensorrt_options(folder, digest, self.grid, max_tokens, self._inputs, options)
        return [
            (PROVIDERS["tensorrt"], chosen),
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
    """Return the options of ONNX Runtime's TensorRT provider.

    It keeps the graph's types, has one profile over the grid, and stores the engine and the timing
    cache in `folder`.
    """
    lowest, likely, highest = profile(grid, max_tokens, inputs)
    chosen = {
        "device_id": "0",
        # Off, because the graph is in fp16 already: TensorRT then keeps the graph's types.
        "trt_fp16_enable": "0",
        "trt_profile_min_shapes": lowest,
        "trt_profile_opt_shapes": likely,
        "trt_profile_max_shapes": highest,
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": digest[:16],
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        # Off, because the provider captures one graph and replays it for every shape.
        "trt_cuda_graph_enable": "0",
    }
    if options.memory_bytes is not None:
        chosen["trt_max_workspace_size"] = str(options.memory_bytes)
    return chosen


def graph_digest(model: Path) -> str:
    """Return the SHA-256 of a graph and of the files with its stem, which may hold its weights."""
    parts = [sha256(path) for path in sorted(model.parent.glob(f"{model.stem}.*"))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def profile(grid: Grid, max_tokens: int, inputs: Sequence[str]) -> tuple[str, str, str]:
    """Return the smallest, the likeliest and the largest shape of every input.

    Each is written as ONNX Runtime's provider reads it: `input_ids:1x8,attention_mask:1x8`.
    """
    shapes = Shapes(max_tokens, grid=grid)
    size = shapes.batch_sizes[len(shapes.batch_sizes) // 2]
    # A model that is not padding-invariant runs every length, down to one token.
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
    """Return the name of a folder for the engines of these versions on this kind of GPU.

    An engine depends on them as on its model, so no engine of another folder is ever used.
    """
    return f"onnxruntime-{onnxruntime}-tensorrt-{tensorrt}-sm{compute_capability.replace('.', '')}"


def tensorrt_version() -> str:
    """Return the version of the installed library, such as 10.16.1."""
    number = ctypes.CDLL("libnvinfer.so.10").getInferLibVersion()
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def default_cache() -> Path:
    """Return the folder for engines in the user's cache folder."""
    return cache_folder("tensorrt")
