"""Reads an ONNX file into its canonical graph.

The format: https://onnx.ai/onnx/repo-docs/IR.html
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from graphs.canonical import Graph, GraphError, Input, Leaf, Node, Output, Value, constant_text

_INTEGERS = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}


def read_onnx(path: Path) -> Graph:
    """Return the canonical graph of an ONNX file; GraphError if it has none.

    Graphs with control flow, functions or sparse weights have none.
    """
    model = onnx.load(path)
    graph = model.graph
    if model.functions or graph.sparse_initializer:
        raise GraphError(
            "The file defines functions or sparse weights, which have no canonical form."
        )
    weights = {tensor.name: _weight(tensor) for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    # ONNX writes an optional input that is left out as an empty name.
    values: dict[str, Value] = {"": None, **weights}
    for index, value in enumerate(inputs):
        values[value.name] = Input(index)
    nodes: list[Node] = []
    versions = _opset_versions(model)
    for node in _topological_order(graph.node, set(values)):
        if node.op_type == "Identity":
            values[node.output[0]] = values[node.input[0]]
        elif node.op_type == "Constant":
            values[node.output[0]] = _constant(node)
        else:
            for index, name in enumerate(node.output):
                values[name] = Output(len(nodes), index)
            nodes.append(_node(node, values, versions))
    outputs = tuple(values[value.name] for value in graph.output)
    return Graph(_describe_inputs(model, inputs), tuple(nodes), outputs)


def _topological_order(nodes: Iterable[NodeProto], known: set[str]) -> list[NodeProto]:
    """Return the nodes, each after the nodes that it reads; `known` are the values at the start.

    ONNX requires this order, but a reader of foreign files does not rely on it.
    """
    remaining = list(nodes)
    order: list[NodeProto] = []
    while remaining:
        ready = [node for node in remaining if known.issuperset(node.input)]
        if not ready:
            raise GraphError(f"Node {remaining[0].name!r} reads a value that no node computes.")
        for node in ready:
            known.update(node.output)
        order += ready
        ready_ids = set(map(id, ready))
        remaining = [node for node in remaining if id(node) not in ready_ids]
    return order


def _node(node: NodeProto, values: dict[str, Value], versions: dict[str, int]) -> Node:
    operator = node.op_type
    if node.domain:
        version = versions[node.domain]
        operator = f"{node.domain}::{node.op_type}-{version}"
    attributes: list[tuple[str, str]] = []
    for attribute in node.attribute:
        attributes.append((attribute.name, _attribute(attribute)))
    return Node(
        operator,
        tuple(sorted(attributes)),
        tuple(values[name] for name in node.input),
        len(node.output),
        node.name,
    )


def _describe_inputs(model: ModelProto, inputs: Iterable[ValueInfoProto]) -> tuple[str, ...]:
    """Return the type and shape of each input, behind the version of ONNX's own operators.

    This version decides what every operator without a domain means.
    """
    version = _opset_versions(model).get("", 0)
    described = [f"opset {version}"]
    symbols: dict[str, str] = {}
    for value in inputs:
        described.append(_type_and_shape(value, symbols))
    return tuple(described)


def _opset_versions(model: ModelProto) -> dict[str, int]:
    """Return the version of each domain's operators; ONNX's own domain is empty."""
    return {opset.domain: opset.version for opset in model.opset_import}


def _type_and_shape(value: ValueInfoProto, symbols: dict[str, str]) -> str:
    """Return a type and shape as `INT64 [s0, s1]`.

    Symbolic dimensions are numbered in order of appearance, because their names do not count.
    """
    tensor = value.type.tensor_type
    dtype = TensorProto.DataType.Name(tensor.elem_type)
    extents: list[str] = []
    for dimension in tensor.shape.dim:
        if dimension.HasField("dim_param"):
            number = len(symbols)
            extent = symbols.setdefault(dimension.dim_param, f"s{number}")
        else:
            extent = str(dimension.dim_value)
        extents.append(extent)
    return f"{dtype} [{', '.join(extents)}]"


def _weight(tensor: TensorProto) -> Leaf:
    """Return an initializer; without its value, unless it is an integer scalar or vector.

    Those are axes, shapes and indices, which steer the computation.
    """
    steers = tensor.data_type in _INTEGERS and len(tensor.dims) <= 1
    return _leaf(tensor) if steers else Leaf(_dtype(tensor), tuple(tensor.dims))


def _constant(node: NodeProto) -> Leaf:
    """Return what a Constant node holds; its value always counts."""
    attribute = node.attribute[0]
    if attribute.name == "value":
        return _leaf(attribute.t)
    return Leaf(attribute.name, (), _attribute(attribute))


def _leaf(tensor: TensorProto) -> Leaf:
    return Leaf(_dtype(tensor), tuple(tensor.dims), _value(tensor))


def _dtype(tensor: TensorProto) -> str:
    name: str = TensorProto.DataType.Name(tensor.data_type)
    return name


def _value(tensor: TensorProto) -> str:
    return constant_text(numpy_helper.to_array(tensor).tobytes())


def _attribute(attribute: AttributeProto) -> str:
    """Return an attribute's type and value as text."""
    match attribute.type:
        case AttributeProto.GRAPH | AttributeProto.GRAPHS:
            raise GraphError(
                f"Attribute {attribute.name!r} holds a graph; control flow has no canonical form."
            )
        case AttributeProto.TENSOR:
            tensor = attribute.t
            return f"tensor {_dtype(tensor)} {list(tensor.dims)} {_value(tensor)}"
        case AttributeProto.FLOAT:
            return f"float {attribute.f!r}"
        case AttributeProto.INT:
            return f"int {attribute.i}"
        case AttributeProto.STRING:
            return f"string {attribute.s.hex()}"
        case AttributeProto.FLOATS:
            return f"floats {list(attribute.floats)}"
        case AttributeProto.INTS:
            return f"ints {list(attribute.ints)}"
        case AttributeProto.STRINGS:
            return f"strings {[text.hex() for text in attribute.strings]}"
    raise GraphError(
        f"Attribute {attribute.name!r} has type {attribute.type}, which has no canonical form."
    )
