"""
The forms in which an artifact's graph can be run by OpenVINO: with several texts in a row, with a
last layer for first tokens only, or as it was exported.

`graph_digest` identifies a form by its structure, as `encoder_digest` does for the exported graph:
evidence of a time holds only for the graph that was run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov

from service.batching.shapes import CPU, PACKED, Grid
from service.runtimes.narrowed import narrow_rows
from service.runtimes.packed import NotPackable, pack

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """One form of a graph."""

    graph: ov.Model
    grid: Grid
    digest: str
    """Digest of the graph, which compiling may change."""
    log_without: Callable[[str], None] | None
    """Logs what is lost if the form cannot be run, and why; None for the last one."""


def forms(model: Path, packs: bool, narrows: bool) -> Iterator[Form]:
    """Yield the forms that a graph can take, the fastest first; the last is as it was exported.

    With `packs` a row may hold several texts, and with `narrows` the last layer is computed for
    first tokens only, if the graph allows it. Why it does not is logged.
    """
    if packs:
        packed = ov.Core().read_model(model)
        try:
            pack(packed, narrows)
            yield Form(packed, PACKED, graph_digest(packed), _log_without_packing)
        except NotPackable as error:
            _log_without_packing(f"the graph is not known: {error}")
        except Exception as error:  # It only saves time: unpacked answers are right too.
            _log_without_packing(f"{type(error).__name__}: {error}")
    if narrows:
        narrowed = ov.Core().read_model(model)
        try:
            if narrow_rows(narrowed):
                yield Form(narrowed, CPU, graph_digest(narrowed), _log_without_narrowing)
        except Exception as error:
            _log_without_narrowing(f"{type(error).__name__}: {error}")
    exported = ov.Core().read_model(model)
    yield Form(exported, CPU, graph_digest(exported), None)


def _log_without_packing(why: str) -> None:
    log.warning("every text has a row of its own", extra={"why": why})


def _log_without_narrowing(why: str) -> None:
    log.warning("the last layer is computed for every token", extra={"why": why})


def graph_digest(graph: ov.Model) -> str:
    """Return a SHA-256 of a graph's structure, in hex.

    It covers operators with their attributes, types, shapes and order, what each reads, and integer
    constants such as axes; not the values of weights, and no names. Other releases of OpenVINO may
    read a file as another graph.
    """
    digest = hashlib.sha256()
    places: dict[str, int] = {}
    for place, node in enumerate(graph.get_ordered_ops()):
        places[node.get_friendly_name()] = place
        sources = [node.input_value(i) for i in range(node.get_input_size())]
        described = (
            node.get_type_name(),
            _attributes(node),
            [
                (str(output.get_element_type()), str(output.get_partial_shape()))
                for output in node.outputs()
            ],
            [(places[each.get_node().get_friendly_name()], each.get_index()) for each in sources],
        )
        digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _attributes(node: ov.Node) -> dict[str, Any]:
    """Return an operator's attributes; of a constant its values, if they are no weights."""
    if node.get_type_name() != "Constant":
        attributes: dict[str, Any] = node.get_attributes()
        return attributes
    if node.get_element_type() in (ov.Type.i32, ov.Type.i64):
        return {"values": node.get_data().tolist()}
    return {}
