"""
Makes an OpenVINO graph of a BERT read several texts in a row (service/batching/packing.py). Its
weights and layers stay what they are.

Three places of the graph know where a text begins and ends, and each is told instead of supposing
that a row is one text:

    attention_mask   (R, L)   the number of each token's text in its row, 0 for padding; 1 and 0
                              mean what they always did
    position_ids     (R, L)   each token's position in its text
    first_tokens     (N)      where each text begins, counted through all rows; of these tokens the
                              logits are
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from service.batching.packing import MAX_ROW_TOKENS

FAMILIES = ("albert", "bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")
"""Whose tokens look at each other in attention only, and whose positions are added to the words."""


_ON_THE_WAY = ("Convert", "Reshape", "Unsqueeze")
"""What may happen to a mask before it has four dimensions; none of them changes what it says."""


class NotPackable(Exception):
    """The graph is not made as this file knows it."""


def pack(model: ov.Model) -> None:
    """Changes `model` in place; NotPackable says what was not found, and then the model is as it
    was. After any other error it is of no use.
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
    first = _only(
        "choice of the first token", (node for node in nodes if _takes_the_first_token(node))
    )
    if _reads_past(first, model.outputs[0].get_node()):
        raise NotPackable("its answer reads more of a row than a first token")
    hidden = first.input_value(0)
    width = hidden.get_partial_shape()[2]
    if width.is_dynamic:
        raise NotPackable("the width of its hidden states is not fixed")
    replaced = positions.input_value(
        1
    ).get_node()  # where positions are looked up, the slice of them
    others = (node for node in nodes if node.get_friendly_name() != replaced.get_friendly_name())
    short = min((length for node in others for length in _prepared(node)), default=MAX_ROW_TOKENS)
    if short < MAX_ROW_TOKENS:
        raise NotPackable(
            f"it is prepared for rows of {short} tokens, and they may have {MAX_ROW_TOKENS}"
        )

    texts = parameters["attention_mask"]
    together = ops.equal(
        ops.unsqueeze(texts, np.array([1, 3])), ops.unsqueeze(texts, np.array([1, 2]))
    )
    _replace(mask, ops.convert(together, mask.output(0).get_element_type().to_string()))

    position_ids, first_tokens = (ops.parameter(shape, np.int64) for shape in ([-1, -1], [-1]))
    if positions.get_type_name() == "CumSum":
        _count_from_the_text(positions, position_ids)
    else:
        positions.input(1).replace_source_output(position_ids.output(0))

    tokens = ops.reshape(hidden, np.array([-1, width.get_length()]), False)
    _replace(first, ops.gather(tokens, first_tokens, np.array(0)))

    for parameter, name in ((position_ids, "position_ids"), (first_tokens, "first_tokens")):
        parameter.set_friendly_name(name)
        parameter.output(0).get_tensor().set_names({name})
    model.add_parameters([position_ids, first_tokens])
    model.validate_nodes_and_infer_types()


def _only(what: str, found: Iterator[ov.Node]) -> ov.Node:
    nodes = list(found)
    if len(nodes) != 1:
        raise NotPackable(f"it has {len(nodes)} of what looks like the {what}, and should have one")
    return nodes[0]


def _broadcast(mask: ov.Node) -> Iterator[ov.Node]:
    """The mask as it first has four dimensions, (R, 1, 1, L); NotPackable if anything else reads
    it.
    """
    for after in mask.output(0).get_target_inputs():
        node = after.get_node()
        kind, rank = node.get_type_name(), node.output(0).get_partial_shape().rank
        if kind == "ShapeOf":
            continue
        if kind not in _ON_THE_WAY:
            raise NotPackable(f"its mask goes into {kind} before it has four dimensions")
        if rank.is_static and rank.get_length() == 4:
            yield node
        else:
            yield from _broadcast(node)


def _reads_past(first: ov.Node, result: ov.Node) -> bool:
    """Whether the answer depends on an input by any other way than the choice of the first
    token.
    """
    seen, ahead = {first.get_name()}, [result]
    while ahead:
        node = ahead.pop()
        if node.get_name() in seen:
            continue
        if node.get_type_name() == "Parameter":
            return True
        seen.add(node.get_name())
        ahead += [source.get_node() for source in node.input_values()]
    return False


def _looks_up_positions(node: ov.Node) -> bool:
    """Whether it reads a table's first rows, as many as a text has tokens: of 0, 1, 2, … it takes a
    slice.
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


def _prepared(node: ov.Node) -> Iterator[int]:
    """For how many tokens of a row a constant (1, n) was made, of which the node takes a slice."""
    if (
        node.get_type_name() == "Slice"
        and (made := node.input_value(0).get_node()).get_type_name() == "Constant"
        and made.data.ndim == 2
    ):
        yield made.data.shape[1]


def _count_from_the_text(counts: ov.Node, position_ids: ov.Node) -> None:
    """Makes a RoBERTa, which counts the tokens of a row (R, L) that are not padding, begin anew
    with each text.
    """
    readers = counts.output(0).get_target_inputs()
    length = ops.gather(ops.shape_of(position_ids), np.array(1), np.array(0))
    begins = ops.subtract(ops.range(np.array(0), length, np.array(1), "i64"), position_ids)
    # That of the text before: its own first token may be one that is not counted.
    before = ops.gather_elements(ops.subtract(counts, counts.input_value(0)), begins, 1)
    for reader in readers:
        reader.replace_source_output(ops.subtract(counts, before).output(0))


def _takes_the_first_token(node: ov.Node) -> bool:
    """(R, D) of (R, L, D)."""
    if node.get_type_name() != "Gather":
        return False
    rank, place, axis = (
        node.input_value(0).get_partial_shape().rank,
        node.input_value(1).get_node(),
        node.input_value(2).get_node(),
    )
    if (
        rank.is_dynamic
        or rank.get_length() != 3
        or any(one.get_type_name() != "Constant" for one in (place, axis))
    ):
        return False
    return bool(
        place.data.shape == ()
        and place.data.item() == 0
        and axis.data.size == 1
        and axis.data.item() == 1
    )


def _replace(old: ov.Node, new: ov.Node) -> None:
    for reader in old.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))
