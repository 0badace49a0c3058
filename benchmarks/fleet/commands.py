"""
How do requests reach pods best, and how many pods does a load need?

    python -m benchmarks fleet --out benchmarks/fleet.md

A service on this machine is measured first: one request alone, its rate with 32 connections, and
random arrivals at half and at 70 % of that rate. The simulation (simulation.py) is fitted to the
first two, compared with the others, and then run with many pods for each way of sharing requests
out.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.fleet.simulation import (
    Choose,
    Engine,
    at_random,
    kept_connections,
    least_in_flight,
    least_of_two,
    round_robin,
    simulate,
)
from benchmarks.harness import generator, pages
from benchmarks.harness.generator import Load
from benchmarks.harness.models_under_test import ModelUnderTest, model_under_test
from benchmarks.harness.processes import running_server, service_command, split_cpus
from benchmarks.harness.texts import TEXTS, mix_lengths, read_texts
from command import Parser
from proof.measuring.launch import free_port
from service.classifier import Classifier
from service.runtimes.auto import Choice, load

CONNECTIONS = 32
"""Connections of the saturated service, and texts of its largest batch."""
LOADS = (0.5, 0.7, 0.85)
"""Shares of capacity that are simulated; the first two are measured too."""
MEASURED = LOADS[:2]
POLICIES: dict[str, Callable[[], Choose]] = {
    "kept connections, 4 a pod": lambda: kept_connections(4),
    "the same, each for 30 s": lambda: kept_connections(4, 30),
    "kept connections, 16 a pod": lambda: kept_connections(16),
    "at random, by request": lambda: at_random,
    "in turn, by request": lambda: round_robin,
    "emptier of two": lambda: least_of_two,
    "least in flight": lambda: least_in_flight,
}
"""Ways to share requests out; each simulation has one of its own, for it may hold a state."""
SECONDS = 120.0
"""Simulated seconds of each case."""


@dataclass(frozen=True)
class Node:
    """One real service, as it was measured."""

    alone_s: float
    """Mean time of a request alone."""
    texts_per_s: float
    """With CONNECTIONS connections."""
    p99_ms: dict[float, float]
    """Of random arrivals, by their share of that rate."""
    p50_ms: dict[float, float]


def main(arguments: Sequence[str]) -> int:
    """Measure, simulate, and print the tables."""
    parser = Parser(
        prog="python -m benchmarks fleet",
        description="Simulate many pods, fitted to a service on this machine.",
    )
    parser.add_argument("--size", choices=("mini", "base", "tiny"), default="base")
    parser.add_argument("--variant", default="cpu-int8", help="variant (default: cpu-int8)")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="file with texts, one per line")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="seconds of each measurement (default: 20)"
    )
    parser.add_argument("--out", type=Path, help="write the tables to this Markdown file too")
    options = parser.parse_args(arguments)
    texts = mix_lengths(read_texts(options.texts))
    model = model_under_test(options.size)
    node = measure(model, options.variant, texts, options.seconds)
    engine = Engine.fitted(node.alone_s, node.texts_per_s, CONNECTIONS)
    text = tables(engine, node, lengths(model, options.variant, texts), options.size)
    print(text)
    if options.out is not None:
        command = shlex.join(["python", "-m", "benchmarks", "fleet", *arguments])
        pages.write(options.out, "Many pods", command, text)
    return 0


def measure(model: ModelUnderTest, variant: str, texts: Sequence[str], seconds: float) -> Node:
    """Measure one service on this machine."""
    bodies = [json.dumps({"input": text}) for text in texts]
    port = free_port()
    command = service_command(str(model.artifact.directory), "--variant", variant, port=port)
    server_cpus, generator_cpus = split_cpus()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server("service", command, port, Path(folder) / "log", cpus=server_cpus),
    ):

        def run(connections: int, rate: float = 0.0) -> generator.LoadResult:
            sent = Load(port, "/classify", bodies, connections, seconds, rate=rate)
            return generator.run(sent, generator_cpus)

        alone, full = run(1), run(CONNECTIONS)
        at = {share: run(CONNECTIONS, share * full.rate) for share in MEASURED}
    return Node(
        float(np.mean(alone.latencies_ms)) / 1000,
        full.rate,
        {share: result.percentile(99) for share, result in at.items()},
        {share: result.percentile(50) for share, result in at.items()},
    )


def lengths(model: ModelUnderTest, variant: str, texts: Sequence[str]) -> list[float]:
    """Return the token count of each text by their mean."""
    classifier = Classifier(
        model.artifact, load(model.artifact, Choice(variant, "openvino", "benchmark"), 1)
    )
    tokens = np.array([classifier.encode(text).tokens for text in texts], float)
    return [float(value) for value in tokens / tokens.mean()]


def tables(engine: Engine, node: Node, texts: Sequence[float], size: str) -> str:
    """Return the tables as Markdown."""
    lines = [
        f"BERT-{size}: a request alone takes {node.alone_s * 1e3:.1f} ms, and"
        f" {node.texts_per_s:.1f} texts a second are answered with {CONNECTIONS} connections. So a"
        f" batch of k texts takes {engine.fixed_s * 1e3:.1f} + {engine.each_s * 1e3:.1f} k ms in"
        " the simulation.",
        "",
        "One service, random arrivals, measured and simulated:",
        "",
        "| share of capacity | p50, ms | simulated | p99, ms | simulated | in flight, simulated |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for share in LOADS:
        outcome = simulate(engine, 1, share, at_random, 10 * SECONDS, texts)
        measured = [
            f"{values[share]:.0f}" if share in values else "–"
            for values in (node.p50_ms, node.p99_ms)
        ]
        lines.append(
            f"| {share:.0%} | {measured[0]} | {outcome.percentile_ms(50):.0f} | {measured[1]} |"
            f" {outcome.percentile_ms(99):.0f} | {outcome.in_flight:.1f} |"
        )
    cases = [(10, share) for share in LOADS] + [(50, LOADS[0]), (50, LOADS[-1])]
    lines += [
        "",
        (
            f"p99 in ms of many pods, simulated for {SECONDS:.0f} s, and the requests of the"
            " busiest pod by the mean. Where a pod gets more than it can answer, p99 grows with the"
            " time."
        ),
        "",
        "| how requests reach pods |"
        + "".join(f" {pods} pods, {share:.0%} |" for pods, share in cases)
        + " busiest of 10 |",
        "|---|" + "--:|" * (len(cases) + 1),
    ]
    for name, policy in POLICIES.items():
        outcomes = [
            simulate(engine, pods, share, policy(), SECONDS, texts) for pods, share in cases
        ]
        cells = " | ".join(f"{outcome.percentile_ms(99):,.0f}" for outcome in outcomes)
        lines.append(f"| {name} | {cells} | {outcomes[0].busiest:.2f} |")
    return "\n".join(lines)
