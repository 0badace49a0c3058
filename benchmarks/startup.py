"""
Time from a process' start to its first answer, and the memory it takes.

    python -m benchmarks startup [--short] [--out FILE]
"""

from __future__ import annotations

import json
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness.findings import Findings, Table, Target, markdown, write
from benchmarks.harness.models_under_test import ModelUnderTest, model_under_test
from benchmarks.harness.processes import Server, running_server, service_command
from benchmarks.harness.texts import TEXTS, read_texts
from command import Parser
from proof.measuring.launch import free_port

MIB = 2**20
READY_S = 3.0
"""Most seconds until BERT-base's size is ready."""
WEIGHTS_TIMES, BESIDE_WEIGHTS = 1.6, 120 * MIB
"""Most anonymous memory once ready: so many times the weights, and so many bytes more."""


def main(arguments: Sequence[str]) -> int:
    """Measure starts and print the table."""
    parser = Parser(
        prog="python -m benchmarks startup", description="Measure a service's start and memory."
    )
    parser.add_argument("--short", action="store_true", help="one start of each")
    parser.add_argument(
        "--sizes", nargs="+", choices=("base", "mini", "tiny"), default=("mini", "base")
    )
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    options = parser.parse_args(arguments)
    findings = measure(options.sizes, rounds=1 if options.short else 5)
    print(markdown(findings))
    if options.out is not None:
        write(options.out, "python -m benchmarks startup", [findings])
    return 0


def measure(sizes: Sequence[str], rounds: int) -> Findings:
    """Return the start time and memory of every variant of every size, started in turns."""
    models = [model_under_test(size) for size in sizes]
    cases = [(model, variant) for model in models for variant in model.variants]
    starts: dict[tuple[str, str], list[dict[str, float]]] = {
        (model.name, variant): [] for model, variant in cases
    }
    texts = read_texts(TEXTS)
    for _ in range(rounds):
        for model, variant in cases:
            starts[model.name, variant].append(start(model, variant, texts))
    rows, targets = [], []
    for model, variant in cases:
        weights = model.artifact.manifest.variants[variant].weight_bytes
        ready, loaded, answered, first = (
            float(np.median([values[key] for values in starts[model.name, variant]]))
            for key in ("ready_s", "loaded", "answered", "first_ms")
        )
        rows.append(
            [
                model.name,
                variant,
                f"{ready:.2f}",
                f"{weights / MIB:.0f}",
                f"{loaded / MIB:.0f}",
                f"{answered / MIB:.0f}",
                f"{(loaded - BESIDE_WEIGHTS) / weights:.2f}",
                f"{first:.1f}",
            ]
        )
        if model.name == "base":
            targets += _targets(variant, ready, loaded, weights)
    columns = (
        "size",
        "variant",
        "ready, s",
        "weights, MiB",
        "anonymous once ready, MiB",
        f"after {len(texts)} texts, MiB",
        "(anonymous − 120 MiB) by weights",
        "first request, ms",
    )
    note = (
        f"Ready is after the default warm-up. Medians of {rounds} start(s). Anonymous memory is"
        " memory that no file backs."
    )
    return Findings(
        "startup",
        "How long does a process take until it is ready, and how much memory does it need?",
        [Table("", columns, rows, note)],
        targets,
        {f"{size} {variant}": values for (size, variant), values in starts.items()},
    )


def _targets(variant: str, ready_s: float, loaded: float, weights: int) -> list[Target]:
    limit = (WEIGHTS_TIMES * weights + BESIDE_WEIGHTS) / MIB
    return [
        Target(f"{variant}: ready", f"≤ {READY_S:.0f} s", f"{ready_s:.2f} s", ready_s <= READY_S),
        Target(
            f"{variant}: anonymous memory once ready",
            f"≤ {limit:.0f} MiB",
            f"{loaded / MIB:.0f} MiB",
            loaded / MIB <= limit,
        ),
    ]


def start(model: ModelUnderTest, variant: str, texts: Sequence[str]) -> dict[str, float]:
    """Start the service once and return what it took.

    `ready_s` is seconds until ready, `loaded` and `answered` anonymous bytes then and after all
    `texts`, `first_ms` milliseconds of the first request.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        with running_server(
            model.name,
            service_command(str(model.artifact.directory), "--variant", variant, port=port),
            port,
            Path(folder) / "log",
        ) as server:
            ready = time.monotonic() - began
            loaded = server.anonymous_bytes()
            sent = time.perf_counter()
            classify(server, texts[0])
            first = time.perf_counter() - sent
            for text in texts:
                classify(server, text)
            return {
                "ready_s": ready,
                "loaded": loaded,
                "first_ms": first * 1000,
                "answered": server.anonymous_bytes(),
            }


def classify(server: Server, text: str) -> None:
    """Send one text and read the answer."""
    body = json.dumps({"input": text}).encode()
    with urllib.request.urlopen(f"{server.url}/classify", body, timeout=60) as response:
        response.read()
