"""
The only place that knows an exporter: a torch classifier becomes a plain fp32 ONNX graph, as
torch's tracing exporter writes it.
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
from export.checkpoint.loading import quiet
from graphs.subnormals import count_subnormals

OPSET = 18
# What is traced: no row and no length of one, which a tracer may take for the only one.
ROWS, LENGTH = 2, 16
# Families whose graphs have an input for types of sentences, whatever the tokenizer gives and also
# where a model has only one.
TYPED = (
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


def graph_inputs(model: Any, tokenizer_gives: Sequence[str]) -> list[str]:
    """Return what the graph reads of a text: what the model accepts and its tokenizer gives."""
    accepted = inspect.signature(model.forward).parameters
    typed = "token_type_ids" in tokenizer_gives and getattr(model.config, "type_vocab_size", 2) > 1
    names = [
        "input_ids",
        "attention_mask",
        *(["token_type_ids"] if typed or model.config.model_type in TYPED else []),
    ]
    return [name for name in names if name in accepted]


def export_onnx(model: Any, target: Path, inputs: Sequence[str], most: int = LENGTH) -> None:
    """Writes `model` as one .onnx file that reads `inputs`, (B, L) each with both symbolic, and
    gives `logits`, (B, labels).

    It is traced in the form of attention that it has; BadInput if it cannot be.
    """
    rows = len(model.get_input_embeddings().weight)
    length = min(LENGTH, most)
    ids = torch.arange(ROWS * length).reshape(ROWS, length) % rows
    examples = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    forward = model.forward

    def logits(*given: Tensor) -> Tensor:
        answer: Tensor = forward(**dict(zip(inputs, given, strict=True)), return_dict=True).logits
        return answer

    # Beside the target, so that it is one disk that needs the room.
    exporting = target.parent / "exporting"
    exporting.mkdir()
    # In the model's own place, for a module around it would be in every weight's name.
    model.forward = logits
    try:
        # The tracer warns of shapes that it fixes, and prints a graph that it cannot export;
        # verification shows whether a shape mattered.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), quiet(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                tuple(examples[name] for name in inputs),
                str(exporting / "model.onnx"),
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_axes={"logits": {0: "batch_size"}}
                | {name: {0: "batch_size", 1: "sequence_length"} for name in inputs},
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:  # A model may fail to be traced in as many ways as there are models.
        raise BadInput(f"torch cannot export this model: {first_line(error)}") from None
    finally:
        del model.forward
    if len(list(exporting.iterdir())) > 1:
        raise BadInput(
            "The graph passes ONNX's limit of 2 GiB for one file; such models are not supported."
        )
    (exporting / "model.onnx").rename(target)
    shutil.rmtree(exporting)


def read_inputs(path: Path) -> list[str]:
    """Return the names of an .onnx file's inputs."""
    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]


def flush_subnormal_weights(path: Path) -> int:
    """Set every subnormal float in an .onnx file to zero, in place; return how many there were.

    None of them changes an answer: the largest is 1.2e-38. Processors that are not told to flush
    them compute up to a hundred times slower with them, and not every engine can be told
    (service/runtimes/openvino.py).
    """
    model = onnx.load(path)
    constants = (
        a.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for a in node.attribute
        if a.name == "value"
    )
    flushed = 0
    for tensor in (*model.graph.initializer, *constants):
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if count := count_subnormals(values):
            smallest = np.finfo(np.float32).smallest_normal
            tensor.CopyFrom(
                numpy_helper.from_array(
                    np.where(np.abs(values) < smallest, np.float32(0), values), tensor.name
                )
            )
            flushed += count
    if flushed:
        onnx.save(model, path)
    return flushed
