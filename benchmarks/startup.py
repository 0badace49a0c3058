"""
From a process' start to its first answer, and what memory that takes.

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
from benchmarks.harness.models_under_test import Subject, subject
from benchmarks.harness.processes import Process, free_port, our_service, started
from benchmarks.harness.texts import TEXTS, read_lines
from command import Parser

MIB = 2**20
READY_S = 3.0
WEIGHTS_TIMES, BESIDE_WEIGHTS = 1.6, 120 * MIB


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks startup", description="Measure a service's start and memory."
    )
    parser.add_argument("--short", action="store_true", help="one start of each")
    parser.add_argument(
        "--sizes", nargs="+", choices=("base", "mini", "tiny"), default=("mini", "base")
    )
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    given = parser.parse_args(arguments)
    found = measure(given.sizes, rounds=1 if given.short else 5)
    print(markdown(found))
    if given.out is not None:
        write(given.out, "python -m benchmarks startup", [found])
    return 0


def measure(sizes: Sequence[str], rounds: int) -> Findings:
    """Every variant of every size, started `rounds` times in turns."""
    subjects = [subject(size) for size in sizes]
    starts = [(each, variant) for each in subjects for variant in each.variants]
    seen: dict[tuple[str, str], list[dict[str, float]]] = {
        (each.name, variant): [] for each, variant in starts
    }
    texts = read_lines(TEXTS)
    for _ in range(rounds):
        for each, variant in starts:
            seen[each.name, variant].append(start(each, variant, texts))
    rows, targets = [], []
    for each, variant in starts:
        weights = each.artifact.manifest.variants[variant].weight_bytes
        ready, loaded, answered, first = (
            float(np.median([one[key] for one in seen[each.name, variant]]))
            for key in ("ready_s", "loaded", "answered", "first_ms")
        )
        rows.append(
            [
                each.name,
                variant,
                f"{ready:.2f}",
                f"{weights / MIB:.0f}",
                f"{loaded / MIB:.0f}",
                f"{answered / MIB:.0f}",
                f"{(loaded - BESIDE_WEIGHTS) / weights:.2f}",
                f"{first:.1f}",
            ]
        )
        if each.name == "base":
            limit = (WEIGHTS_TIMES * weights + BESIDE_WEIGHTS) / MIB
            targets.append(
                Target(
                    f"{variant}: ready", f"≤ {READY_S:.0f} s", f"{ready:.2f} s", ready <= READY_S
                )
            )
            targets.append(
                Target(
                    f"{variant}: anonymous memory once ready",
                    f"≤ {limit:.0f} MiB",
                    f"{loaded / MIB:.0f} MiB",
                    loaded / MIB <= limit,
                )
            )
    return Findings(
        "startup",
        "How long from the start of the process until it is ready, and how much memory is its own?",
        [
            Table(
                "",
                (
                    "size",
                    "variant",
                    "ready, s",
                    "weights, MiB",
                    "anonymous once ready, MiB",
                    f"after {len(texts)} texts, MiB",
                    "(anonymous − 120 MiB) by weights",
                    "first request, ms",
                ),
                rows,
                "Ready is after the warm-up, of default length. Medians of "
                f"{rounds} start(s); anonymous memory is what no file backs.",
            )
        ],
        targets,
        {f"{size} {variant}": ones for (size, variant), ones in seen.items()},
    )


def start(each: Subject, variant: str, texts: Sequence[str]) -> dict[str, float]:
    """One start: seconds until ready, anonymous bytes then and after all `texts`, milliseconds of
    the first request.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        with started(
            each.name,
            our_service(str(each.artifact.directory), "--variant", variant, port=port),
            port,
            Path(folder) / "log",
        ) as server:
            ready = time.monotonic() - began
            loaded = server.anonymous_bytes()
            sent = time.perf_counter()
            ask(server, texts[0])
            first = time.perf_counter() - sent
            for text in texts:
                ask(server, text)
            return {
                "ready_s": ready,
                "loaded": loaded,
                "first_ms": first * 1000,
                "answered": server.anonymous_bytes(),
            }


def ask(server: Process, text: str) -> None:
    with urllib.request.urlopen(
        f"{server.url}/classify", json.dumps({"input": text}).encode(), timeout=60
    ) as response:
        response.read()
