"""
The canonical form of a model's graph, without names and without weights, and its digest.

Two graphs have the same digest exactly if they run the same operators, with the same
attributes, on the same types and shapes, in the same wiring (unless SHA-256 collides).
Names and the order of the nodes in the file do not count. Everything else does: a value that
is read twice, computed twice or read from a sibling gives three different digests.

Leaves. Every use of a weight is a `Leaf` of its own, which holds its type and shape only.
Exporters merge equal weights, so whether two operators share one depends on the values.
Constants that steer the computation (shapes, axes, indices, scalars) keep their values.

Digest. It is computed in linear time:

    1. Walk depth first from the outputs, through the inputs of each node in their order.
       Number each node when all its inputs have numbers (post-order).
    2. Write one line per node in this order: operator, attributes, inputs by number, output count.
    3. Hash the graph's inputs, the lines, the graph's outputs by number, and the node hashes of
       the nodes that no output needs.

The inputs and the outputs of a graph are ordered, and so are the inputs of each node. The walk
therefore never has a choice, and equal graphs get equal numbers. The lines determine the graph up
to names, so equal lists of lines mean equal graphs. General graphs have no canonical form that is
known to be computable in polynomial time; ordered graphs have one (Jiang and Bunke 1999).

Node hashes. `Graph.hashes` are Merkle hashes: a node's hash covers its operator, its attributes and
the hashes of its inputs. They find where two graphs begin to differ. They are weaker than the
digest, because they do not distinguish a value that is read twice from one that is computed twice.
The digest has this weakness only for nodes that no output needs. A Weisfeiler-Lehman hash, as
networkx computes it, is weaker still: it ignores the order of inputs, and some different graphs
share it.

Sources:
    R. Tarjan, Depth-first search and linear graph algorithms, SIAM Journal on Computing 1, 1972
    R. Merkle, A digital signature based on a conventional encryption function, CRYPTO 1987
    X. Jiang and H. Bunke, Optimal quadratic-time isomorphism of ordered graphs, Pattern
        Recognition 32, 1999
    N. Shervashidze et al., Weisfeiler-Lehman graph kernels, JMLR 12, 2011
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from command import BadInput


class GraphError(BadInput):
    """The graph cannot be read or split."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A constant that a node reads: a weight, or a value that steers the computation."""

    dtype: str
    """Element type, as the file's format names it."""
    shape: tuple[int, ...]
    """Extent of each dimension; empty for a scalar."""
    value: str | None = None
    """The value's `constant_text`; None for a weight."""


@dataclass(frozen=True, slots=True)
class Input:
    """A reference to one of the graph's inputs."""

    index: int
    """Position among the graph's inputs, from 0."""


@dataclass(frozen=True, slots=True)
class Output:
    """A reference to one of the outputs of a node."""

    node: int
    """Position of the node in `Graph.nodes`."""
    index: int
    """Position among the outputs of the node, from 0."""


_BYTES = {
    "float": 4,
    "f32": 4,
    "float16": 2,
    "f16": 2,
    "bfloat16": 2,
    "bf16": 2,
    "double": 8,
    "f64": 8,
    "int64": 8,
    "i64": 8,
    "int32": 4,
    "i32": 4,
    "int8": 1,
    "i8": 1,
    "uint8": 1,
    "u8": 1,
    "bool": 1,
    "boolean": 1,
}
"""Bytes per element of the types that weights have, by ONNX's and by OpenVINO's names."""

Value = Leaf | Input | Output | None
"""A value that a node reads; None is an optional input that is left out."""


@dataclass(frozen=True, slots=True)
class Node:
    """One use of an operator."""

    operator: str
    """Name of the operator, with its version where one file can hold several."""
    attributes: tuple[tuple[str, str], ...]
    """Name and value of each attribute, sorted by name."""
    inputs: tuple[Value, ...]
    """Values that the node reads, in the operator's order."""
    output_count: int
    """Number of values that the node computes."""
    name: str
    """Module path of the code that made the node, as /bert/encoder/layer.0/…; never hashed."""


@dataclass(frozen=True)
class Graph:
    """A model's graph: operators and their wiring, without names and without weights."""

    inputs: tuple[str, ...]
    """Type and shape of each input."""
    nodes: tuple[Node, ...]
    """Nodes in topological order: each one follows the nodes that it reads."""
    outputs: tuple[Value, ...]
    """Values that the graph returns."""
    hashes: tuple[str, ...] = field(init=False)
    """Merkle hash of each node: equal for nodes that compute the same, whatever their weights."""

    def __post_init__(self) -> None:
        hashes: list[str] = []
        for node in self.nodes:
            hashes.append(_hash(_line(node, hashes)))
        object.__setattr__(self, "hashes", tuple(hashes))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form, in hexadecimal."""
        order = self._post_order()
        numbers = {node: number for number, node in enumerate(order)}
        lines = [_line(self.nodes[node], numbers) for node in order]
        outputs = [_reference(value, numbers) for value in self.outputs]
        unused = [node_hash for node, node_hash in enumerate(self.hashes) if node not in numbers]
        return _hash([self.inputs, lines, outputs, sorted(unused)])

    def _post_order(self) -> list[int]:
        """Return the nodes that the outputs need, in the order in which a walk completes them.

        The stack is explicit, because a deep model exceeds Python's limit of recursion.
        """
        order: dict[int, None] = {}
        stack = list(reversed(_sources(self.outputs)))
        while stack:
            missing = [node for node in _sources(self.nodes[stack[-1]].inputs) if node not in order]
            if missing:
                stack += reversed(missing)
            else:
                order[stack.pop()] = None
        return list(order)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as they are stored; a weight counts once for each use."""
        return sum(_element_count(leaf) * _element_bytes(leaf) for leaf in self._weights())

    @property
    def parameters(self) -> int:
        """Number of elements of all weights; a weight counts once for each use."""
        return sum(map(_element_count, self._weights()))

    def flops_per_token(self) -> int:
        """Return the multiplications and additions by weight matrices for one token.

        Attention's own products are left out, because they grow with the length of the text.
        """
        flops = 0
        for node in self.nodes:
            if node.operator != "MatMul":
                continue
            for value in node.inputs:
                if isinstance(value, Leaf):
                    flops += 2 * _element_count(value)
        return flops

    def _weights(self) -> Iterator[Leaf]:
        """Yield each use of a weight."""
        for node in self.nodes:
            for value in node.inputs:
                if isinstance(value, Leaf) and value.value is None:
                    yield value


def constant_text(content: bytes) -> str:
    """Return a constant's bytes as the canonical form holds them: as they are, or their SHA-256."""
    return content.hex() if len(content) <= 64 else hashlib.sha256(content).hexdigest()


def split(graph: Graph) -> tuple[Graph, Graph]:
    """Return the encoder and the classification head, cut at the encoder's last hidden state.

    The encoder's scope is the first part of most names, as `bert` in /bert/encoder/layer.0/….
    The head is every node of another scope or of the pooler, and every node that follows one.
    Constants that only the head reads go to the head. The cut is valid if exactly one value
    crosses it. GraphError if the nodes have no names, or if the cut is not valid.
    """
    scopes = Counter(scope for node in graph.nodes if (scope := _scope(node)))
    if not scopes:
        raise GraphError(
            "The graph's nodes have no module names, so encoder and head cannot be separated."
            " Export the model again and keep its names."
        )
    encoder_scope, _ = scopes.most_common(1)[0]
    head = _head_nodes(graph, encoder_scope)
    _move_constants_of_head(graph, head)
    crossing = _crossing_values(graph, head)
    hidden_state = next(iter(crossing), None)
    if len(crossing) != 1 or not isinstance(hidden_state, Output):
        raise GraphError(
            f"{len(crossing)} values cross from encoder to head; exactly 1 is expected, the last"
            " hidden state."
        )
    encoder_nodes = [node for node in range(len(graph.nodes)) if node not in head]
    encoder = _subgraph(graph, encoder_nodes, graph.inputs, (hidden_state,), {})
    head_inputs: dict[Value, Value] = {hidden_state: Input(0)}
    return encoder, _subgraph(graph, sorted(head), ("hidden state",), graph.outputs, head_inputs)


def first_differences(a: Graph, b: Graph, limit: int = 5) -> list[tuple[Node | None, Node | None]]:
    """Return the nodes where two graphs begin to differ, paired in running order.

    A node that differs only because of its inputs is left out. None stands where one graph has
    fewer such nodes than the other. At most `limit` pairs are returned.
    """
    only_a = _first_unknown_nodes(a, set(b.hashes))
    only_b = _first_unknown_nodes(b, set(a.hashes))
    return list(zip_longest(only_a, only_b))[:limit]


def layers_only_in(b: Graph, a: Graph) -> list[str]:
    """Return the names of the layers that b has and a has not, as /bert/encoder/layer.4.

    The name of the model at the front is ignored, so /electra/encoder/layer.1 is no further layer
    where a has /bert/encoder/layer.1.
    """
    known = _layers(a)
    return [name for path, name in _layers(b).items() if path not in known]


def _head_nodes(graph: Graph, encoder_scope: str) -> set[int]:
    """Return the nodes outside the encoder's scope, those of its pooler, and all that follow."""
    head: set[int] = set()
    for i, node in enumerate(graph.nodes):
        scope = _scope(node)
        is_outside = scope not in (None, encoder_scope)
        is_pooler = node.name.startswith(f"/{scope}/pooler/")
        if is_outside or is_pooler or _reads(node, head):
            head.add(i)
    return head


def _move_constants_of_head(graph: Graph, head: set[int]) -> None:
    """Add to the head the nodes that only it reads and that read constants alone.

    Such a node, an index for example, may have a name of the encoder's scope or none at all.
    """
    readers: dict[int, set[int]] = {}
    for i, node in enumerate(graph.nodes):
        for source in _sources(node.inputs):
            readers.setdefault(source, set()).add(i)
    for i in reversed(range(len(graph.nodes))):
        reads_constants = all(isinstance(value, Leaf | None) for value in graph.nodes[i].inputs)
        if reads_constants and i in readers and readers[i] <= head:
            head.add(i)


def _crossing_values(graph: Graph, head: set[int]) -> set[Value]:
    """Return the values that the head reads and does not compute, constants left out."""
    crossing: set[Value] = set()
    for i in head:
        for value in graph.nodes[i].inputs:
            is_constant = isinstance(value, Leaf | None)
            is_of_head = isinstance(value, Output) and value.node in head
            if not is_constant and not is_of_head:
                crossing.add(value)
    return crossing


def _subgraph(
    graph: Graph,
    members: Iterable[int],
    inputs: tuple[str, ...],
    outputs: tuple[Value, ...],
    replacements: Mapping[Value, Value],
) -> Graph:
    """Return the graph of some nodes, renumbered, with some of their values replaced."""
    positions = {old: new for new, old in enumerate(members)}

    def moved(value: Value) -> Value:
        if value in replacements:
            return replacements[value]
        if isinstance(value, Output):
            return Output(positions[value.node], value.index)
        return value

    nodes = []
    for i in positions:
        node = graph.nodes[i]
        values = tuple(map(moved, node.inputs))
        nodes.append(replace(node, inputs=values))
    return Graph(inputs, tuple(nodes), tuple(map(moved, outputs)))


def _first_unknown_nodes(graph: Graph, known: set[str]) -> list[Node]:
    """Return the nodes whose hash is not known although the hashes of all their inputs are."""
    unknown = {i for i, node_hash in enumerate(graph.hashes) if node_hash not in known}
    nodes = [graph.nodes[i] for i in sorted(unknown)]
    return [node for node in nodes if not _reads(node, unknown)]


def _layers(graph: Graph) -> dict[str, str]:
    """Return the names of the repeated modules by their paths without the model's name.

    A repeated module is the first part of a name that ends in a number, as `layer.4`.
    """
    names: dict[str, str] = {}
    for node in graph.nodes:
        parts = node.name.split("/")
        for i, part in enumerate(parts[:-1]):
            _, _, number = part.rpartition(".")
            if number.isdigit() and "." in part:
                names["/".join(parts[2 : i + 1])] = "/".join(parts[: i + 1])
                break
    return names


def _scope(node: Node) -> str | None:
    """Return the first part of a node's name, as `bert` of /bert/embeddings/Gather."""
    parts = node.name.split("/")
    return parts[1] if len(parts) > 2 and not parts[0] else None


def _sources(values: Iterable[Value]) -> list[int]:
    """Return the nodes that compute the values, in the order of the values."""
    return [value.node for value in values if isinstance(value, Output)]


def _reads(node: Node, others: Collection[int]) -> bool:
    """Return whether a node reads an output of one of the others."""
    return any(source in others for source in _sources(node.inputs))


def _line(node: Node, known: Mapping[int, int] | Sequence[str]) -> list[Any]:
    """Return what is hashed of a node."""
    inputs = [_reference(value, known) for value in node.inputs]
    return [node.operator, node.attributes, inputs, node.output_count]


def _reference(value: Value, known: Mapping[int, int] | Sequence[str]) -> Any:
    """Return what is hashed of a value; `known` holds the number or the hash of each node."""
    match value:
        case None:
            return None
        case Leaf(dtype, shape, constant):
            return ["leaf", dtype, shape, constant]
        case Input(index):
            return ["input", index]
        case Output(node, index):
            return ["node", known[node], index]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


def _element_bytes(leaf: Leaf) -> int:
    try:
        return _BYTES[leaf.dtype.lower()]
    except KeyError:
        raise GraphError(
            f"Weights of type {leaf.dtype} cannot be counted; the known types are"
            f" {', '.join(_BYTES)}."
        ) from None


def _element_count(leaf: Leaf) -> int:
    return math.prod(leaf.shape)
