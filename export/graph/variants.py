"""
The compiled forms of one graph: how each is built, what it computes in, and how close it must come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from export.graph import gpu
from service.artifact import Precision
from service.runtimes import Inputs


@dataclass(frozen=True)
class Source:
    """What variants are built from."""

    folder: Path
    """Holds model.onnx, and is where they go."""
    config: Any
    """The checkpoint's, as transformers reads it."""
    inputs: Sequence[Inputs]
    """What a calibrated variant is calibrated with."""
    reduce_range: bool = False
    """Whether 8-bit weights keep to 7 bits, so that processors without VNNI, which add products in
    16 bits, do not saturate.
    """


@dataclass(frozen=True)
class Recipe:
    runtime: Literal["openvino", "cuda", "tensorrt"]
    precision: Precision
    files: tuple[str, ...]
    build: Callable[[Source], None]
    """Makes `files`."""
    tolerance: float | None
    """The largest difference of a probability that passes the gate; None: the gate counts labels,
    over texts of its own.
    """

    @property
    def calibrated(self) -> bool:
        return self.precision == "i8"


def _as_it_is(source: Source) -> None:
    """model.onnx is the variant."""


def _openvino_16_bit(source: Source) -> None:
    import openvino as ov

    # read_model, not convert_model: the latter folds zeros and ones away, so the graph would depend
    # on the weights.
    ov.save_model(
        ov.Core().read_model(source.folder / "model.onnx"),
        source.folder / "model-bf16.xml",
        compress_to_fp16=True,
    )


def _openvino_8_bit(source: Source) -> None:
    """Post-training quantisation: 8-bit weights by channel, activations by tensor, outliers
    smoothed and biases corrected.
    """
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)
    import nncf

    quantised = nncf.quantize(
        ov.Core().read_model(source.folder / "model.onnx"),
        nncf.Dataset([dict(one) for one in source.inputs]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(source.inputs),
        advanced_parameters=(
            nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
            if source.reduce_range
            else None
        ),
    )
    ov.save_model(quantised, source.folder / "model-int8.xml", compress_to_fp16=True)


def _cuda_16_bit(source: Source) -> None:
    graph, target = source.folder / "model.onnx", source.folder / "model-cuda-fp16.onnx"
    family = source.config.model_type
    if family in gpu.FUSED:
        try:
            gpu.write_fused(graph, target, source.config)
            return
        except gpu.NotFused as error:
            why = str(error)
    else:
        why = f"{family} has layers that match no fused operator"
    print(
        f"cuda-fp16: not fused ({why}): runs on a GPU all the same, kernel by kernel and slower",
        flush=True,
    )
    gpu.write_half(graph, target)


def _tensorrt_16_bit(source: Source) -> None:
    # Not fused: TensorRT does that itself, and knows none of ONNX Runtime's operators.
    gpu.write_half(source.folder / "model.onnx", source.folder / "model-tensorrt-fp16.onnx")


RECIPES = {
    "cpu-fp32": Recipe("openvino", "f32", ("model.onnx",), _as_it_is, tolerance=1e-4),
    "cpu-bf16": Recipe(
        "openvino", "bf16", ("model-bf16.xml", "model-bf16.bin"), _openvino_16_bit, tolerance=2e-2
    ),
    "cpu-int8": Recipe(
        "openvino", "i8", ("model-int8.xml", "model-int8.bin"), _openvino_8_bit, tolerance=None
    ),
    "cuda-fp16": Recipe("cuda", "f16", ("model-cuda-fp16.onnx",), _cuda_16_bit, tolerance=1e-2),
    "tensorrt-fp16": Recipe(
        "tensorrt", "f16", ("model-tensorrt-fp16.onnx",), _tensorrt_16_bit, tolerance=1e-2
    ),
}
UNASKED = ("cpu-fp32", "cpu-bf16")
"""What is built when no variants are named."""
GATED = (*UNASKED, "cpu-int8")
"""What is built when none are named and there are texts to gate with."""
