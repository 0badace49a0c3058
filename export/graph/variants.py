"""
Variants: the compiled forms of one graph, how each is built, and how close its answers must be.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from command import Unavailable, how_to_install
from export.graph import gpu
from export.graph.narrowed import narrow
from service.artifact import Precision
from service.host import cpus
from service.runtimes import Inputs


@dataclass(frozen=True)
class VariantSource:
    """What every variant of one artifact is built from."""

    folder: Path
    """Folder that holds model.onnx, and into which variants are written."""
    config: Any
    """Config of the checkpoint, as transformers reads it."""
    inputs: Sequence[Inputs]
    """Inputs of the graph that a calibrated variant is calibrated with, one text each."""
    reduce_range: bool = False
    """Whether 8-bit weights are limited to 7 bits. Processors without VNNI add products in 16 bits,
    which saturate with 8-bit weights.
    """


@dataclass(frozen=True)
class Recipe:
    """How a variant is built, what runs it, and how close to the checkpoint it must be."""

    runtime: Literal["openvino", "onnxruntime", "cuda", "tensorrt"]
    """Engine that runs the variant."""
    precision: Precision
    """Precision of most of the arithmetic."""
    files: tuple[str, ...]
    """Names of the variant's files; the first is the one that the engine loads."""
    build: Callable[[VariantSource], None]
    """Function that writes `files`."""
    tolerance: float | None
    """Largest difference of a probability that passes the gate. None if the gate counts how many
    labels agree instead, on texts of the user's.
    """

    @property
    def gated_by_agreement(self) -> bool:
        """Whether the gate counts on how many texts the variant agrees with fp32."""
        return self.tolerance is None

    @property
    def calibrated(self) -> bool:
        """Whether building the variant needs calibration texts."""
        return self.precision == "i8" and self.runtime == "openvino"


def _build_fp32(source: VariantSource) -> None:
    """Do nothing: model.onnx is the variant."""


def _build_bf16(source: VariantSource) -> None:
    import openvino as ov

    # read_model, not convert_model: the latter folds zeros and ones away, and the graph would
    # depend on the weights.
    ov.save_model(
        ov.Core().read_model(source.folder / "model.onnx"),
        source.folder / "model-bf16.xml",
        compress_to_fp16=True,
    )


def _build_int8(source: VariantSource) -> None:
    """Quantise after training: 8-bit weights by channel, 8-bit activations by tensor.

    NNCF smooths outliers and corrects biases.
    """
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)
    import nncf

    advanced = None
    if source.reduce_range:
        advanced = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    quantised = nncf.quantize(
        ov.Core().read_model(source.folder / "model.onnx"),
        nncf.Dataset([dict(inputs) for inputs in source.inputs]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(source.inputs),
        advanced_parameters=advanced,
    )
    ov.save_model(quantised, source.folder / "model-int8.xml", compress_to_fp16=True)


def _build_int8_ort(source: VariantSource) -> None:
    """Quantise weights to 7 bits by channel; activations are quantised while the model runs.

    ONNX Runtime multiplies unsigned by signed bytes. Without VNNI it adds two products in 16 bits,
    which saturate with 8-bit weights and do not with 7 bits.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ModuleNotFoundError:
        raise Unavailable(
            f"cpu-int8-ort needs ONNX Runtime; {how_to_install('portable')}, or leave it out."
        ) from None
    # It advises to run a preprocessing that fuses nothing here.
    logging.getLogger().addFilter(_is_no_advice)
    graph = onnx.load(source.folder / "model.onnx")
    narrow(graph)
    try:
        quantize_dynamic(
            graph,
            source.folder / "model-int8-ort.onnx",
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_head_of_tokens(graph),
            # The products of an attention have no weights, and stay exact.
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.getLogger().removeFilter(_is_no_advice)


def _head_of_tokens(graph: onnx.ModelProto) -> list[str]:
    """Return the name of the last product, if the graph labels tokens.

    It reads the hidden states themselves. Quantised, three values would cross from the encoder to
    the head, and they could not be told apart (graphs/canonical.py).
    """
    if len(graph.graph.output[0].type.tensor_type.shape.dim) != 3:
        return []
    return [node.name for node in graph.graph.node if node.op_type == "MatMul"][-1:]


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "run pre-processing before quantization" not in record.getMessage()


def _build_cuda_fp16(source: VariantSource) -> None:
    graph = source.folder / "model.onnx"
    target = source.folder / "model-cuda-fp16.onnx"
    family = source.config.model_type
    if family in gpu.FUSED:
        try:
            gpu.write_fused(graph, target, source.config)
            return
        except gpu.NotFused as error:
            reason = str(error)
    else:
        reason = f"{family} has layers that match no fused operator"
    print(
        f"cuda-fp16: not fused ({reason}); it still runs on a GPU, with one kernel per operator and"
        " slower",
        flush=True,
    )
    gpu.write_half(graph, target)


def _build_tensorrt_fp16(source: VariantSource) -> None:
    # Not fused: TensorRT fuses by itself, and does not know ONNX Runtime's fused operators.
    gpu.write_half(source.folder / "model.onnx", source.folder / "model-tensorrt-fp16.onnx")


RECIPES = {
    "cpu-fp32": Recipe("openvino", "f32", ("model.onnx",), _build_fp32, tolerance=1e-4),
    "cpu-bf16": Recipe(
        "openvino", "bf16", ("model-bf16.xml", "model-bf16.bin"), _build_bf16, tolerance=2e-2
    ),
    "cpu-int8": Recipe(
        "openvino", "i8", ("model-int8.xml", "model-int8.bin"), _build_int8, tolerance=None
    ),
    "cpu-int8-ort": Recipe(
        "onnxruntime", "i8", ("model-int8-ort.onnx",), _build_int8_ort, tolerance=None
    ),
    "cuda-fp16": Recipe("cuda", "f16", ("model-cuda-fp16.onnx",), _build_cuda_fp16, tolerance=1e-2),
    "tensorrt-fp16": Recipe(
        "tensorrt", "f16", ("model-tensorrt-fp16.onnx",), _build_tensorrt_fp16, tolerance=1e-2
    ),
}
DEFAULT_VARIANTS = ("cpu-fp32", "cpu-bf16")
"""Variants that are built if none are named."""


def gated_variants() -> list[str]:
    """Return the variants that are built if none are named and there are texts for a gate.

    A processor without instructions for int8 computes OpenVINO's int8 no faster than fp32, so there
    ONNX Runtime's is built too, if that is installed.
    """
    variants = [*DEFAULT_VARIANTS, "cpu-int8"]
    if "i8" not in cpus.native_precisions() and importlib.util.find_spec("onnxruntime"):
        variants.append("cpu-int8-ort")
    return variants
