"""
What does it save to compute the last layer for first tokens only?

    python -m benchmarks last_layer artifacts/bert --variant cpu-fp32

The same batches run by the graph whose last layer is narrowed (service/runtimes/narrowed.py) and by
the whole one, in turns, on one thread. Both must give the same bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from command import BadUsage, Parser
from service.artifact import Artifact, read_artifact
from service.classifier import Classifier, Encoded
from service.runtimes.openvino import OpenVinoRuntime

BATCHES: dict[str, list[int]] = {
    "1 text of 8 tokens": [8],
    "1 of 16": [16],
    "1 of 32": [32],
    "1 of 64": [64],
    "1 of 128": [128],
    "8 of 16": [16] * 8,
    "32 of 16": [16] * 32,
    "16 of 32": [32] * 16,
    "4 of 128": [128] * 4,
}
"""Token counts of the texts of each batch."""
SEED = 30
FIRST_ID, LAST_ID = 1000, 5000
"""Range of the token ids, which are ordinary words in BERT's vocabulary."""


def main(arguments: Sequence[str]) -> int:
    """Print a table with a row for each batch."""
    parser = Parser(
        prog="python -m benchmarks last_layer",
        description="Compare the narrowed last layer with the whole one.",
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--variant", default="cpu-fp32", help="variant (default: cpu-fp32)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="seconds for each batch (default: 2)"
    )
    options = parser.parse_args(arguments)
    artifact = read_artifact(options.artifact)
    check(options, artifact)
    narrowed, whole = (
        classifier(artifact, options.variant, narrows=narrows) for narrows in (True, False)
    )
    print("| batch | whole, ms | narrowed, ms | narrowed ÷ whole | same bits |")
    print("|---|--:|--:|---|---|")
    for name, tokens in BATCHES.items():
        if max(tokens) <= artifact.manifest.max_tokens:
            print(row(name, batch_of(tokens), narrowed, whole, options.seconds), flush=True)
    return 0


def check(options: argparse.Namespace, artifact: Artifact) -> None:
    """Raise BadUsage for a variant that the artifact or OpenVINO does not have."""
    variant = artifact.manifest.variants.get(options.variant)
    if variant is None or variant.runtime != "openvino":
        names = [
            name for name, each in artifact.manifest.variants.items() if each.runtime == "openvino"
        ]
        raise BadUsage(f"--variant {options.variant}: OpenVINO can run {', '.join(names)}.")


def classifier(artifact: Artifact, variant_name: str, narrows: bool) -> Classifier:
    """Return a classifier of one thread, packed if the graph can be."""
    variant = artifact.manifest.variants[variant_name]
    runtime = OpenVinoRuntime(
        artifact.path(variant.files[0]),
        variant.precision,
        1,
        variant.lowest_unquantized_precision,
        artifact.manifest.can_pack,
        narrows,
    )
    return Classifier(artifact, runtime)


def batch_of(tokens: Sequence[int]) -> list[Encoded]:
    """Return texts of so many random tokens each."""
    rng = np.random.default_rng(SEED)
    return [
        Encoded(rng.integers(FIRST_ID, LAST_ID, count).tolist(), [0] * count, False)
        for count in tokens
    ]


def row(
    name: str, batch: Sequence[Encoded], narrowed: Classifier, whole: Classifier, seconds: float
) -> str:
    """Run a batch by both in turns, and return its row: medians, and the quartiles of the ratio."""
    same = np.array_equal(narrowed.predict(batch), whole.predict(batch))
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        first, second = (narrowed, whole) if len(times) % 2 else (whole, narrowed)
        took = {id(each): _seconds(each, batch) for each in (first, second)}
        times.append((took[id(whole)], took[id(narrowed)]))
    whole_s, narrowed_s = (float(np.median(column)) for column in zip(*times, strict=True))
    low, middle, high = np.quantile([after / before for before, after in times], (0.25, 0.5, 0.75))
    return (
        f"| {name} | {whole_s * 1e3:.3f} | {narrowed_s * 1e3:.3f} |"
        f" {middle:.3f} ({low:.3f}–{high:.3f}) | {'yes' if same else 'NO'} |"
    )


def _seconds(model: Classifier, batch: Sequence[Encoded]) -> float:
    started = time.perf_counter()
    model.predict(batch)
    return time.perf_counter() - started
