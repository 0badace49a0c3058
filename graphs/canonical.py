"""
A model's graph without names and without weights, and the digest of it.

Two graphs with one digest run the same operators with the same attributes on the same
shapes and types in the same wiring. Every use of a weight is a leaf of its own that says
type and shape only: exporters merge equal weights, so sharing would depend on their values.
Values that steer the computation (shapes, axes, constants) stay.

    number nodes by a walk from the outputs, depth first, inputs in their order
    digest = H(inputs, (operator, attributes, numbered inputs) of every node, outputs)

For a graph with ordered outputs and ordered inputs this numbering is unique, so names and the
order of the nodes in the file are irrelevant and nothing else is: a value read twice, computed
twice, or read from a sibling gives another digest. Nodes that no output needs are hashed along.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from command import BadInput


class GraphError(BadInput):
    """The graph cannot be read or split."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A constant: type and shape, and its value where it is no weight."""

    dtype: str
    shape: tuple[int, ...]
    value: str | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """The graph's n-th input."""

    index: int


@dataclass(frozen=True, slots=True)
class Output:
    """Output `place` of node `node`."""

    node: int
    place: int


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

Value = Leaf | Input | Output | None


@dataclass(frozen=True, slots=True)
class Node:
    operator: str
    attributes: tuple[tuple[str, str], ...]
    inputs: tuple[Value, ...]
    outputs: int
    """How many values it makes."""
    name: str
    """Where the model's code made it, as /bert/encoder/layer.0/…; for people, never digested."""


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order."""

    inputs: tuple[str, ...]
    """Type and shape of each input."""
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]
    hashes: tuple[str, ...] = field(init=False)
    """Of what each node computes, its inputs included; equal for computations that are equal but
    for their weights.
    """

    def __post_init__(self) -> None:
        hashes: list[str] = []
        for node in self.nodes:
            inputs = [_describe(value, hashes) for value in node.inputs]
            hashes.append(_hash([node.operator, node.attributes, inputs, node.outputs]))
        object.__setattr__(self, "hashes", tuple(hashes))

    @property
    def digest(self) -> str:
        order = self._walk()
        number = {node: i for i, node in enumerate(order)}
        lines = []
        for i in order:
            node = self.nodes[i]
            inputs = [_describe(value, number) for value in node.inputs]
            lines.append([node.operator, node.attributes, inputs, node.outputs])
        outputs = [_describe(value, number) for value in self.outputs]
        unused = sorted(self.hashes[i] for i in range(len(self.nodes)) if i not in number)
        return _hash([self.inputs, lines, outputs, unused])

    def _walk(self) -> list[int]:
        """Nodes as a depth-first walk from the outputs completes them."""
        order: dict[int, None] = {}
        waiting = [v.node for v in reversed(self.outputs) if isinstance(v, Output)]
        while waiting:
            needs = [
                v.node
                for v in self.nodes[waiting[-1]].inputs
                if isinstance(v, Output) and v.node not in order
            ]
            if waiting[-1] in order or not needs:
                order[waiting.pop()] = None
            else:
                waiting += reversed(needs)
        return list(order)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as they are stored, each counted where it is used."""
        return sum(
            _size(value.shape) * _bytes(value.dtype)
            for node in self.nodes
            for value in node.inputs
            if isinstance(value, Leaf) and value.value is None
        )

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(
            _size(value.shape)
            for node in self.nodes
            for value in node.inputs
            if isinstance(value, Leaf) and value.value is None
        )

    def flops_per_token(self) -> int:
        """Multiplications and additions by weight matrices for one token; attention's own products,
        which grow with length, are not among them.
        """
        flops = 0
        for node in self.nodes:
            if node.operator == "MatMul":
                flops += sum(
                    2 * _size(value.shape) for value in node.inputs if isinstance(value, Leaf)
                )
        return flops


def split(graph: Graph) -> tuple[Graph, Graph]:
    """Encoder and classification head, cut where the encoder's last hidden state leaves it.

    The head is everything whose name lies outside the encoder's scope, the pooler, and
    what follows them. Raises GraphError if more than one value crosses the cut.
    """
    scopes = Counter(scope for node in graph.nodes if (scope := _scope(node)))
    if not scopes:
        raise GraphError(
            "The graph's nodes carry no module names, so encoder and head cannot be told apart."
        )
    encoder_scope, _ = scopes.most_common(1)[0]
    head = _head_nodes(graph, encoder_scope)
    _give_to_head_what_only_it_uses(graph, head)
    crossing = _crossing_values(graph, head)
    hidden_state = next(iter(crossing), None)
    if len(crossing) != 1 or not isinstance(hidden_state, Output):
        raise GraphError(
            f"{len(crossing)} values cross from encoder to head; one, the last hidden state, is"
            " expected."
        )
    encoder_nodes = [i for i in range(len(graph.nodes)) if i not in head]
    encoder = _part(graph, encoder_nodes, graph.inputs, (hidden_state,), {})
    input_of_head: dict[Value, Value] = {hidden_state: Input(0)}
    return encoder, _part(graph, sorted(head), ("hidden state",), graph.outputs, input_of_head)


def _head_nodes(graph: Graph, encoder_scope: str) -> set[int]:
    """Return the nodes outside the encoder's scope, those of its pooler, and all that follow."""
    head: set[int] = set()
    for i, node in enumerate(graph.nodes):
        scope = _scope(node)
        is_outside = scope is not None and scope != encoder_scope
        is_pooler = scope is not None and node.name.startswith(f"/{scope}/pooler/")
        if is_outside or is_pooler or _follows(node, head):
            head.add(i)
    return head


def _follows(node: Node, others: set[int]) -> bool:
    """Return whether a node reads an output of one of the others."""
    return any(isinstance(value, Output) and value.node in others for value in node.inputs)


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


def _give_to_head_what_only_it_uses(graph: Graph, head: set[int]) -> None:
    users: dict[int, set[int]] = {}
    for i, node in enumerate(graph.nodes):
        for value in node.inputs:
            if isinstance(value, Output):
                users.setdefault(value.node, set()).add(i)
    for i in reversed(range(len(graph.nodes))):
        # A value the head computes from constants alone, an index say, carries no name.
        if (
            i not in head
            and users.get(i)
            and users[i] <= head
            and all(isinstance(v, Leaf | None) for v in graph.nodes[i].inputs)
        ):
            head.add(i)


def _part(
    graph: Graph,
    members: Iterable[int],
    inputs: tuple[str, ...],
    outputs: tuple[Value, ...],
    replaced: dict[Value, Value],
) -> Graph:
    new: dict[int, int] = {old: i for i, old in enumerate(members)}

    def moved(value: Value) -> Value:
        if value in replaced:
            return replaced[value]
        return Output(new[value.node], value.place) if isinstance(value, Output) else value

    nodes = []
    for old in new:
        node = graph.nodes[old]
        moved_inputs = tuple(map(moved, node.inputs))
        nodes.append(Node(node.operator, node.attributes, moved_inputs, node.outputs, node.name))
    return Graph(inputs, tuple(nodes), tuple(map(moved, outputs)))


def first_differences(a: Graph, b: Graph, most: int = 5) -> list[tuple[Node | None, Node | None]]:
    """Pairs of nodes, in running order, where the two graphs begin to differ; what follows a
    difference is not one.
    """
    only_a, only_b = _roots(a, set(b.hashes)), _roots(b, set(a.hashes))
    width = max(len(only_a), len(only_b))
    padded_a: list[Node | None] = [*only_a, *[None] * (width - len(only_a))]
    padded_b: list[Node | None] = [*only_b, *[None] * (width - len(only_b))]
    return list(zip(padded_a, padded_b, strict=True))[:most]


def _roots(graph: Graph, known: set[str]) -> list[Node]:
    unknown = {i for i, digest in enumerate(graph.hashes) if digest not in known}
    nodes = [graph.nodes[i] for i in sorted(unknown)]
    return [node for node in nodes if not _follows(node, unknown)]


def layers_only_in(b: Graph, a: Graph) -> list[str]:
    """Names of the repeated modules, as /bert/encoder/layer.4, that b has and a has not, whatever
    their models are called.
    """

    def layers(graph: Graph) -> dict[str, str]:
        found: dict[str, str] = {}
        for node in graph.nodes:
            parts = node.name.split("/")
            for i, part in enumerate(parts):
                if part.rpartition(".")[2].isdigit() and "." in part and i < len(parts) - 1:
                    found["/".join(parts[2 : i + 1])] = "/".join(parts[: i + 1])
                    break
        return found

    there = layers(a)
    return [name for place, name in layers(b).items() if place not in there]


def _scope(node: Node) -> str | None:
    parts = node.name.split("/")
    return parts[1] if len(parts) > 2 and not parts[0] else None


def _describe(value: Value, known: Mapping[int, int] | Sequence[str]) -> Any:
    """A value by its node's number, or by its node's hash."""
    match value:
        case None:
            return None
        case Leaf(dtype, shape, constant):
            return ["leaf", dtype, shape, constant]
        case Input(index):
            return ["input", index]
        case Output(node, place):
            return ["node", known[node], place]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


def _bytes(dtype: str) -> int:
    try:
        return _BYTES[dtype.lower()]
    except KeyError:
        raise GraphError(
            f"Weights of type {dtype} are not known here; known are {', '.join(_BYTES)}."
        ) from None


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
