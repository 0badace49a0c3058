"""Reads the graph of a model file, whatever its format."""

from __future__ import annotations

from pathlib import Path

from graphs.canonical import Graph, GraphError
from graphs.ir import read_ir
from graphs.onnx import read_onnx


def read_graph(path: Path) -> Graph:
    """Return the canonical graph of an .onnx file, or of an OpenVINO .xml with its .bin.

    GraphError if the file cannot be read, or if it holds something without a canonical form.
    """
    try:
        return read_ir(path) if path.suffix == ".xml" else read_onnx(path)
    except GraphError:
        raise
    except Exception as error:
        # Parsers raise errors of many kinds for a damaged file, each with a message of its own.
        raise GraphError(
            f"{path} cannot be read as a graph: {type(error).__name__}: {error}"
        ) from None
