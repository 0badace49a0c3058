"""
Run batches of an artifact on request, one thread, for a counter of instructions.

    python -m service.workload ARTIFACT --variant cpu-fp32

It reads one JSON object from each line of standard input and answers each with one line:

    {"prepare": {"text": "good film", "max_tokens": 8, "copies": 4}}
        encode the text, run the batch of its copies once, answer its size and logits
    {"run": 3}
        run the prepared batch three times

Around the runs, the C function `ctermid` is called, and nowhere else. It does nothing here, but a
profiler recognizes it, so it marks where the runs begin and end. The caller has verified the
artifact's files: hashing them again would take Valgrind minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command import BadInput, Parser, finish
from service.artifact import Artifact, read_manifest
from service.classifier import Classifier, Encoded
from service.host import cpus
from service.runtimes.auto import ON_A_GPU, choose, load

THREADS = 1


def main(arguments: Sequence[str]) -> int:
    """Serve requests from standard input until it ends."""
    options = _parse(arguments)
    workload = Workload(options)
    # Collections come at times that depend on everything that was allocated before.
    gc.collect()
    gc.freeze()
    gc.disable()
    _answer(workload.describe())
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            _answer(workload.prepare(**request["prepare"]))
        else:
            workload.run(request["run"])
            _answer({})
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m service.workload", description="Run batches on request.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--variant", default="cpu-fp32")
    parser.add_argument("--runtime", choices=("auto", "openvino", "onnxruntime"), default="auto")
    parser.add_argument(
        "--unquantized-precision",
        choices=("f32", "bf16"),
        help="lowest precision for what an int8 graph does not quantize",
    )
    return parser.parse_args(arguments)


def _answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


class Workload:
    """A classifier and the batch that it runs next."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Load the artifact; BadInput if its variant needs a GPU."""
        folder: Path = options.artifact
        artifact = Artifact(folder, read_manifest(folder), "", folder.resolve(), {})
        self._choice = choose(artifact, options.variant, options.runtime)
        if self._choice.runtime in ON_A_GPU:
            raise BadInput(f"{options.variant} runs on a GPU, whose instructions are not counted.")
        runtime = load(
            artifact,
            self._choice,
            THREADS,
            unquantized_precision=options.unquantized_precision,
        )
        self._classifier = Classifier(artifact, runtime)
        self._batch: list[Encoded] = []

    def describe(self) -> dict[str, Any]:
        """Return what was loaded."""
        runtime = self._classifier.runtime
        return {
            "variant": self._choice.variant,
            "runtime": runtime.name,
            "precision": runtime.precision,
            "computes_in": runtime.computes_in,
            "packs": self._classifier.packing is not None,
            "max_tokens": self._classifier.manifest.max_tokens,
            "processor": cpus.describe(),
        }

    def prepare(self, text: str, max_tokens: int | None, copies: int) -> dict[str, Any]:
        """Make a batch of copies of a text and run it once, so that its shape is warm."""
        limit = self._classifier.manifest.max_tokens
        if max_tokens is not None and max_tokens < limit:
            limit = max_tokens
        encoded = self._classifier.encode(text, truncate="right", max_tokens=limit)
        self._batch = [encoded] * copies
        logits = self._classifier.predict(self._batch)
        return {"tokens": encoded.tokens, "logits": logits.tolist()}

    def run(self, repetitions: int) -> None:
        """Run the batch so many times, between two marks."""
        os.ctermid()
        for _ in range(repetitions):
            self._classifier.predict(self._batch)
        os.ctermid()


if __name__ == "__main__":
    finish(main)
