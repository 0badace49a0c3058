"""
ONNX graphs that were exported elsewhere, such as by `optimum-cli export onnx`.

Such a folder has model.onnx, config.json and a tokenizer, and no weights for torch. Its graph is
taken as it is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from command import BadInput, first_line

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "logits"
STANDARD_DOMAINS = ("", "ai.onnx")
QUANTISED = re.compile("QuantizeLinear|QLinear|MatMulInteger|ConvInteger")
"""Operators of quantised graphs."""


@dataclass(frozen=True)
class ImportedModel:
    """A classifier whose graph was exported elsewhere."""

    graph: Path
    """The .onnx file."""
    config: Any
    """What transformers makes of its config.json."""
    embedding_rows: int
    """How many token ids have an embedding."""
    parameters: int
    """Number of its weights."""


def read_imported(graph: Path, config: Any, labels_tokens: bool) -> ImportedModel:
    """Return the model of a graph; raises BadInput if the service cannot run such a graph."""
    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf raises several types.
        raise BadInput(f"{graph} cannot be read: {first_line(error)}") from None
    if any(tensor.external_data for tensor in model.graph.initializer):
        raise BadInput(
            f"{graph} keeps its weights in another file, so it is larger than 2 GiB or was saved"
            " with external data; save it as one file."
        )
    foreign = sorted({node.domain for node in model.graph.node} - set(STANDARD_DOMAINS))
    if foreign:
        raise BadInput(
            f"{graph} has operators of {foreign[0]}: it was optimised or quantised for ONNX"
            " Runtime. Give the graph from before; export itself quantises."
        )
    quantised = sorted(
        {node.op_type for node in model.graph.node if QUANTISED.search(node.op_type)}
    )
    if quantised:
        raise BadInput(
            f"{graph} has operators of a quantised graph ({quantised[0]}). Give the graph from"
            " before; export itself quantises."
        )
    types = {each.data_type for each in model.graph.initializer}
    if types & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}:
        raise BadInput(f"{graph} has weights of 16 bits; export it in fp32.")
    _check_ends(graph, model, len(config.id2label), labels_tokens)
    rows = _embedding_rows(model)
    if rows is None:
        raise BadInput(f"{graph} has no table of embeddings that input_ids choose from.")
    weights = [each for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT]
    return ImportedModel(graph, config, rows, sum(math.prod(each.dims) for each in weights))


def _check_ends(graph: Path, model: onnx.ModelProto, labels: int, labels_tokens: bool) -> None:
    """Raise BadInput unless the inputs and the output are those of a classifier."""
    constants = {each.name for each in model.graph.initializer}
    names = [each.name for each in model.graph.input if each.name not in constants]
    unknown = [name for name in names if name not in INPUTS]
    if unknown or "input_ids" not in names:
        raise BadInput(
            f"{graph} reads {', '.join(names)}; a classifier reads input_ids, and may read"
            " attention_mask and token_type_ids."
        )
    outputs = {each.name: each for each in model.graph.output}
    if list(outputs) != [OUTPUT]:
        raise BadInput(
            f"{graph} returns {', '.join(outputs)}; a classifier returns logits. Export it with"
            " --task text-classification or --task token-classification."
        )
    dimensions = outputs[OUTPUT].type.tensor_type.shape.dim
    if len(dimensions) != (3 if labels_tokens else 2):
        raise BadInput(
            f"{graph} returns logits of {len(dimensions)} dimensions, and its config.json describes"
            f" a model that labels {'tokens' if labels_tokens else 'whole texts'}."
        )
    last = dimensions[-1].dim_value
    if last not in (0, labels):
        raise BadInput(f"{graph} returns {last} labels, and its config.json names {labels}.")


def _embedding_rows(model: onnx.ModelProto) -> int | None:
    """Return the rows of the table from which input_ids choose."""
    tables = {each.name: each.dims for each in model.graph.initializer}
    from_ids = {"input_ids"}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in from_ids:
            from_ids.add(node.output[0])
        if node.op_type == "Gather" and node.input[1] in from_ids and node.input[0] in tables:
            return int(tables[node.input[0]][0])
    return None
