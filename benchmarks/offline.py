"""
The throughput of an engine alone: print the texts per second that it classifies.

    python -m benchmarks.offline ARTIFACT VARIANT SECONDS < texts.txt

The texts come from stdin, are tokenised before, and run sorted by length in unpacked batches of 16.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.harness.models_under_test import unpacked_classifier
from service.artifact import read_artifact
from service.classifier import Encoded
from service.host import cpus

BATCH = 16


def main() -> None:
    """Print the texts per second of the artifact's variant."""
    artifact = read_artifact(Path(sys.argv[1]))
    classifier = unpacked_classifier(artifact, sys.argv[2], cpus.usable())
    texts = sys.stdin.read().splitlines()
    batches = full_batches([classifier.encode(text) for text in texts])
    for batch in batches:
        classifier.predict(batch)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < float(sys.argv[3]):
        for batch in batches:
            classifier.predict(batch)
            done += len(batch)
    print(done / (time.perf_counter() - began))


def full_batches(encoded: list[Encoded]) -> list[list[Encoded]]:
    """Return the texts sorted by length and cut into full batches.

    The remainder is dropped; fewer texts than BATCH make one batch.
    """
    ordered = sorted(encoded, key=lambda text: text.tokens)
    return [ordered[i : i + BATCH] for i in range(0, len(ordered) - BATCH + 1, BATCH)] or [ordered]


if __name__ == "__main__":
    main()
