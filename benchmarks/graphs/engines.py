"""
Which engine computes a batch fastest on this processor?

    python -m benchmarks engines artifacts/bert --out benchmarks/engines.md

Every variant of the artifact that this processor can run, by each engine that can run it, computes
the same batches in turns, on one thread. Times are CPU times, which other processes hardly change.
The service packs texts by OpenVINO and not by ONNX Runtime, and so does this.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.graphs.last_layer import BATCHES, batch_of
from benchmarks.harness import pages
from command import Parser, Unavailable
from service.artifact import Artifact, read_artifact
from service.classifier import Classifier, Encoded
from service.host import cpus
from service.runtimes import RuntimeUnavailable
from service.runtimes.auto import choose, load

PAIRS = (
    ("cpu-fp32", "openvino"),
    ("cpu-fp32", "onnxruntime"),
    ("cpu-bf16", "openvino"),
    ("cpu-int8", "openvino"),
    ("cpu-int8-ort", "onnxruntime"),
)
"""Variants and the engines that run them on a CPU; the first one is the reference."""
LEAST_ROUNDS = 5


def main(arguments: Sequence[str]) -> int:
    """Print a table with a row for each batch and a column for each engine."""
    parser = Parser(
        prog="python -m benchmarks engines",
        description="Compare the engines that can run an artifact on this CPU.",
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="seconds for each batch (default: 4)"
    )
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file too")
    options = parser.parse_args(arguments)
    artifact = read_artifact(options.artifact)
    engines = runnable(artifact)
    text = table(artifact, engines, options.seconds)
    print(text)
    if options.out is not None:
        command = shlex.join(["python", "-m", "benchmarks", "engines", *arguments])
        pages.write(options.out, "Engines on one processor", command, text)
    return 0


def runnable(artifact: Artifact) -> dict[str, Classifier]:
    """Return a classifier of one thread for each variant and engine that runs here, by its name.

    Raises Unavailable if there are fewer than two.
    """
    native = cpus.native_precisions()
    engines: dict[str, Classifier] = {}
    for name, runtime in PAIRS:
        variant = artifact.manifest.variants.get(name)
        is_emulated = runtime == "openvino" and variant and variant.precision not in native
        if variant is None or is_emulated:
            continue
        try:
            engine = load(artifact, choose(artifact, name, runtime), 1)
        except RuntimeUnavailable:
            continue
        engines[f"{name} by {runtime}"] = Classifier(artifact, engine)
    if len(engines) < 2:
        raise Unavailable(
            f"{artifact.directory} can be run by {' and '.join(engines) or 'nothing'} here; to"
            " compare engines, install the extra portable or export more variants."
        )
    return engines


def table(artifact: Artifact, engines: Mapping[str, Classifier], seconds: float) -> str:
    """Return the table as Markdown: the reference's milliseconds, and the others' ratios to it."""
    reference, *others = engines
    lines = [
        f"{artifact.manifest.name}, {artifact.manifest.parameters:,} parameters, one thread of"
        f" {cpus.describe()}; CPU time. A ratio is an engine's time divided by that of"
        f" {reference}: the median of interleaved runs, with quartiles. Less is faster.",
        "",
        f"| batch | {reference}, ms | " + " | ".join(others) + " |",
        "|---|--:|" + "--:|" * len(others),
    ]
    for name, tokens in BATCHES.items():
        if max(tokens) <= artifact.manifest.max_tokens:
            values = " | ".join(cells(batch_of(tokens), engines, seconds))
            lines.append(f"| {name} | {values} |")
    return "\n".join(lines)


def cells(batch: Sequence[Encoded], engines: Mapping[str, Classifier], seconds: float) -> list[str]:
    """Run a batch by every engine in turns; return the first one's time and the others' ratios."""
    for classifier in engines.values():
        classifier.predict(batch)
    names = list(engines)
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < LEAST_ROUNDS:
        turn = len(rounds) % len(names)
        order = names[turn:] + names[:turn]
        rounds.append({name: _cpu_seconds(engines[name], batch) for name in order})
    reference, *others = names
    milliseconds = 1e3 * float(np.median([took[reference] for took in rounds]))
    ratios = []
    for name in others:
        low, middle, high = np.quantile(
            [took[name] / took[reference] for took in rounds], (0.25, 0.5, 0.75)
        )
        ratios.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
    return [f"{milliseconds:.2f}", *ratios]


def _cpu_seconds(classifier: Classifier, batch: Sequence[Encoded]) -> float:
    started = time.process_time()
    classifier.predict(batch)
    return time.process_time() - started
