"""Reads an OpenVINO IR (an .xml file and the .bin file next to it) into its canonical graph.

The format: https://docs.openvino.ai/latest/openvino_ir.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from graphs.canonical import Graph, GraphError, Input, Leaf, Node, Output, Value, constant_text

Port = tuple[str, str]
"""Id of a layer, and id of one of its ports."""

# Attributes that hold names, or a position in the weight file.
_IGNORED_ATTRIBUTES = {"offset", "output_names", "friendly_name"}
_HALF_PRECISION = ("f16", "bf16")


@dataclass(frozen=True)
class _Ir:
    """The content of an IR, not yet interpreted."""

    layers: dict[str, ElementTree.Element]
    """Layers by id, in the order of the file."""
    sources: dict[Port, Port]
    """The output port that feeds each input port."""
    weights: bytes
    """The content of the .bin file."""

    @classmethod
    def load(cls, path: Path) -> _Ir:
        root = ElementTree.parse(path).getroot()
        layers: dict[str, ElementTree.Element] = {}
        for layer in root.iterfind("layers/layer"):
            layers[layer.attrib["id"]] = layer
        sources: dict[Port, Port] = {}
        for edge in root.iterfind("edges/edge"):
            ends = edge.attrib
            reader = (ends["to-layer"], ends["to-port"])
            sources[reader] = (ends["from-layer"], ends["from-port"])
        weights = path.with_suffix(".bin").read_bytes()
        return cls(layers, sources, weights)

    def kind(self, layer_id: str) -> str:
        return self.layers[layer_id].attrib["type"]

    def data(self, layer_id: str) -> dict[str, str]:
        """Return a layer's attributes."""
        data = self.layers[layer_id].find("data")
        return {} if data is None else dict(data.attrib)

    def inputs(self, layer_id: str) -> list[Port]:
        """Return the output ports that a layer reads, in the order of its input ports."""
        ports: list[Port] = []
        for port in self.layers[layer_id].iterfind("input/port"):
            reader = (layer_id, port.attrib["id"])
            ports.append(self.sources[reader])
        return ports

    def outputs(self, layer_id: str) -> list[Port]:
        """Return the output ports of a layer, in order."""
        ports: list[Port] = []
        for port in self.layers[layer_id].iterfind("output/port"):
            ports.append((layer_id, port.attrib["id"]))
        return ports

    def topological_order(self) -> list[str]:
        """Return the ids of the layers, each after the layers that it reads."""
        order: dict[str, None] = {}
        stack = list(reversed(self.layers))
        while stack:
            missing = [source for source, _ in self.inputs(stack[-1]) if source not in order]
            if missing:
                stack += missing
            else:
                order[stack.pop()] = None
        return list(order)

    def quantization_ranges(self) -> set[str]:
        """Return the constants that bound the values which a FakeQuantize layer rounds.

        They are scalars, but calibrated on texts, so they count as weights.
        """
        ranges: set[str] = set()
        for layer_id in self.layers:
            if self.kind(layer_id) != "FakeQuantize":
                continue
            _, *bounds = self.inputs(layer_id)
            for source, _ in bounds:
                if self.kind(source) == "Convert":
                    [(source, _)] = self.inputs(source)
                ranges.add(source)
        return ranges

    def constant(self, layer_id: str, *, is_weight: bool) -> Leaf:
        """Return a Const layer; without its value where it is a weight by use or by type.

        Scalars and integer vectors steer the computation; other constants are weights.
        """
        data = self.data(layer_id)
        dtype = data["element_type"]
        extents = data["shape"].replace(" ", "").split(",")
        shape = tuple(int(extent) for extent in extents if extent)
        is_scalar = not shape
        is_integer = dtype.startswith(("i", "u", "boolean"))
        steers = is_scalar or (is_integer and len(shape) == 1)
        if is_weight or not steers:
            return Leaf(dtype, shape)
        start = int(data["offset"])
        end = start + int(data["size"])
        content = self.weights[start:end]
        return Leaf(dtype, shape, constant_text(content))

    def node(self, layer_id: str, inputs: tuple[Value, ...]) -> Node:
        layer = self.layers[layer_id]
        operator = self.kind(layer_id)
        # `Graph.flops_per_token` counts MatMul by ONNX's name, which has no version.
        if operator != "MatMul":
            version = layer.attrib.get("version", "")
            operator = f"{version}::{operator}"
        attributes = self.data(layer_id)
        for name in _IGNORED_ATTRIBUTES:
            attributes.pop(name, None)
        return Node(
            operator,
            tuple(sorted(attributes.items())),
            inputs,
            len(self.outputs(layer_id)),
            layer.attrib["name"],
        )


def read_ir(path: Path) -> Graph:
    """Return the canonical graph of an OpenVINO IR; GraphError if it has control flow."""
    ir = _Ir.load(path)
    ranges = ir.quantization_ranges()
    values: dict[Port, Value] = {}
    inputs: list[str] = []
    nodes: list[Node] = []
    results: list[Value] = []
    for layer_id in ir.topological_order():
        _refuse_control_flow(ir.layers[layer_id])
        read = tuple(values[port] for port in ir.inputs(layer_id))
        ports = ir.outputs(layer_id)
        kind = ir.kind(layer_id)
        if kind == "Const":
            constant = ir.constant(layer_id, is_weight=layer_id in ranges)
            values |= dict.fromkeys(ports, constant)
        elif kind == "Parameter":
            values |= dict.fromkeys(ports, Input(len(inputs)))
            data = ir.data(layer_id)
            inputs.append(f"{data['element_type']} [{data['shape']}]")
        elif kind == "Result":
            results.append(read[0])
        elif kind == "Convert" and isinstance(read[0], Leaf) and read[0].dtype in _HALF_PRECISION:
            # A constant that is stored in 16 bits is widened where it is used. That is storage,
            # not computation.
            values |= dict.fromkeys(ports, read[0])
        else:
            for index, port in enumerate(ports):
                values[port] = Output(len(nodes), index)
            nodes.append(ir.node(layer_id, read))
    return Graph(tuple(inputs), tuple(nodes), tuple(results))


def _refuse_control_flow(layer: ElementTree.Element) -> None:
    if layer.find("body") is not None:
        raise GraphError(
            f"Layer {layer.attrib['name']!r} holds a graph of its own; control flow has no"
            " canonical form."
        )
