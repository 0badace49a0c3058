"""
Counts subnormal weights: floats between zero and the smallest normal number.

Many processors compute with subnormal numbers slowly; a model full of them can take 100 times as
long on the same graph. They are values, so no digest of a graph shows them. Numbers that are stored
in 16 bits count as what they are once they are widened for the computation.
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

# NumPy's type of each float type of OpenVINO; NumPy has no bfloat16, which is read below.
_FLOATS: dict[str, type[np.floating[Any]]] = {
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}


def count_subnormals(values: npt.NDArray[Any]) -> int:
    """Return the number of subnormal floats in an array of float32 or float64, of any shape.

    It compares bits, so the count is right on a processor that flushes subnormal numbers to zero.
    """
    if values.dtype == np.float64:
        bits = np.ascontiguousarray(values).view(np.uint64)
        exponents = bits & np.uint64(0x7FF0_0000_0000_0000)
    else:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        exponents = bits & np.uint32(0x7F80_0000)
    without_sign = bits << 1
    return int(np.count_nonzero((exponents == 0) & (without_sign != 0)))


def count_subnormal_weights(path: Path) -> int:
    """Return the number of subnormal weights in an .onnx file, or in the .bin of an OpenVINO .xml.

    A weight that several nodes use counts once.
    """
    weights = _ir_weights(path) if path.suffix == ".xml" else _onnx_weights(path)
    return sum(map(count_subnormals, weights))


def _onnx_weights(path: Path) -> Iterator[npt.NDArray[Any]]:
    """Yield the float weights of an ONNX file, 16-bit ones widened."""
    graph = onnx.load(path).graph
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.op_type != "Constant":
            continue
        for attribute in node.attribute:
            if attribute.name == "value":
                tensors.append(attribute.t)
    for tensor in tensors:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
            yield values.astype(np.float32)
        elif tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            yield values


def _ir_weights(path: Path) -> Iterator[npt.NDArray[Any]]:
    """Yield the float weights of an OpenVINO IR, 16-bit ones widened."""
    content = path.with_suffix(".bin").read_bytes()
    for data in ElementTree.parse(path).getroot().iterfind("layers/layer[@type='Const']/data"):
        dtype = data.attrib["element_type"]
        start = int(data.attrib["offset"])
        end = start + int(data.attrib["size"])
        stored = content[start:end]
        if dtype == "bf16":
            # A bfloat16 is the upper half of a float32.
            halves = np.frombuffer(stored, np.uint16).astype(np.uint32)
            yield (halves << 16).view(np.float32)
        elif dtype in _FLOATS:
            values = np.frombuffer(stored, _FLOATS[dtype])
            yield values.astype(np.float32) if dtype == "f16" else values
