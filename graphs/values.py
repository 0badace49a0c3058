"""
Which values two ONNX graphs have in common, weights included.

Two values are the same if the same operators compute them from the same weights: value numbering,
as compilers use it to find common subexpressions (J. Cocke, Global common subexpression
elimination, SIGPLAN Notices 5, 1970).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, numpy_helper

from graphs.canonical import GraphError, split
from graphs.files import read_graph


def value_digests(graph: GraphProto) -> dict[str, bytes]:
    """Return what identifies each value of a graph, by name: how it is computed from what.

    Raises GraphError for weights that are stored as sparse tensors.
    """
    if graph.sparse_initializer:
        raise GraphError("The graph has sparse weights, which are not read.")
    identities = {each.name: _digest("weight", *_content(each)) for each in graph.initializer}
    for each in graph.input:
        kind = each.type.tensor_type.elem_type
        identities.setdefault(each.name, _digest("input", each.name, kind))
    for node in graph.node:
        if node.op_type == "Identity" and not node.domain:
            # Exporters write it where two weights have equal values.
            identities[node.output[0]] = identities[node.input[0]]
            continue
        read = [identities[name].hex() if name else "" for name in node.input]
        attributes = sorted(_attribute(each) for each in node.attribute)
        for place, name in enumerate(node.output):
            if name:  # an output that is left out has no name
                identities[name] = _digest(
                    node.domain, node.op_type, *attributes, "reads", *read, place
                )
    return identities


def _content(tensor: TensorProto) -> tuple[object, ...]:
    values = numpy_helper.to_array(tensor)
    return tensor.data_type, list(tensor.dims), hashlib.sha256(values.tobytes()).hexdigest()


def _attribute(attribute: AttributeProto) -> str:
    if attribute.type == AttributeProto.TENSOR:
        return f"{attribute.name} {_content(attribute.t)}"
    return f"{attribute.name} {attribute.SerializeToString(deterministic=True).hex()}"


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def first_difference(a: Path, b: Path) -> str | None:
    """Return where the encoders of two .onnx files begin to differ; None if they are the same.

    The place is the name of a node, as /bert/encoder/layer.1/output/dense/MatMul: one that computes
    something else, or with other weights. Encoders are the same if each graph has no more nodes of
    its own than its head has.
    """
    graphs = [onnx.load(path).graph for path in (a, b)]
    digests = [value_digests(graph) for graph in graphs]
    for this, other, path in ((1, 0, b), (0, 1, a)):
        known = set(digests[other].values())
        nodes = _nodes_of_its_own(graphs[this], digests[this], known)
        _, head = split(read_graph(path))
        if len(nodes) > len(head.nodes):
            return str(nodes[0].name or nodes[0].op_type)
    return None


def have_same_head(a: Path, b: Path) -> bool:
    """Return whether two .onnx files with the same encoder have the same head too."""
    graphs = [onnx.load(path).graph for path in (a, b)]
    first, second = (value_digests(graph) for graph in graphs)
    return first[graphs[0].output[0].name] == second[graphs[1].output[0].name]


def _nodes_of_its_own(
    graph: GraphProto, identities: Mapping[str, bytes], known: set[bytes]
) -> list[NodeProto]:
    """Return the nodes that compute what another graph does not, in their order."""
    return [
        node
        for node in graph.node
        if node.op_type not in ("Constant", "Identity")
        and not all(identities[name] in known for name in node.output if name)
    ]
