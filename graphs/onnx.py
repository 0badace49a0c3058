"""
Reads an ONNX file into its canonical graph.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from onnx import AttributeProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from graphs.canonical import Graph, GraphError, Input, Leaf, Node, Output, Value

_INTEGERS = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}


def read_onnx(path: Path) -> Graph:
    model = onnx.load(path)
    graph = model.graph
    if model.functions or graph.sparse_initializer:
        raise GraphError(
            "The file defines functions or sparse weights, which have no canonical form here."
        )
    weights = {tensor.name: _weight(tensor) for tensor in graph.initializer}
    symbols: dict[str, str] = {}
    values: dict[str, Value] = {"": None, **weights}
    inputs = [value for value in graph.input if value.name not in weights]
    for i, value in enumerate(inputs):
        values[value.name] = Input(i)
    nodes: list[Node] = []
    versions = {opset.domain: opset.version for opset in model.opset_import}
    for node in _ordered(graph.node, set(values)):
        if node.op_type == "Identity":
            values[node.output[0]] = values[node.input[0]]
        elif node.op_type == "Constant":
            values[node.output[0]] = _constant(node)
        else:
            operator = (
                f"{node.domain}::{node.op_type}-{versions[node.domain]}"
                if node.domain
                else node.op_type
            )
            attributes = tuple(sorted((a.name, _attribute(a)) for a in node.attribute))
            nodes.append(
                Node(
                    operator,
                    attributes,
                    tuple(values[name] for name in node.input),
                    len(node.output),
                    node.name,
                )
            )
            for place, name in enumerate(node.output):
                values[name] = Output(len(nodes) - 1, place)
    # The opset of ONNX's own domain decides what every operator means.
    described = (
        f"opset {versions.get('', 0)}",
        *(_type_and_shape(value, symbols) for value in inputs),
    )
    return Graph(described, tuple(nodes), tuple(values[value.name] for value in graph.output))


def _ordered(nodes: list[NodeProto], known: set[str]) -> list[NodeProto]:
    """The nodes so that each follows what it reads; ONNX asks for this order, but a reader need not
    trust it.
    """
    waiting, ordered = list(nodes), []
    while waiting:
        ready = [node for node in waiting if all(name in known for name in node.input)]
        if not ready:
            raise GraphError(f"Node {waiting[0].name!r} reads a value that nothing makes.")
        for node in ready:
            known.update(node.output)
        ordered += ready
        taken = set(map(id, ready))
        waiting = [node for node in waiting if id(node) not in taken]
    return ordered


def _weight(tensor: TensorProto) -> Leaf:
    """A weight says type and shape; short integer tensors are axes, shapes and indices, which steer
    the computation.
    """
    steers = tensor.data_type in _INTEGERS and len(tensor.dims) <= 1
    return Leaf(
        TensorProto.DataType.Name(tensor.data_type),
        tuple(tensor.dims),
        _tensor(tensor) if steers else None,
    )


def _constant(node: NodeProto) -> Leaf:
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor = attribute.t
        return Leaf(
            TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims), _tensor(tensor)
        )
    return Leaf(attribute.name, (), _attribute(attribute))


def _tensor(tensor: TensorProto) -> str:
    raw = numpy_helper.to_array(tensor).tobytes()
    return raw.hex() if len(raw) <= 64 else hashlib.sha256(raw).hexdigest()


def _attribute(attribute: AttributeProto) -> str:
    match attribute.type:
        case AttributeProto.GRAPH | AttributeProto.GRAPHS:
            raise GraphError(
                f"Attribute {attribute.name!r} holds a graph; control flow has no canonical form"
                " here."
            )
        case AttributeProto.TENSOR:
            tensor = attribute.t
            return (
                f"tensor {TensorProto.DataType.Name(tensor.data_type)} {list(tensor.dims)}"
                f" {_tensor(tensor)}"
            )
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
            return f"strings {[s.hex() for s in attribute.strings]}"
    raise GraphError(f"Attribute {attribute.name!r} has a type this reader does not know.")


def _type_and_shape(value: ValueInfoProto, symbols: dict[str, str]) -> str:
    """As `INT64 [s0, s1]`: symbolic dimensions by order of appearance, not by name."""
    tensor = value.type.tensor_type
    extents = [
        (
            symbols.setdefault(d.dim_param, f"s{len(symbols)}")
            if d.HasField("dim_param")
            else str(d.dim_value)
        )
        for d in tensor.shape.dim
    ]
    return f"{TensorProto.DataType.Name(tensor.elem_type)} [{', '.join(extents)}]"
