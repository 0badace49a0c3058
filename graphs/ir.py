"""
Reads an OpenVINO IR (.xml beside its .bin) into its canonical graph.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from xml.etree import ElementTree

from graphs.canonical import Graph, GraphError, Input, Leaf, Node, Output, Value

# Attributes that hold names or places in the weight file.
_NAMES = {"offset", "output_names", "friendly_name"}


def read_ir(path: Path) -> Graph:
    root = ElementTree.parse(path).getroot()
    weights = path.with_suffix(".bin").read_bytes()
    layers = {layer.attrib["id"]: layer for layer in root.iterfind("layers/layer")}
    sources = {
        (edge.attrib["to-layer"], edge.attrib["to-port"]): (
            edge.attrib["from-layer"],
            edge.attrib["from-port"],
        )
        for edge in root.iterfind("edges/edge")
    }
    values: dict[str, Value] = {}
    inputs: list[str] = []
    nodes: list[Node] = []
    outputs: list[Value] = []

    def read(layer_id: str, port: str) -> Value:
        value = values[layer_id]
        if isinstance(value, Output):
            ports = [p.attrib["id"] for p in layers[layer_id].iterfind("output/port")]
            return Output(value.node, ports.index(port))
        return value

    learned = _quantisation_ranges(layers, sources)
    for layer_id in _ordered(layers, sources):
        layer = layers[layer_id]
        if layer.find("body") is not None:
            raise GraphError(
                f"Layer {layer.attrib['name']!r} holds a graph; control flow has no canonical form"
                " here."
            )
        data = layer.find("data")
        attributes = {} if data is None else dict(data.attrib)
        operator = f"{layer.attrib.get('version', '')}::{layer.attrib['type']}"
        kind = layer.attrib["type"]
        read_from = [read(*sources[layer_id, p.attrib["id"]]) for p in layer.iterfind("input/port")]
        if kind == "Const":
            offset, length = int(attributes["offset"]), int(attributes["size"])
            values[layer_id] = _leaf(
                attributes, weights[offset : offset + length], layer_id in learned
            )
        elif kind == "Parameter":
            values[layer_id] = Input(len(inputs))
            inputs.append(f"{attributes['element_type']} [{attributes['shape']}]")
        elif kind == "Result":
            outputs.append(read_from[0])
        elif (
            kind == "Convert"
            and isinstance(read_from[0], Leaf)
            and read_from[0].dtype in ("f16", "bf16")
        ):
            # Constants kept in 16 bits are widened where they are used; that is storage, not
            # computation.
            values[layer_id] = read_from[0]
        else:
            kept = tuple(sorted((k, v) for k, v in attributes.items() if k not in _NAMES))
            nodes.append(
                Node(
                    operator if kind != "MatMul" else kind,
                    kept,
                    tuple(read_from),
                    len(layer.findall("output/port")),
                    layer.attrib["name"],
                )
            )
            values[layer_id] = Output(len(nodes) - 1, 0)
    return Graph(tuple(inputs), tuple(nodes), tuple(outputs))


def _quantisation_ranges(
    layers: dict[str, ElementTree.Element], sources: dict[tuple[str, str], tuple[str, str]]
) -> set[str]:
    """Constants that say between which numbers a value is rounded: scalars, but learned from texts
    as weights are.
    """
    found = set()
    for layer_id, layer in layers.items():
        if layer.attrib["type"] == "FakeQuantize":
            for port in layer.findall("input/port")[1:]:
                source = sources[layer_id, port.attrib["id"]][0]
                if layers[source].attrib["type"] == "Convert":
                    source = sources[source, layers[source].findall("input/port")[0].attrib["id"]][
                        0
                    ]
                found.add(source)
    return found


def _leaf(attributes: dict[str, str], raw: bytes, learned: bool) -> Leaf:
    """Integers and scalars steer the computation and keep their value; other constants are
    weights.
    """
    shape = tuple(
        int(extent) for extent in attributes["shape"].replace(" ", "").split(",") if extent
    )
    integer = attributes["element_type"].startswith(("i", "u", "boolean"))
    steers = not learned and (not shape or (integer and len(shape) <= 1))
    value = (raw.hex() if len(raw) <= 64 else hashlib.sha256(raw).hexdigest()) if steers else None
    return Leaf(attributes["element_type"], shape, value)


def _ordered(
    layers: dict[str, ElementTree.Element], sources: dict[tuple[str, str], tuple[str, str]]
) -> list[str]:
    """Layer ids so that each follows what it reads."""
    ordered: dict[str, None] = {}
    waiting = list(reversed(layers))
    while waiting:
        layer = waiting[-1]
        needs = [sources[layer, p.attrib["id"]][0] for p in layers[layer].iterfind("input/port")]
        missing = [need for need in needs if need not in ordered]
        if missing and layer not in ordered:
            waiting += missing
        else:
            ordered[waiting.pop()] = None
    return list(ordered)
