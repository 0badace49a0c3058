"""
Counts the numbers that a processor computes slowly: subnormal ones, between zero and the smallest
normal float.

They are values, so no digest sees them; yet a model full of them can take a hundred times as long
on one graph. Numbers stored in 16 bits count as what they are once widened for the computation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

# How OpenVINO names the float types numpy has; bfloat16, which it has not, is read below.
_FLOATS: dict[str, type[np.floating[Any]]] = {
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}


def subnormals(values: npt.NDArray[Any]) -> int:
    """How many of `values`, floats of at least 32 bits, are subnormal. Compares bits, so it counts
    right where the processor flushes.
    """
    if values.dtype == np.float64:
        exponents = np.ascontiguousarray(values).view(np.uint64) & np.uint64(0x7FF0_0000_0000_0000)
    else:
        exponents = np.ascontiguousarray(values, np.float32).view(np.uint32) & np.uint32(
            0x7F80_0000
        )
    return int(np.count_nonzero((exponents == 0) & (values.view(exponents.dtype) << 1 != 0)))


def subnormal_weights(path: Path) -> int:
    """How many numbers in an .onnx file, or in the .bin beside an OpenVINO .xml, are subnormal,
    each counted once.
    """
    return sum(
        subnormals(values)
        for values in (_ir_weights(path) if path.suffix == ".xml" else _onnx_weights(path))
    )


def _onnx_weights(path: Path) -> Iterator[npt.NDArray[Any]]:
    graph = onnx.load(path).graph
    constants = (
        a.t
        for node in graph.node
        if node.op_type == "Constant"
        for a in node.attribute
        if a.name == "value"
    )
    for tensor in (*graph.initializer, *constants):
        values = numpy_helper.to_array(tensor)
        if tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
            yield values.astype(np.float32)
        elif tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            yield values


def _ir_weights(path: Path) -> Iterator[npt.NDArray[Any]]:
    raw = path.with_suffix(".bin").read_bytes()
    for data in ElementTree.parse(path).getroot().iterfind("layers/layer[@type='Const']/data"):
        offset, size, kind = (
            int(data.attrib["offset"]),
            int(data.attrib["size"]),
            data.attrib["element_type"],
        )
        stored = raw[offset : offset + size]
        if kind == "bf16":
            yield (np.frombuffer(stored, np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif kind in _FLOATS:
            values = np.frombuffer(stored, _FLOATS[kind])
            yield values.astype(np.float32) if kind == "f16" else values
