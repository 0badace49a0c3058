"""
Writes a torch classifier as a plain fp32 ONNX graph, with torch's tracing exporter.

No other module knows an exporter.
"""

from __future__ import annotations

import inspect
import io
import shutil
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from command import BadInput, first_line
from export.checkpoint.loading import embedding_rows, quiet
from graphs.subnormals import count_subnormals

OPSET = 18
# Shape of the traced batch. Neither is 1, which a tracer may fix in the graph.
TRACED_ROWS, TRACED_LENGTH = 2, 16
FAMILIES_WITH_TOKEN_TYPES = (
    "bert",
    "electra",
    "convbert",
    "albert",
    "mobilebert",
    "squeezebert",
    "megatron-bert",
    "roformer",
    "rembert",
)
"""Families whose graphs have the input token_type_ids, whatever their tokenizer gives, and also if
the model has a single type.
"""


def graph_inputs(model: Any, tokenizer_outputs: Sequence[str]) -> list[str]:
    """Return the inputs of the graph: those that the model accepts and its tokenizer gives."""
    names = ["input_ids", "attention_mask"]
    typed = (
        "token_type_ids" in tokenizer_outputs and getattr(model.config, "type_vocab_size", 2) > 1
    )
    if typed or model.config.model_type in FAMILIES_WITH_TOKEN_TYPES:
        names.append("token_type_ids")
    accepted = inspect.signature(model.forward).parameters
    return [name for name in names if name in accepted]


def export_onnx(
    model: Any,
    target: Path,
    inputs: Sequence[str],
    max_tokens: int = TRACED_LENGTH,
    labels_tokens: bool = False,
) -> None:
    """Write `model` as one .onnx file that maps `inputs`, each (B, L), to `logits`, (B, labels).

    With `labels_tokens` the logits are (B, L, labels). B and L are symbolic. The model is traced
    with the attention that it has. Raises BadInput if it cannot be traced, or is larger than one
    file may be.
    """
    length = min(TRACED_LENGTH, max_tokens)
    ids = torch.arange(TRACED_ROWS * length).reshape(TRACED_ROWS, length) % embedding_rows(model)
    examples = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    forward = model.forward

    def logits(*tensors: Tensor) -> Tensor:
        output: Tensor = forward(**dict(zip(inputs, tensors, strict=True)), return_dict=True).logits
        return output

    rows_and_tokens = {0: "batch_size", 1: "sequence_length"}
    # Next to the target, so that only one disk needs space.
    exporting = target.parent / "exporting"
    exporting.mkdir()
    # Replaced in the model itself, because a wrapper's name would be part of every weight's name.
    model.forward = logits
    try:
        # The tracer warns about shapes that it fixes, and prints a graph that it cannot export.
        # Verification shows whether a shape mattered.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), quiet(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                tuple(examples[name] for name in inputs),
                str(exporting / "model.onnx"),
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_axes={"logits": rows_and_tokens if labels_tokens else {0: "batch_size"}}
                | dict.fromkeys(inputs, rows_and_tokens),
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:  # Tracing runs the code of any model, which may raise anything.
        raise BadInput(f"torch cannot export this model: {first_line(error)}") from None
    finally:
        del model.forward
    if len(list(exporting.iterdir())) > 1:
        raise BadInput(
            "The graph is larger than 2 GiB, ONNX's limit for one file; export a smaller model."
        )
    (exporting / "model.onnx").rename(target)
    shutil.rmtree(exporting)


def read_inputs(path: Path) -> list[str]:
    """Return the names of an .onnx file's inputs."""
    graph = onnx.load(path, load_external_data=False).graph
    weights = {each.name for each in graph.initializer}
    return [value.name for value in graph.input if value.name not in weights]


def flush_subnormal_weights(path: Path) -> int:
    """Set every subnormal float in an .onnx file to zero, in place; return how many there were.

    None of them changes an answer: the largest is 1.2e-38. Unless a processor flushes them, it
    computes up to a hundred times slower with them, and not every engine can switch that on
    (service/runtimes/openvino.py).
    """
    model = onnx.load(path)
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        if node.op_type == "Constant":
            tensors += [attribute.t for attribute in node.attribute if attribute.name == "value"]
    smallest = np.finfo(np.float32).smallest_normal
    flushed = 0
    for tensor in tensors:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if count := count_subnormals(values):
            normal = np.where(np.abs(values) < smallest, np.float32(0), values)
            tensor.CopyFrom(numpy_helper.from_array(normal, tensor.name))
            flushed += count
    if flushed:
        onnx.save(model, path)
    return flushed
