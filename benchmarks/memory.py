"""
Does memory stay where it is, once every shape was met?

    python -m benchmarks memory [--short] [--sizes mini base] [--out FILE]

An engine keeps kernels for each shape of a batch, so memory grows with the shapes that were met, up
to the end of the grid. Every shape is sent once; what 10,000 requests of random length and company
add after that is growth.
"""

from __future__ import annotations

import json
import random
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from benchmarks.harness import generator
from benchmarks.harness.findings import Findings, Table, at_most, markdown, write
from benchmarks.harness.generator import Load
from benchmarks.harness.models_under_test import Subject, subject
from benchmarks.harness.processes import Process, free_port, halves, our_service, started
from command import Parser, Unavailable
from service.batching.shapes import CPU, PACKED, Shapes

MIB = 2**20
REQUESTS = 10_000
CONNECTIONS = 16
WORD = "good"
"""One token in every vocabulary that is measured."""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks memory",
        description="Measure what memory grows by once every shape was met.",
    )
    parser.add_argument("--short", action="store_true", help="the fastest variant only")
    parser.add_argument("--sizes", nargs="+", choices=("base", "mini", "tiny"), default=("mini",))
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    given = parser.parse_args(arguments)
    found = measure(given.sizes, given.short)
    print(markdown(found))
    if given.out is not None:
        write(given.out, "python -m benchmarks memory", [found])
    return 0


@dataclass(frozen=True)
class Growth:
    """Anonymous bytes of a service, and what they grew by."""

    ready: int
    shapes: int
    met: int
    """Once every shape was met."""
    seen: list[tuple[int, int]]
    """Requests answered since then, and bytes."""

    @property
    def percent(self) -> tuple[float, float, float]:
        """What REQUESTS add, in percent of what was there: the median of all pairs' slopes (Theil
        and Sen), and its 95 % interval.
        """
        slope, _, low, high = stats.theilslopes(
            [size for _, size in self.seen], [answered for answered, _ in self.seen]
        )
        return tuple(float(100 * REQUESTS * one / self.met) for one in (slope, low, high))  # type: ignore[return-value]


def measure(sizes: Sequence[str], short: bool, requests: int = REQUESTS) -> Findings:
    rows, targets, values = [], [], {}
    for size in sizes:
        each = subject(size)
        for variant in each.variants[-1:] if short else each.variants:
            found = grow(each, variant, requests)
            slope, low, high = found.percent
            rows.append(
                [
                    size,
                    variant,
                    f"{found.ready / MIB:.0f}",
                    f"{found.shapes}",
                    f"{found.met / MIB:.0f}",
                    f"{found.seen[-1][0]:,}",
                    f"{found.seen[-1][1] / MIB:.0f}",
                    f"{slope:+.2f} % ({low:+.2f}…{high:+.2f})",
                ]
            )
            targets.append(
                at_most(
                    f"{size} {variant}: growth over {REQUESTS:,} requests of random shape",
                    slope,
                    1,
                    " %",
                )
            )
            values[f"{size} {variant}"] = {
                "ready": found.ready,
                "shapes": found.shapes,
                "met": found.met,
                "seen": found.seen,
            }
    return Findings(
        "memory",
        "Does memory stay where it is, once every shape was met?",
        [
            Table(
                "",
                (
                    "size",
                    "variant",
                    "ready, MiB",
                    "shapes",
                    "after each once, MiB",
                    "requests then",
                    "MiB at the end",
                    f"growth over {REQUESTS:,}",
                ),
                rows,
                f"Anonymous memory, which no file backs. {CONNECTIONS} connections, texts of random"
                " length, so batches of random size.",
            )
        ],
        targets,
        values,
    )


def grow(each: Subject, variant: str, requests: int) -> Growth:
    """One service that meets every shape once, and then at least so many random requests."""
    ours, theirs = halves()
    port, longest, draw = free_port(), each.artifact.manifest.max_tokens, random.Random(0)
    bodies = [json.dumps({"input": text_of(draw.randint(3, longest))}) for _ in range(997)]
    with (
        tempfile.TemporaryDirectory() as folder,
        started(
            each.name,
            our_service(str(each.artifact.directory), "--variant", variant, port=port),
            port,
            Path(folder) / "log",
            cpus=ours,
        ) as server,
    ):
        ready = server.anonymous_bytes()
        shapes = meet_every_shape(server, longest)
        met, answered = server.anonymous_bytes(), 0
        seen: list[tuple[int, int]] = []
        while answered < requests or len(seen) < 3:
            part = generator.run(
                Load(port, "/classify", bodies, CONNECTIONS, 1.0, warm_up_s=0.0), theirs
            )
            if part.failed:
                raise Unavailable(
                    f"The service refused {part.failed} requests; {server.log} says why."
                )
            answered += part.requests
            seen.append((answered, server.anonymous_bytes()))
    return Growth(ready, shapes, met, seen)


def meet_every_shape(server: Process, longest: int) -> int:
    """Sends a list for each shape of the grid, so that it runs as one batch; how many there are."""
    with urllib.request.urlopen(f"{server.url}/info", timeout=60) as response:
        [model] = json.load(response)["models"].values()
    grid = Shapes(longest, grid=PACKED if model["packs"] else CPU)
    batches = [
        texts for shape in grid.likely_first() if shape[1] > 2 and (texts := grid.texts_of(*shape))
    ]
    for texts in batches:
        request = urllib.request.Request(
            f"{server.url}/classify",
            json.dumps({"input": [text_of(tokens) for tokens in texts]}).encode(),
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
    return len(batches)


def text_of(tokens: int) -> str:
    """A text of so many tokens, its two special ones counted."""
    return " ".join([WORD] * (tokens - 2))
