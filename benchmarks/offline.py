"""
An engine alone, as fast as it goes: texts from stdin, sorted by length, in batches of 16, a row
each. Prints texts a second.

    python -m benchmarks.offline ARTIFACT VARIANT SECONDS < texts.txt
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.harness.models_under_test import a_row_each
from service.artifact import read_artifact
from service.classifier import Encoded
from service.host import cpus

BATCH = 16


def main() -> None:
    artifact = read_artifact(Path(sys.argv[1]))
    classifier = a_row_each(artifact, sys.argv[2], cpus.usable())
    batches = in_batches([classifier.encode(line) for line in sys.stdin.read().splitlines()])
    for batch in batches:
        classifier.predict(batch)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < float(sys.argv[3]):
        for batch in batches:
            classifier.predict(batch)
            done += len(batch)
    print(done / (time.perf_counter() - began))


def in_batches(encoded: list[Encoded]) -> list[list[Encoded]]:
    """Sorted by length, cut into full batches; what is left over at the end is left out."""
    ordered = sorted(encoded, key=lambda item: item.tokens)
    return [ordered[i : i + BATCH] for i in range(0, len(ordered) - BATCH + 1, BATCH)] or [ordered]


if __name__ == "__main__":
    main()
