"""
Counts the subnormal numbers in artifacts: among their weights, and among all that they compute of
real texts.

    python -m benchmarks subnormals artifacts/bert artifacts/drbert

Every float that any node of model.onnx makes is an output here, nothing is fused and nothing
flushed, so the count is of the graph and not of an engine. Numbers for padding are among them, for
an engine computes those as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from command import Parser, Unavailable
from graphs.subnormals import count_subnormal_weights, count_subnormals
from service.artifact import Artifact, read_artifact
from service.batching.shapes import CPU
from service.classifier import Classifier
from service.runtimes import Inputs, Logits

TEXTS = Path("examples/texts/sentences.txt")


class CountingRuntime:
    """Runs a graph node by node and counts what it makes."""

    name = "onnxruntime"
    device = "CPU"
    precision = "f32"
    flush_to_zero = False
    computes_in = "f32"
    in_flight = 1
    grid = CPU

    def __init__(self, model: Path) -> None:
        self.numbers = 0
        self.subnormals: Counter[str] = Counter()
        """By the node's name."""
        graph = onnx.load(model)
        made = {name: node.name for node in graph.graph.node for name in node.output if name}
        answers = {value.name for value in graph.graph.output}
        graph.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(name) for name in made if name not in answers
        )
        self._nodes = [made.get(value.name, value.name) for value in graph.graph.output]
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        values = self._session.run(None, dict(inputs))
        for node, value in zip(self._nodes, values, strict=True):
            if value.dtype in (np.float32, np.float64):
                self.numbers += value.size
                self.subnormals[node] += count_subnormals(value)
        logits: Logits = values[0]
        return lambda: logits


def count(artifact: Artifact, texts: Sequence[str]) -> CountingRuntime:
    """Classifies each text alone and returns the runtime that counted."""
    runtime = CountingRuntime(artifact.path("model.onnx"))
    classifier = Classifier(artifact, runtime)
    for text in texts:
        classifier.predict([classifier.encode(text)])
    return runtime


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks subnormals",
        description="Count subnormal weights and activations.",
    )
    parser.add_argument("artifacts", nargs="+", type=Path, metavar="ARTIFACT")
    parser.add_argument(
        "--texts", type=Path, default=TEXTS, help=f"one text a line (default: {TEXTS})"
    )
    given = parser.parse_args(arguments)
    if not given.texts.is_file():
        raise Unavailable(f"{given.texts} does not exist; name a file with one text a line.")
    texts = [line for line in given.texts.read_text().splitlines() if line]
    print(
        "| artifact | parameters | subnormal weights | numbers computed | subnormal among them |"
        " most in |"
    )
    print("| --- | --: | --: | --: | --: | --- |")
    for path in given.artifacts:
        artifact = read_artifact(path)
        counted = count(artifact, texts)
        ((node, most),) = counted.subnormals.most_common(1)
        print(
            f"| {path} | {artifact.manifest.parameters:,} |"
            f" {count_subnormal_weights(artifact.path('model.onnx')):,} | {counted.numbers:,} |"
            f" {counted.subnormals.total():,} | {node if most else ''} |"
        )
    return 0
