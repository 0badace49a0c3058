"""
Merges the graphs of several classifiers into one, in which what they have in common is computed
once.

Classifiers on a frozen encoder share its whole graph, whatever their family, and each adds its
head. The logits are those of all heads, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx
from onnx import AttributeProto, GraphProto, NodeProto
from onnx.helper import make_node

from command import BadInput
from graphs.values import value_digests

LABELS = 1
"""Axis of the labels in logits, (B, labels)."""


def merge(models: Sequence[onnx.ModelProto], names: Sequence[str], labels: int) -> onnx.ModelProto:
    """Return one graph with the logits of all models, (B, labels), in their order.

    `names` are those of the heads; they name the nodes and weights that only one model has.
    `labels` is the number of labels of all. The models were checked by `check_mergeable`.
    """
    first = models[0]
    merged = onnx.ModelProto()
    merged.CopyFrom(first)
    logits = [_rename_output(merged.graph, names[0])]
    known = _Known()
    known.add(merged.graph)
    for model, name in zip(models[1:], names[1:], strict=True):
        logits.append(_add(merged.graph, model.graph, name, known))
    output = merged.graph.output[0]
    merged.graph.node.append(
        make_node("Concat", logits, [output.name], name="/heads/Concat", axis=LABELS)
    )
    output.type.tensor_type.shape.dim[LABELS].dim_value = labels
    return merged


def check_mergeable(models: Sequence[onnx.ModelProto], names: Sequence[str]) -> None:
    """Raise BadInput for graphs with other inputs or operators than the first, or with branches."""
    first = models[0]
    for model, name in zip(models, names, strict=True):
        read = [_inputs(other) for other in (model, first)]
        if read[0] != read[1]:
            raise BadInput(
                f"The head {name} reads {', '.join(read[0])} and the first one"
                f" {', '.join(read[1])}; heads of one model read the same."
            )
        versions = [
            {each.domain: each.version for each in other.opset_import} for other in (model, first)
        ]
        if versions[0] != versions[1]:
            raise BadInput(
                f"The graph of the head {name} is for another version of ONNX's operators than the"
                " first one; export both with the same version."
            )
        has_branches = any(
            attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)
            for node in model.graph.node
            for attribute in node.attribute
        )
        if has_branches:
            raise BadInput(f"The graph of the head {name} has branches, which cannot be merged.")


def _inputs(model: onnx.ModelProto) -> list[str]:
    """Return the names of a graph's inputs; weights may be listed among them."""
    weights = {each.name for each in model.graph.initializer}
    return [each.name for each in model.graph.input if each.name not in weights]


def _rename_output(graph: GraphProto, name: str) -> str:
    """Give the value of the only output another name, and return it."""
    old, new = graph.output[0].name, f"heads.{name}/{graph.output[0].name}"
    for node in graph.node:
        node.input[:] = [new if value == old else value for value in node.input]
        node.output[:] = [new if value == old else value for value in node.output]
    return new


@dataclass
class _Known:
    """The values of a graph by what they are: two are equal if their digests are."""

    values: dict[bytes, list[str]] = field(default_factory=dict)
    """Names of the values that are the same."""

    def add(self, graph: GraphProto) -> None:
        """Add the values of a graph."""
        for name, digest in value_digests(graph).items():
            self.values.setdefault(digest, []).append(name)

    def find(self, digest: bytes, name: str) -> str | None:
        """Return the value of that digest; that name, if there are several. None: there is none."""
        same = self.values.get(digest, [])
        return name if name in same else next(iter(same), None)


def _add(merged: GraphProto, graph: GraphProto, name: str, known: _Known) -> str:
    """Add what a graph does not share to the merged one; return the name of its output there."""
    identities = value_digests(graph)
    weights = {each.name: each for each in graph.initializer}
    names: dict[str, str] = {"": ""}
    new: dict[str, str] = {}
    """Values that were added, by their names in `graph`."""

    def place(value: str) -> str:
        """Return the name of a value that a node reads, and add the weight that it is."""
        if value not in names:
            shared = known.find(identities[value], value)
            if shared is None:
                shared = new[value] = f"heads.{name}/{value.removeprefix('/')}"
                weight = merged.initializer.add()
                weight.CopyFrom(weights[value])
                weight.name = shared
            names[value] = shared
        return names[value]

    for node in graph.node:
        outputs = [value for value in node.output if value]
        if all(known.find(identities[value], value) is not None for value in outputs):
            continue
        merged.node.append(_renamed(node, name, [place(value) for value in node.input]))
        for value, output in zip(node.output, merged.node[-1].output, strict=True):
            if value:
                names[value] = new[value] = output
    for value, added in new.items():
        known.values.setdefault(identities[value], []).append(added)
    return place(graph.output[0].name)


def _renamed(node: NodeProto, name: str, inputs: Sequence[str]) -> NodeProto:
    """Return a node of a head's own; its scope is that of the head, and not the encoder's."""
    renamed = NodeProto()
    renamed.CopyFrom(node)
    own_name = node.name or node.output[0]
    renamed.name = f"/heads.{name}/{own_name.removeprefix('/')}"
    renamed.input[:] = inputs
    renamed.output[:] = [
        f"heads.{name}/{value.removeprefix('/')}" if value else "" for value in node.output
    ]
    return renamed
