"""
Does memory stay constant once every shape has run?

    python -m benchmarks memory [--short] [--sizes mini base] [--out FILE]

An engine keeps kernels for each batch shape, so memory grows with the shapes that have run, up to
the end of the grid. Each shape is sent once. Growth is what 10,000 requests of random length, in
batches of random size, add after that.
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
from benchmarks.harness.models_under_test import ModelUnderTest, model_under_test
from benchmarks.harness.processes import Server, running_server, service_command, split_cpus
from command import Parser, Unavailable
from proof.measuring.launch import free_port
from service.batching.shapes import CPU, PACKED, Shapes

MIB = 2**20
REQUESTS = 10_000
CONNECTIONS = 16
WORD = "good"
"""A word that is one token in every vocabulary that is measured."""


def main(arguments: Sequence[str]) -> int:
    """Measure the growth of memory and print the table."""
    parser = Parser(
        prog="python -m benchmarks memory",
        description="Measure the growth of memory after every shape has run.",
    )
    parser.add_argument("--short", action="store_true", help="the fastest variant only")
    parser.add_argument("--sizes", nargs="+", choices=("base", "mini", "tiny"), default=("mini",))
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    options = parser.parse_args(arguments)
    findings = measure(options.sizes, options.short)
    print(markdown(findings))
    if options.out is not None:
        write(options.out, "python -m benchmarks memory", [findings])
    return 0


@dataclass(frozen=True)
class Growth:
    """The anonymous memory of a service over its requests."""

    ready: int
    """Bytes once the service is ready."""
    shapes: int
    """Number of shapes that were run."""
    met: int
    """Bytes once every shape has run."""
    samples: list[tuple[int, int]]
    """Pairs of requests answered since then and bytes."""

    @property
    def percent(self) -> tuple[float, float, float]:
        """Growth over REQUESTS requests in percent of `met`, with its 95 % interval.

        It is the median slope of all pairs (Theil and Sen).
        """
        slope, _, low, high = stats.theilslopes(
            [size for _, size in self.samples], [answered for answered, _ in self.samples]
        )
        scale = 100 * REQUESTS / self.met
        return float(scale * slope), float(scale * low), float(scale * high)

    def to_dict(self) -> dict[str, object]:
        """Return the growth as the page's JSON has it."""
        return {
            "ready": self.ready,
            "shapes": self.shapes,
            "met": self.met,
            "seen": self.samples,
        }


def measure(sizes: Sequence[str], short: bool, requests: int = REQUESTS) -> Findings:
    """Return the growth of each size and variant; of the fastest variant only if `short`."""
    rows, targets, values = [], [], {}
    for size in sizes:
        model = model_under_test(size)
        for variant in model.variants[-1:] if short else model.variants:
            growth = measure_growth(model, variant, requests)
            slope, low, high = growth.percent
            answered, last = growth.samples[-1]
            rows.append(
                [
                    size,
                    variant,
                    f"{growth.ready / MIB:.0f}",
                    f"{growth.shapes}",
                    f"{growth.met / MIB:.0f}",
                    f"{answered:,}",
                    f"{last / MIB:.0f}",
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
            values[f"{size} {variant}"] = growth.to_dict()
    columns = (
        "size",
        "variant",
        "ready, MiB",
        "shapes",
        "after each once, MiB",
        "requests then",
        "MiB at the end",
        f"growth over {REQUESTS:,}",
    )
    note = (
        f"Anonymous memory, which no file backs. {CONNECTIONS} connections, texts of random length,"
        " so batches of random size."
    )
    return Findings(
        "memory",
        "Does memory stay constant once every shape has run?",
        [Table("", columns, rows, note)],
        targets,
        values,
    )


def measure_growth(model: ModelUnderTest, variant: str, requests: int) -> Growth:
    """Run every shape once on a service, then at least `requests` random requests."""
    server_cpus, generator_cpus = split_cpus()
    port, longest, rng = free_port(), model.artifact.manifest.max_tokens, random.Random(0)
    bodies = [json.dumps({"input": text_of(rng.randint(3, longest))}) for _ in range(997)]
    load = Load(port, "/classify", bodies, CONNECTIONS, 1.0, warm_up_s=0.0)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(
            model.name,
            service_command(str(model.artifact.directory), "--variant", variant, port=port),
            port,
            Path(folder) / "log",
            cpus=server_cpus,
        ) as server,
    ):
        ready = server.anonymous_bytes()
        shapes = run_every_shape(server, longest)
        met, answered = server.anonymous_bytes(), 0
        samples: list[tuple[int, int]] = []
        while answered < requests or len(samples) < 3:
            result = generator.run(load, generator_cpus)
            if result.failed:
                raise Unavailable(
                    f"The service refused {result.failed} requests; see its log {server.log}."
                )
            answered += result.requests
            samples.append((answered, server.anonymous_bytes()))
    return Growth(ready, shapes, met, samples)


def run_every_shape(server: Server, longest: int) -> int:
    """Send a list for each shape of the grid, which runs as one batch; return their number."""
    with urllib.request.urlopen(f"{server.url}/info", timeout=60) as response:
        [model] = json.load(response)["models"].values()
    grid = Shapes(longest, grid=PACKED if model["packs"] else CPU)
    batches = [
        lengths
        for shape in grid.by_work()
        if shape[1] > 2 and (lengths := grid.example_lengths(*shape))
    ]
    for lengths in batches:
        texts = [text_of(tokens) for tokens in lengths]
        body = json.dumps({"input": texts}).encode()
        with urllib.request.urlopen(f"{server.url}/classify", body, timeout=60) as response:
            response.read()
    return len(batches)


def text_of(tokens: int) -> str:
    """Return a text of `tokens` tokens, its two special tokens included."""
    return " ".join([WORD] * (tokens - 2))
