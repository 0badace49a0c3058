"""
Count the subnormal numbers of artifacts: among their weights and among all that they compute.

    python -m benchmarks subnormals artifacts/bert artifacts/drbert

Every float that a node of model.onnx computes is an output here. Nothing is fused and nothing is
flushed to zero, so the count describes the graph and not an engine. It includes the numbers
computed for padding, because an engine computes those as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.harness.texts import TEXTS
from command import Parser, Unavailable
from graphs.subnormals import count_subnormal_weights, count_subnormals
from service.artifact import Artifact, read_artifact
from service.batching.shapes import CPU
from service.classifier import Classifier
from service.runtimes import Inputs, Logits


class CountingRuntime:
    """A runtime that computes a graph node by node and counts the numbers."""

    name = "onnxruntime"
    device = "CPU"
    precision = "f32"
    flush_to_zero = False
    computes_in = "f32"
    graph_digest: str | None = None
    in_flight = 1
    grid = CPU

    def __init__(self, model: Path) -> None:
        self.numbers = 0
        """Floats computed so far."""
        self.subnormals: Counter[str] = Counter()
        """Subnormal floats by the name of the node that computed them."""
        graph = onnx.load(model)
        nodes = {name: node.name for node in graph.graph.node for name in node.output if name}
        answers = {value.name for value in graph.graph.output}
        graph.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(name) for name in nodes if name not in answers
        )
        self._nodes = [nodes.get(value.name, value.name) for value in graph.graph.output]
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        """Compute a batch, count its numbers, and return a function that returns its logits."""
        values = self._session.run(None, dict(inputs))
        for node, value in zip(self._nodes, values, strict=True):
            if value.dtype in (np.float32, np.float64):
                self.numbers += value.size
                self.subnormals[node] += count_subnormals(value)
        logits: Logits = values[0]
        return lambda: logits


def count(artifact: Artifact, texts: Sequence[str]) -> CountingRuntime:
    """Classify each text alone and return the runtime that counted."""
    runtime = CountingRuntime(artifact.path("model.onnx"))
    classifier = Classifier(artifact, runtime)
    for text in texts:
        classifier.predict([classifier.encode(text)])
    return runtime


def main(arguments: Sequence[str]) -> int:
    """Print a table with a row for each artifact."""
    parser = Parser(
        prog="python -m benchmarks subnormals",
        description="Count subnormal weights and activations.",
    )
    parser.add_argument("artifacts", nargs="+", type=Path, metavar="ARTIFACT")
    parser.add_argument(
        "--texts", type=Path, default=TEXTS, help=f"file with one text per line (default: {TEXTS})"
    )
    options = parser.parse_args(arguments)
    if not options.texts.is_file():
        raise Unavailable(f"{options.texts} does not exist; pass a file with one text per line.")
    texts = [line for line in options.texts.read_text().splitlines() if line]
    print(
        "| artifact | parameters | subnormal weights | numbers computed | subnormal among them |"
        " most in |"
    )
    print("| --- | --: | --: | --: | --: | --- |")
    for path in options.artifacts:
        artifact = read_artifact(path)
        runtime = count(artifact, texts)
        ((node, most),) = runtime.subnormals.most_common(1)
        print(
            f"| {path} | {artifact.manifest.parameters:,} |"
            f" {count_subnormal_weights(artifact.path('model.onnx')):,} | {runtime.numbers:,} |"
            f" {runtime.subnormals.total():,} | {node if most else ''} |"
        )
    return 0
