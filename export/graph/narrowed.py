"""
Changes an ONNX graph so that its last layer is computed only for the first token of each text, the
only one that the answer reads.

What is computed token by token (products with weights, sums, normalisations) can be computed for
the first token alone. `narrow` follows the hidden states back through such operators. Where they
meet what needs every token, as an attention does, the first token is taken. For OpenVINO the
service does the same when it loads a graph, queries included: service/runtimes/narrowed.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper
from onnx.helper import make_node

TOKENS = 1
"""Axis of the tokens in hidden states, (B, L, D)."""
ELEMENTWISE = frozenset(
    {"Abs", "Add", "BiasGelu", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "FastGelu", "Gelu"}
    | {"HardSwish", "Identity", "LeakyRelu", "Max", "Min", "Mul", "Neg", "Pow", "QuickGelu"}
    | {"Relu", "Sigmoid", "Sqrt", "Sub", "Tanh"}
)
"""Operators whose results depend only on the numbers in the same place of each input."""
INDEX = "first_token_index"


def narrow(model: onnx.ModelProto) -> bool:
    """Narrow a graph in place, whose nodes are in topological order; return whether it changed.

    A graph stays as it is if its answer reads more of a text than its first token.
    """
    values = _Values.of(model)
    for choice in reversed(model.graph.node):
        if values.takes_first_token(choice):
            plan = _plan(model, values, choice)
            if any(node.op_type == "MatMul" for node in plan.nodes):
                _apply(model, plan)
                return True
    return False


@dataclass(frozen=True)
class _Values:
    """What is known of a graph's values, by their names."""

    constants: Mapping[str, onnx.TensorProto]
    ranks: Mapping[str, int]
    """Number of dimensions, where it is known."""
    readers: Mapping[str, list[NodeProto]]
    """Nodes that read a value."""
    outputs: frozenset[str]
    """Values that the graph returns."""

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Values:
        try:
            graph = onnx.shape_inference.infer_shapes(model).graph
        except onnx.shape_inference.InferenceError:  # It does not know fused operators.
            graph = model.graph
        constants = {each.name: each for each in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                constants[node.output[0]] = node.attribute[0].t
        ranks = {
            each.name: len(each.type.tensor_type.shape.dim)
            for each in (*graph.value_info, *graph.input, *graph.output)
            if each.type.tensor_type.HasField("shape")
        }
        readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                readers[name].append(node)
        return cls(constants, ranks, readers, frozenset(each.name for each in graph.output))

    def takes_first_token(self, node: NodeProto) -> bool:
        """Return whether a node takes the first token of hidden states: (B, D) of (B, L, D)."""
        if node.op_type != "Gather" or _attribute(node, "axis", 0) != TOKENS:
            return False
        index = self.constants.get(node.input[1])
        # A number, not a list of one, which would keep the dimension.
        if index is None or index.dims or numpy_helper.to_array(index) != 0:
            return False
        return self.ranks.get(node.input[0], 3) == 3

    def tokenwise_inputs(self, node: NodeProto) -> list[str] | None:
        """Return which inputs of a node are read token by token; None if the node needs more.

        The others are constants.
        """
        inputs = [name for name in node.input if name]
        varying = [name for name in inputs if name not in self.constants]
        if node.op_type == "MatMul":
            return varying if varying == inputs[:1] else None
        if node.op_type == "LayerNormalization":
            is_last = _attribute(node, "axis", -1) in (-1, 2)
            return varying if is_last and varying == inputs[:1] else None
        if node.op_type == "SkipLayerNormalization":
            return varying if varying == inputs[:2] else None
        if node.op_type not in ELEMENTWISE or not varying:
            return None
        has_rows = any(
            len(self.constants[name].dims) > 1 for name in inputs if name in self.constants
        )
        if (len(varying) > 1 or has_rows) and any(self.ranks.get(name) != 3 for name in varying):
            return None
        is_same_for_all_tokens = all(
            len(constant.dims) < 2 or constant.dims[-2] == 1
            for constant in (self.constants[name] for name in inputs if name in self.constants)
        )
        return varying if is_same_for_all_tokens else None


@dataclass(frozen=True)
class _Plan:
    """What is computed for first tokens only."""

    nodes: list[NodeProto]
    """The nodes, last one first."""
    taken: list[str]
    """Values that they read, and that stay whole: their first tokens are taken."""


def _plan(model: onnx.ModelProto, values: _Values, choice: NodeProto) -> _Plan:
    """Follow the hidden states back from where their first token is taken."""
    nodes: list[NodeProto] = []
    read_by = {_name(choice): [choice.input[0]]}
    wanted = {choice.input[0]: None}

    def is_read_whole(name: str) -> bool:
        return name in values.outputs or any(
            name not in read_by.get(_name(reader), []) for reader in values.readers[name]
        )

    # Backwards: every reader of a node is known before the node itself.
    for node in reversed(model.graph.node):
        if wanted.keys().isdisjoint(node.output):
            continue
        inputs = values.tokenwise_inputs(node)
        if inputs is None or any(is_read_whole(name) for name in node.output if name):
            continue
        nodes.append(node)
        read_by[_name(node)] = inputs
        wanted |= dict.fromkeys(inputs)
    computed = {name for node in nodes for name in node.output}
    return _Plan(nodes, [name for name in wanted if name not in computed])


def _apply(model: onnx.ModelProto, plan: _Plan) -> None:
    """Take the first tokens of what stays whole, and let the planned nodes read these."""
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), INDEX))
    for value in plan.taken:
        first = f"{value}/first_token"
        reading = [node for node in plan.nodes if value in node.input]
        places = {_name(node): place for place, node in enumerate(graph.node)}
        place = min(places[_name(node)] for node in reading)
        graph.node.insert(
            place, make_node("Gather", [value, INDEX], [first], name=first, axis=TOKENS)
        )
        for node in reading:
            node.input[:] = [first if name == value else name for name in node.input]
    # Their recorded shapes are those of all tokens.
    changed = {name for node in plan.nodes for name in node.output}
    unchanged = [each for each in graph.value_info if each.name not in changed]
    del graph.value_info[:]
    graph.value_info.extend(unchanged)


def _name(node: NodeProto) -> str:
    """Return what identifies a node: the name of its first output."""
    return str(node.output[0])


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((each.i for each in node.attribute if each.name == name), default)
