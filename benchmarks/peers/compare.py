"""
Compare servers of one checkpoint: texts per second on the same processors, texts and generator.

    python -m benchmarks peers [--short] [--texts FILE] [--sizes mini base] [--only NAME ...]
        [--out FILE]
    python -m benchmarks rerank   (the same of rerankers: benchmarks/peers/rerank.py)

All servers are started once and paused (SIGSTOP) while another one is measured. A round goes
through the numbers of connections and, with each, through all servers, every other round backwards.
Ratios are taken within a round, of loads a few minutes apart at most. Answers are compared with
ours in fp32; a server that answers something else is an error.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import generator
from benchmarks.harness.findings import Findings, Table, Target, at_least, markdown, spread, write
from benchmarks.harness.generator import Load
from benchmarks.harness.models_under_test import FOLDER, ModelUnderTest, model_under_test
from benchmarks.harness.processes import Server, running_server, split_cpus
from benchmarks.harness.texts import TEXTS, mix_lengths, read_texts
from benchmarks.peers.peer import Answer, Peer, interpreter, peers
from command import BadUsage, CommandError, Parser
from proof.measuring.launch import free_port
from service.host import cpus

CONNECTIONS = (1, 8, 32)
CHECKED = 24
"""Answers of each server that are compared with ours in fp32."""
TOLERATED, TOLERATED_ROUNDED = 0.01, 0.25
"""Largest difference of a probability from ours in fp32, in fp32 and in a lower precision."""
SETTLE_S = 2.0
"""Warm-up seconds before each measurement; a SIGSTOPped server refills its caches."""


@dataclass
class PeerRun:
    """A running peer and its measurements; lists have a value for each round."""

    peer: Peer
    server: Server
    rates: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Texts per second, by the number of connections."""
    medians: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Median latency in milliseconds, by the number of connections."""
    tails: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """99th percentile of the latency in milliseconds, by the number of connections."""
    shares: list[float] = field(default_factory=list)
    """Share of one processor that the generator used."""
    agreement: float = 1.0
    """Share of the compared labels that are ours in fp32."""
    furthest: float = 0.0
    """Largest difference of a probability from ours in fp32."""
    labels: int = 0
    """Number of distinct labels in the compared answers."""


def main(arguments: Sequence[str]) -> int:
    """Compare the peers and print the tables."""
    parser = Parser(
        prog="python -m benchmarks peers",
        description="Compare our service with other servers of the same classifier.",
    )
    parser.add_argument("--short", action="store_true", help="one short round")
    parser.add_argument(
        "--sizes", nargs="+", choices=("base", "mini", "tiny"), default=("mini", "base")
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="only peers whose names contain one of these, and ours",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        default=TEXTS,
        help="file with the texts to send, one per line (default: bundled texts)",
    )
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    options = parser.parse_args(arguments)
    findings = measure(
        options.sizes,
        read_texts(options.texts),
        rounds=1 if options.short else 6,
        seconds=3 if options.short else 10,
        only=options.only,
    )
    print(markdown(findings))
    if options.out is not None:
        write(options.out, "python -m benchmarks peers", [findings])
    return 0


def measure(
    sizes: Sequence[str],
    texts: Sequence[str],
    rounds: int,
    seconds: float,
    only: Sequence[str] | None = None,
    connections: Sequence[int] = CONNECTIONS,
) -> Findings:
    """Return the rates and ratios of every peer, or of those that `only` names.

    The targets are about the last of `connections`.
    """
    chosen = _choose(only)
    tables, targets, values = [], [], {}
    for size in sizes:
        model = model_under_test(size)
        runs, absent = run_all(model, chosen, texts, rounds, seconds, connections)
        gates = [
            f"{name}: {variant.gate.status}, {variant.gate.reason}"
            for name, variant in model.artifact.manifest.variants.items()
            if variant.gate.agreement or variant.gate.status != "passed"
        ]
        tables += [
            _rates(size, runs, absent, connections),
            _ratios(size, runs, connections, "; ".join(gates)),
        ]
        if size == "base":
            targets += _targets(runs, connections[-1])
        values[size] = {
            run.peer.name: {
                "rates": dict(run.rates),
                "p50_ms": dict(run.medians),
                "p99_ms": dict(run.tails),
            }
            for run in runs
        }
    return Findings(
        f"peers {' '.join(sizes)}",
        "How many texts per second are answered, on the same processors?",
        tables,
        targets,
        values,
    )


def _choose(only: Sequence[str] | None) -> list[Peer]:
    """Return ours and the peers that `only` names; raise BadUsage if it names none."""
    known = peers(cpus.native_precisions())
    if only is None:
        return known
    words = [word.lower() for word in only]
    chosen = [
        peer for peer in known if peer.is_ours or any(word in peer.name.lower() for word in words)
    ]
    if all(peer.is_ours for peer in chosen):
        raise BadUsage(f"No peer's name contains {' or '.join(only)}.")
    return chosen


def run_all(
    model: ModelUnderTest,
    chosen: Sequence[Peer],
    texts: Sequence[str],
    rounds: int,
    seconds: float,
    connections: Sequence[int] = CONNECTIONS,
) -> tuple[list[PeerRun], dict[str, str]]:
    """Measure every peer that starts, in turns; return the runs and the errors of the others."""
    with contextlib.ExitStack() as stack:
        runs, absent = start_all(model, chosen, stack)
        for run in runs:
            _check_answers(run, runs[0], texts)
        for number in range(rounds):
            for count in connections:
                # Half as long with fewer connections, whose answers come more evenly.
                measured_s = seconds if count == connections[-1] else seconds / 2
                # Every other round backwards, so that drift within a round favours no peer.
                for run in runs[:: -1 if number % 2 else 1]:
                    bodies = [json.dumps(run.peer.body(text)) for text in mix_lengths(texts)]
                    measure_run(run, bodies, count, measured_s)
    return runs, absent


def measure_run(run: PeerRun, bodies: Sequence[str], connections: int, seconds: float) -> None:
    """Send a load to a peer and record its result; raise CommandError if requests failed."""
    load = Load(run.server.port, run.peer.path, bodies, connections, seconds, warm_up_s=SETTLE_S)
    with run.server.unpaused():
        result = generator.run(load, split_cpus()[1])
    if result.failed or not result.requests:
        raise CommandError(
            f"{run.peer.name} answered {result.requests} requests and refused {result.failed};"
            f" its log {run.server.log} says why."
        )
    run.rates[connections].append(result.rate)
    run.medians[connections].append(result.percentile(50))
    run.tails[connections].append(result.percentile(99))
    run.shares.append(result.generator_share)


def start_all(
    model: ModelUnderTest, chosen: Sequence[Peer], stack: contextlib.ExitStack
) -> tuple[list[PeerRun], dict[str, str]]:
    """Start the peers and pause them; return the runs, and the errors of those that failed."""
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    runs, absent = [], {}
    for i, peer in enumerate(chosen):
        port = free_port()
        try:
            command = peer.command(interpreter(peer, FOLDER / "peers"), model, port)
            server = stack.enter_context(
                running_server(
                    peer.name,
                    command,
                    port,
                    logs / f"{i}.log",
                    path=peer.ready,
                    cpus=split_cpus()[0],
                    environment=peer.environment(model),
                )
            )
        except CommandError as error:
            absent[peer.name] = str(error)
            print(f"{peer.name}: {error}", flush=True)
            continue
        server.pause()
        runs.append(PeerRun(peer, server))
    return runs, absent


def _check_answers(run: PeerRun, reference: PeerRun, texts: Sequence[str]) -> None:
    """Compare a peer's answers with the reference's; raise CommandError if they differ too much."""
    answers = _answers(run, texts[:CHECKED])
    expected = _answers(reference, texts[:CHECKED])
    agreeing, distances = [], []
    for (label, score), (expected_label, expected_score) in zip(answers, expected, strict=True):
        agreeing.append(label == expected_label)
        # With two labels, the other one's probability is the complement.
        same = expected_score if label == expected_label else 1 - expected_score
        distances.append(abs(score - same))
    run.agreement = float(np.mean(agreeing))
    run.furthest = max(distances)
    run.labels = len({label for label, _ in expected})
    if run.furthest > (TOLERATED if run.peer.precision == "fp32" else TOLERATED_ROUNDED):
        raise CommandError(
            f"{run.peer.name} answers something else than our fp32: a probability differs by"
            f" {run.furthest:.2f}, {run.agreement:.0%} of the labels agree."
        )


def _answers(run: PeerRun, texts: Sequence[str]) -> list[Answer]:
    with run.server.unpaused():
        return [run.peer.answer(ask(run, run.peer.body(text))) for text in texts]


def ask(run: PeerRun, body: dict[str, Any]) -> Any:
    """Send one request to a peer that is not paused, and return its answer's JSON."""
    request = urllib.request.Request(
        f"{run.server.url}{run.peer.path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def _rates(
    size: str, runs: Sequence[PeerRun], absent: dict[str, str], connections: Sequence[int]
) -> Table:
    """Return the table of rates, latencies and answers."""
    fewest, most = connections[0], connections[-1]
    rows = [
        [
            run.peer.name,
            run.peer.engine,
            *(f"{np.median(run.rates[count]):,.1f}" for count in connections),
            f"{np.median(run.medians[fewest]):.1f}",
            f"{np.median(run.tails[most]):,.0f}",
            f"{run.agreement:.0%}",
            f"{run.furthest:.0e}",
            f"{max(run.shares):.0%}",
        ]
        for run in runs
    ]
    rows += [
        [name, error.split(": ", 1)[-1][:120], *["–"] * (len(connections) + 5)]
        for name, error in absent.items()
    ]
    columns = (
        "server",
        "engine",
        *(f"texts/s, {_count(count)}" for count in connections),
        f"p50 of {_count(fewest)}, ms",
        f"p99 of {_count(most)}, ms",
        "labels as ours in fp32",
        "furthest probability",
        "generator, of a processor",
    )
    note = (
        f"{len(split_cpus()[0])} processor(s) for the server, another one for the generator; one"
        f" text per request. {CHECKED} answers of each are compared; ours in fp32 have"
        f" {runs[0].labels} of the labels there are."
    )
    return Table(f"{size}: texts a second", columns, rows, note)


def _count(connections: int) -> str:
    return f"{connections} connection{'s' if connections > 1 else ''}"


def _ratios(size: str, runs: Sequence[PeerRun], connections: Sequence[int], gates: str) -> Table:
    """Return the table of our rate by each peer's, for our best precision and for the peer's."""
    ours = {count: _our_rates(runs, count) for count in connections}
    best = fastest(ours[connections[-1]])
    rows = []
    for run in runs:
        if run.peer.is_ours:
            continue
        by_best, same = [], []
        for count in connections:
            rates = np.array(run.rates[count])
            by_best.append(spread(ours[count][best] / rates))
            own_precision = ours[count].get(run.peer.precision)
            same.append("–" if own_precision is None else spread(own_precision / rates))
        rows.append([run.peer.name, run.peer.precision, *by_best, *same])
    columns = (
        "server",
        "its precision",
        *(f"our best ({best}), {count}" for count in connections),
        *(f"ours in its precision, {count}" for count in connections),
    )
    return Table(f"{size}: ours by theirs, by connections", columns, rows, gates)


def _our_rates(runs: Sequence[PeerRun], connections: int) -> dict[str, np.ndarray]:
    """Return our rates (rounds) by precision."""
    return {
        run.peer.precision: np.array(run.rates[connections]) for run in runs if run.peer.is_ours
    }


def fastest(rates: dict[str, np.ndarray]) -> str:
    """Return the key of the highest median rate."""
    return max(rates, key=lambda key: float(np.median(rates[key])))


def _targets(runs: Sequence[PeerRun], connections: int) -> list[Target]:
    """Return the targets at that number of connections, of the peers that were measured."""
    rates = {run.peer.name: np.array(run.rates[connections]) for run in runs}
    ours = _our_rates(runs, connections)
    best = ours[fastest(ours)]
    ratios: list[tuple[str, np.ndarray, float]] = []
    if (infinity := rates.get("Infinity (torch engine)")) is not None:
        ratios.append(("our best by Infinity's torch engine", best / infinity, 10))
        ratios.append(("ours in fp32 by Infinity's torch engine", ours["fp32"] / infinity, 2))
    ort = {run.peer.name: rates[run.peer.name] for run in runs if run.peer.engine == "onnxruntime"}
    if ort:
        name = fastest(ort)
        ratios.append((f"our best by the fastest over ONNX Runtime ({name})", best / ort[name], 2))
    for precision, rate in ours.items():
        plain = rates.get(f"FastAPI + OpenVINO {precision}, no batching")
        if plain is not None:
            ratios.append((f"ours in {precision} by OpenVINO without a batcher", rate / plain, 1.3))
    return [at_least(name, float(np.median(ratio)), limit) for name, ratio, limit in ratios]
