"""
The only place that knows an exporter: a torch classifier becomes a plain fp32 ONNX graph through optimum.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

from command import BadInput, first_line
from graphs.subnormals import subnormals

OPSET = 18


def export_onnx(model: nn.Module, target: Path) -> None:
    """Writes `model` as one .onnx file with symbolic batch and sequence length."""
    # optimum warns of shapes that tracing fixes; verification shows whether one mattered.
    logging.getLogger("optimum").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # Beside the target, so that it is one disk that needs the room.
    exported = target.parent / "exporting"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.exporters.onnx import onnx_export_from_model

        try:
            # The model itself, not a saved copy: loading one would choose another form of attention.
            onnx_export_from_model(
                model, exported, task="text-classification", opset=OPSET, device="cpu", do_validation=False, no_post_process=True,
            )
        except Exception as error:  # A model may fail to be traced in as many ways as there are models.
            raise BadInput(f"optimum cannot export this model: {first_line(error)}") from None
        weights = exported / "model.onnx_data"
        if weights.exists():
            raise BadInput("The graph passes ONNX's limit of 2 GiB for one file; such models are not supported.")
        (exported / "model.onnx").rename(target)
        shutil.rmtree(exported)


def flush_subnormal_weights(path: Path) -> int:
    """Set every subnormal float in an .onnx file to zero, in place; return how many there were.

    None of them changes an answer: the largest is 1.2e-38. Processors that are not told to flush them compute up to a hundred times
    slower with them, and not every engine can be told (service/runtimes/openvino.py).
    """
    model = onnx.load(path)
    constants = (a.t for node in model.graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value")
    flushed = 0
    for tensor in (*model.graph.initializer, *constants):
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if count := subnormals(values):
            smallest = np.finfo(np.float32).smallest_normal
            tensor.CopyFrom(numpy_helper.from_array(np.where(np.abs(values) < smallest, np.float32(0), values), tensor.name))
            flushed += count
    if flushed:
        onnx.save(model, path)
    return flushed
