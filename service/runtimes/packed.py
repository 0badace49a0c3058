"""
Changes an OpenVINO graph of a BERT so that a row may hold several texts (sequence packing, see
service/batching/packing.py). Weights and layers stay the same, and the last layer is computed for
the first tokens only (service/runtimes/narrowed.py).

Three places of the graph assume that a row is one text. Each gets an input in place of that:

    attention_mask   (R, L)   the number of each token's text in its row, 0 for padding; a mask of
                              1 and 0 keeps its meaning
    position_ids     (R, L)   each token's position in its text
    first_tokens     (R, Q)   the index of each text's first token in its row; the logits are those
                              of these tokens, (R × Q, labels)

A graph that labels tokens, (R, L, labels), has no such choice of tokens, and no third input.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from service.batching.packing import MAX_ROW_TOKENS
from service.runtimes.narrowed import narrow, reads_past, takes_first_token

_MASK_STEPS = ("Convert", "Reshape", "Unsqueeze")
"""Operators that may give a mask its four dimensions; none of them changes its values."""


class NotPackable(Exception):
    """Raised for a graph without the structure that `pack` changes."""


def pack(model: ov.Model, narrows: bool = True) -> None:
    """Change `model` in place so that its rows may hold several texts.

    Without `narrows` the last layer is computed for every token, as before the change.
    Raises NotPackable, which names what the graph lacks; the model is then unchanged. After any
    other error the model is unusable.
    """
    parameters = {name: port.get_node() for port in model.inputs for name in port.get_names()}
    if "attention_mask" not in parameters:
        raise NotPackable("it has no attention_mask")
    if len(model.outputs) != 1:
        raise NotPackable(f"it has {len(model.outputs)} outputs, and should have one")
    nodes = model.get_ordered_ops()
    mask = _only("mask of four dimensions", _broadcast(parameters["attention_mask"]))
    positions = _only(
        "way to count positions",
        (node for node in nodes if node.get_type_name() == "CumSum" or _looks_up_positions(node)),
    )
    labels_tokens = len(model.outputs[0].get_partial_shape()) == 3
    first = None if labels_tokens else _first_token(model, nodes)
    # Where positions are looked up, their slice is replaced, so its length does not matter.
    replaced = positions.input_value(1).get_node()
    others = [node for node in nodes if node.get_friendly_name() != replaced.get_friendly_name()]
    longest = min(
        (length for node in others for length in _row_limits(node)), default=MAX_ROW_TOKENS
    )
    if longest < MAX_ROW_TOKENS:
        raise NotPackable(
            f"it is prepared for rows of {longest} tokens, and they may have {MAX_ROW_TOKENS}"
        )

    texts = parameters["attention_mask"]
    together = ops.equal(
        ops.unsqueeze(texts, np.array([1, 3])), ops.unsqueeze(texts, np.array([1, 2]))
    )
    _replace(mask, ops.convert(together, mask.output(0).get_element_type().to_string()))

    position_ids, first_tokens = (ops.parameter([-1, -1], np.int64) for _ in range(2))
    added = {"position_ids": position_ids}
    if first is not None:
        added["first_tokens"] = first_tokens
    if positions.get_type_name() == "CumSum":
        _count_from_the_text(positions, position_ids)
    else:
        positions.input(1).replace_source_output(position_ids.output(0))

    for name, parameter in added.items():
        parameter.set_friendly_name(name)
        parameter.output(0).get_tensor().set_names({name})
    model.add_parameters(list(added.values()))
    model.validate_nodes_and_infer_types()
    if first is None:
        return

    def choose(output: ov.Output, axis: int) -> ov.Node:
        return ops.gather(output, first_tokens, np.array(axis), batch_dims=1)

    hidden = first.input_value(0)
    width = hidden.get_partial_shape()[2].get_length()
    narrowed = narrow(model, hidden, choose) if narrows else choose(hidden, 1).output(0)
    _replace(first, ops.reshape(narrowed, np.array([-1, width]), False))
    model.validate_nodes_and_infer_types()


def _first_token(model: ov.Model, nodes: list[ov.Node]) -> ov.Node:
    """Return the node that takes the first token; NotPackable if the answer reads more."""
    first = _only("choice of the first token", (node for node in nodes if takes_first_token(node)))
    if reads_past(first, model.outputs[0].get_node()):
        raise NotPackable("its answer reads more of a row than a first token")
    if first.input_value(0).get_partial_shape()[2].is_dynamic:
        raise NotPackable("the width of its hidden states is not fixed")
    return first


def _only(description: str, candidates: Iterator[ov.Node]) -> ov.Node:
    """Return the single candidate; NotPackable if there are none or several."""
    nodes = list(candidates)
    if len(nodes) != 1:
        raise NotPackable(
            f"it has {len(nodes)} of what looks like the {description}, and should have one"
        )
    return nodes[0]


def _broadcast(mask: ov.Node) -> Iterator[ov.Node]:
    """Yield the nodes that first give the mask four dimensions, (R, 1, 1, L).

    Raises NotPackable if anything else reads the mask.
    """
    for after in mask.output(0).get_target_inputs():
        node = after.get_node()
        kind, rank = node.get_type_name(), node.output(0).get_partial_shape().rank
        if kind == "ShapeOf":
            continue
        if kind not in _MASK_STEPS:
            raise NotPackable(f"its mask goes into {kind} before it has four dimensions")
        if rank.is_static and rank.get_length() == 4:
            yield node
        else:
            yield from _broadcast(node)


def _looks_up_positions(node: ov.Node) -> bool:
    """Return whether a node reads as many of a table's first rows as a text has tokens.

    Its indices are then a slice of the constant 0, 1, 2, ….
    """
    if node.get_type_name() != "Gather":
        return False
    table, indices = node.input_value(0).get_partial_shape(), node.input_value(1).get_node()
    if table.is_dynamic or len(table) != 2 or indices.get_type_name() != "Slice":
        return False
    numbers = indices.input_value(0).get_node()
    return numbers.get_type_name() == "Constant" and np.array_equal(
        numbers.data.reshape(-1), np.arange(table[0].get_length())
    )


def _row_limits(node: ov.Node) -> Iterator[int]:
    """Yield n if the node slices a constant (1, n), which limits rows to n tokens."""
    if node.get_type_name() == "Slice":
        table = node.input_value(0).get_node()
        if table.get_type_name() == "Constant" and table.data.ndim == 2:
            yield table.data.shape[1]


def _count_from_the_text(counts: ov.Node, position_ids: ov.Node) -> None:
    """Restart a RoBERTa's count of a row's tokens without padding, (R, L), with each text."""
    readers = counts.output(0).get_target_inputs()
    length = ops.gather(ops.shape_of(position_ids), np.array(1), np.array(0))
    begins = ops.subtract(ops.range(np.array(0), length, np.array(1), "i64"), position_ids)
    # The count before each text: the text's own first token may be one that is not counted.
    before = ops.gather_elements(ops.subtract(counts, counts.input_value(0)), begins, 1)
    for reader in readers:
        reader.replace_source_output(ops.subtract(counts, before).output(0))


def _replace(old: ov.Node, new: ov.Node) -> None:
    for reader in old.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))
