"""
Changes an OpenVINO graph so that its last layer is computed only for the tokens that the answer
reads: the first token of each text.

What is computed token by token (products with weights, sums, normalisations, the queries of an
attention) can be computed for some tokens alone. `narrow` follows the hidden states back through
such operators. Where they meet what must stay whole, such as the layers before, and the keys and
values of the last attention, the first tokens are gathered. No logit changes, because nothing reads
what is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import openvino as ov
from openvino import opset13 as ops

Choose = Callable[[ov.Output, int], ov.Node]
"""Gathers the first tokens of an output along an axis: (…, L, …) to (…, Q, …)."""

ELEMENTWISE = frozenset(
    {"Abs", "Add", "Clamp", "Convert", "Divide", "Elu", "Erf", "Exp", "FakeQuantize", "Gelu"}
    | {"HSwish", "Log", "Maximum", "Minimum", "Multiply", "Negative", "Power", "Relu", "Select"}
    | {"Sigmoid", "Sqrt", "SquaredDifference", "Subtract", "Swish", "Tanh"}
)
"""Operators whose results depend only on the numbers in the same place of each input."""


def narrow_rows(model: ov.Model) -> bool:
    """Narrow a graph whose rows are one text each, in place; return whether it was changed.

    A graph whose answer reads more of a row than its first token stays as it is.
    """
    results = [output.get_node() for output in model.outputs]
    choices = [
        node
        for node in model.get_ordered_ops()
        if takes_first_token(node) and not any(reads_past(node, result) for result in results)
    ]
    if not choices:
        return False
    choice = choices[-1]
    first = ops.constant([0], ov.Type.i64)
    narrowed = narrow(
        model,
        choice.input_value(0),
        lambda output, axis: ops.gather(output, first, ops.constant(axis, ov.Type.i64)),
    )
    choice.input(0).replace_source_output(narrowed)
    model.validate_nodes_and_infer_types()
    return True


def narrow(model: ov.Model, hidden: ov.Output, choose: Choose) -> ov.Output:
    """Return the first tokens (R, Q, D) of hidden states (R, L, D), computed alone if possible.

    The graph is changed in place: the operators that compute `hidden` are narrowed, so nothing else
    may read other tokens of it.
    """
    narrowing = _plan(model, hidden)
    chosen: dict[tuple[str, int, int], ov.Node] = {}

    def first_tokens(source: ov.Output, axis: int) -> ov.Output:
        # A node may have several outputs.
        key = _name(source), source.get_index(), axis
        if key not in chosen:
            chosen[key] = choose(source, axis)
        return chosen[key].output(0)

    for node in narrowing.nodes:
        if node.get_type_name() == "Reshape":
            sizes = [size.get_length() for size in list(node.output(0).get_partial_shape())[2:]]
            # 0 copies the size of the input.
            node.input(1).replace_source_output(ops.constant([0, 0, *sizes], ov.Type.i64).output(0))
    for reader, axis in narrowing.reads:
        source = reader.get_source_output()
        if _name(source) in narrowing.whole:
            reader.replace_source_output(first_tokens(source, axis))
    return first_tokens(hidden, 1) if _name(hidden) in narrowing.whole else hidden


@dataclass(frozen=True)
class _Narrowing:
    """What of a graph is computed for first tokens only."""

    nodes: list[ov.Node] = field(default_factory=list)
    """Nodes that are."""
    reads: list[tuple[ov.Input, int]] = field(default_factory=list)
    """Their inputs that have tokens, and the axis of the tokens."""
    whole: set[str] = field(default_factory=set)
    """Names of nodes that stay whole."""


def _plan(model: ov.Model, hidden: ov.Output) -> _Narrowing:
    """Follow the hidden states back through the operators that can be narrowed."""
    nodes = model.get_ordered_ops()
    varying = _vary_with_inputs(nodes)
    plan = _Narrowing()
    token_axis = {_name(hidden): 1}
    # Backwards: every reader of a node is known before the node itself.
    for node in reversed(nodes):
        name = node.get_name()
        if name not in token_axis:
            continue
        axes = None if name in plan.whole else _token_axes(node, token_axis[name])
        if axes is None or not all(
            _name(node.input_value(index)) in varying
            and token_axis.get(_name(node.input_value(index)), axis) == axis
            for index, axis in axes.items()
        ):
            plan.whole.update(_computed_from(node))
            continue
        plan.nodes.append(node)
        for index, source in enumerate(node.input_values()):
            if index in axes:
                token_axis[_name(source)] = axes[index]
                plan.reads.append((node.input(index), axes[index]))
            elif not _is_shape_of_reshape(node, index):
                plan.whole.update(_computed_from(source.get_node()))
    return plan


def takes_first_token(node: ov.Node) -> bool:
    """Return whether a node takes the first of each row's tokens: (R, D) of (R, L, D)."""
    if node.get_type_name() != "Gather":
        return False
    rank = node.input_value(0).get_partial_shape().rank
    # A number as the index, not a list of one, which would keep the dimension.
    is_scalar = len(node.input_value(1).get_partial_shape()) == 0
    return bool(
        rank.is_static
        and rank.get_length() == 3
        and is_scalar
        and [_numbers(node.input_value(index)) for index in (1, 2)] == [[0], [1]]
    )


def reads_past(first: ov.Node, result: ov.Node) -> bool:
    """Return whether the answer depends on an input by a path around the first token's choice."""
    visited, ahead = {first.get_name()}, [result]
    while ahead:
        node = ahead.pop()
        if node.get_name() in visited:
            continue
        if node.get_type_name() == "Parameter":
            return True
        visited.add(node.get_name())
        ahead += [source.get_node() for source in node.input_values()]
    return False


def _token_axes(node: ov.Node, axis: int) -> Mapping[int, int] | None:
    """Return along which axis of which inputs a node reads the tokens of its output's `axis`.

    Inputs that are not named are read whole. None if the tokens cannot be computed alone.
    """
    inputs = node.input_values()
    shapes = [node.output(0).get_partial_shape(), *(each.get_partial_shape() for each in inputs)]
    if node.get_output_size() != 1 or any(shape.rank.is_dynamic for shape in shapes):
        return None
    rank, ranks = len(shapes[0]), [len(shape) for shape in shapes[1:]]
    if rank <= axis or not ranks:
        return None
    kind, attributes = node.get_type_name(), node.get_attributes()
    if kind in ELEMENTWISE:
        # Smaller inputs are broadcast: their last axis is the output's last one.
        return {
            index: place
            for index, shape in enumerate(shapes[1:])
            if (place := axis - rank + len(shape)) >= 0 and shape[place] != 1
        }
    if kind == "MatMul":
        is_left_row = axis == rank - 2 and ranks[0] == rank and not attributes["transpose_a"]
        return {0: axis} if is_left_row else None
    if kind == "Softmax":
        return {0: axis} if attributes["axis"] % rank != axis else None
    if (kind == "MVN" and len(inputs) > 1) or (kind == "ReduceMean" and attributes["keep_dims"]):
        over = _numbers(inputs[1])
        is_within_token = over is not None and all(each % rank != axis for each in over)
        return {0: axis} if is_within_token else None
    if kind == "Transpose":
        order = _numbers(inputs[1])
        return {0: order[axis]} if order else None
    if kind == "Concat":
        is_along_tokens = attributes["axis"] % rank == axis
        return None if is_along_tokens else dict.fromkeys(range(len(inputs)), axis)
    if kind == "Reshape":
        return {0: 1} if axis == 1 and _keeps_rows_and_tokens(node) else None
    return None


def _keeps_rows_and_tokens(reshape: ov.Node) -> bool:
    """Return whether a reshape only splits or joins what follows the first two dimensions.

    As (R, L, D) to (R, L, heads, D / heads), or back.
    """
    before, after = reshape.input_value(0).get_partial_shape(), reshape.get_output_partial_shape(0)
    if not reshape.get_attributes()["special_zero"]:
        return False
    if not all(_keeps_dimension(reshape, index) for index in (0, 1)):
        return False
    following = [list(shape)[2:] for shape in (before, after)]
    if not all(sizes and all(size.is_static for size in sizes) for sizes in following):
        return False
    first, second = (math.prod(size.get_length() for size in sizes) for sizes in following)
    return bool(first == second)


def _keeps_dimension(reshape: ov.Node, index: int) -> bool:
    """Return whether a reshape gives a dimension the size that it has: its sizes say so, or 0."""
    before, after = reshape.input_value(0).get_partial_shape(), reshape.get_output_partial_shape(0)
    if min(len(before), len(after)) <= index:
        return False
    if before[index].is_static and after[index].is_static:
        return bool(before[index] == after[index])
    size = reshape.input_value(1).get_node()
    if size.get_type_name() == "Constant":
        return bool(size.data.reshape(-1)[index] == 0)
    if size.get_type_name() != "Concat" or size.get_input_size() <= index:
        return False
    return _reads_dimension(size.input_value(index).get_node(), index)


def _reads_dimension(size: ov.Node, index: int) -> bool:
    """Return whether a number is the size of that dimension of some tensor, or 0."""
    while size.get_type_name() in ("Convert", "Reshape", "Squeeze", "Unsqueeze"):
        size = size.input_value(0).get_node()
    if size.get_type_name() == "Constant":
        return _numbers(size.output(0)) == [0]
    return bool(
        size.get_type_name() == "Gather"
        and _numbers(size.input_value(1)) == [index]
        and size.input_value(0).get_node().get_type_name() in ("Convert", "ShapeOf")
    )


def _is_shape_of_reshape(node: ov.Node, index: int) -> bool:
    return node.get_type_name() == "Reshape" and index == 1


def _numbers(source: ov.Output) -> list[int] | None:
    """Return the numbers of a constant, or of a range between constants; else None."""
    node = source.get_node()
    if node.get_type_name() == "Range":
        bounds = [_numbers(bound) for bound in node.input_values()]
        ends = [bound[0] for bound in bounds if bound]
        return list(range(*ends)) if len(ends) == len(bounds) else None
    if node.get_type_name() != "Constant":
        return None
    return [int(number) for number in node.data.reshape(-1)]


def _name(output: ov.Output) -> str:
    """Return the unique name of the node that an output is of."""
    name: str = output.get_node().get_name()
    return name


def _vary_with_inputs(nodes: list[ov.Node]) -> set[str]:
    """Return the names of the nodes that depend on an input of the graph."""
    varying: set[str] = set()
    for node in nodes:
        sources = [_name(source) for source in node.input_values()]
        if node.get_type_name() == "Parameter" or not varying.isdisjoint(sources):
            varying.add(node.get_name())
    return varying


def _computed_from(node: ov.Node) -> set[str]:
    """Return the names of a node and of everything that it is computed from."""
    visited: set[str] = set()
    ahead = [node]
    while ahead:
        each = ahead.pop()
        if each.get_name() not in visited:
            visited.add(each.get_name())
            ahead += [source.get_node() for source in each.input_values()]
    return visited
