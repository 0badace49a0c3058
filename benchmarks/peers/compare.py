"""
The same checkpoint, texts, processors and generator: how many texts a second do we answer, and how
many do others?

    python -m benchmarks peers [--short] [--texts FILE] [--sizes mini base] [--only NAME ...] [--out
        FILE]

All servers are started once and stopped in their tracks (SIGSTOP) while another one is measured. A
round goes through the numbers of connections and, with each, through all servers, every other round
backwards; ratios are taken within a round, of loads that lie a few minutes apart at most. Answers
are held against ours in fp32, and a server that answers something else is an error.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.harness import generator
from benchmarks.harness.findings import Findings, Table, Target, at_least, markdown, spread, write
from benchmarks.harness.generator import Load
from benchmarks.harness.models_under_test import FOLDER, Subject, subject
from benchmarks.harness.processes import Process, free_port, halves, started
from benchmarks.harness.texts import TEXTS, evenly, read_lines
from benchmarks.peers.peer import Answer, Peer, interpreter, peers
from command import BadUsage, CommandError, Parser
from service.host import cpus

CONNECTIONS = (1, 8, 32)
CHECKED = 24
# By how much a probability may differ from ours in fp32, in the same precision and in a lower one.
TOLERATED, TOLERATED_ROUNDED = 0.01, 0.25
SETTLE_S = 2.0
"""Of every load, sent before anything counts: who was stopped finds its caches and its queue again.
"""


@dataclass
class Running:
    peer: Peer
    server: Process
    rates: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Texts a second by the number of connections, as what follows."""
    medians: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    tails: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    shares: list[float] = field(default_factory=list)
    """Of a processor, what the generator took."""
    agreement: float = 1.0
    furthest: float = 0.0
    """The largest difference of a probability from ours in fp32."""
    labels: int = 0
    """Of how many kinds are the labels that were compared."""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks peers",
        description="Measure ours beside other servers of the same classifier.",
    )
    parser.add_argument("--short", action="store_true", help="one short round")
    parser.add_argument(
        "--sizes", nargs="+", choices=("base", "mini", "tiny"), default=("mini", "base")
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="only peers whose names hold one of these, and ours",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        default=TEXTS,
        help="texts to send, one a line (default: some that come along)",
    )
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    given = parser.parse_args(arguments)
    found = measure(
        given.sizes,
        read_lines(given.texts),
        rounds=1 if given.short else 6,
        seconds=3 if given.short else 10,
        only=given.only,
    )
    print(markdown(found))
    if given.out is not None:
        write(given.out, "python -m benchmarks peers", [found])
    return 0


def measure(
    sizes: Sequence[str],
    texts: Sequence[str],
    rounds: int,
    seconds: float,
    only: Sequence[str] | None = None,
    connections: Sequence[int] = CONNECTIONS,
) -> Findings:
    """Rates and ratios of every peer, or of those that `only` names; the last of `connections` is
    what the targets are of.
    """
    chosen = [
        peer
        for peer in peers(cpus.native_precisions())
        if only is None
        or not peer.requirements
        or any(word.lower() in peer.name.lower() for word in only)
    ]
    if only is not None and all(not peer.requirements for peer in chosen):
        raise BadUsage(f"No peer's name holds {' or '.join(only)}.")
    tables, targets, values = [], [], {}
    for size in sizes:
        each = subject(size)
        running, absent = run_all(each, chosen, texts, rounds, seconds, connections)
        gates = [
            f"{name}: {variant.gate.status}, {variant.gate.reason}"
            for name, variant in each.artifact.manifest.variants.items()
            if variant.gate.agreement or variant.gate.status != "passed"
        ]
        tables += [
            _rates(size, running, absent, connections),
            _ratios(size, running, connections, "; ".join(gates)),
        ]
        if size == "base":
            targets += _targets(running, connections[-1])
        values[size] = {
            one.peer.name: {
                "rates": dict(one.rates),
                "p50_ms": dict(one.medians),
                "p99_ms": dict(one.tails),
            }
            for one in running
        }
    return Findings(
        f"peers {' '.join(sizes)}",
        "How many texts a second are answered, on the same processors?",
        tables,
        targets,
        values,
    )


def run_all(
    each: Subject,
    chosen: Sequence[Peer],
    texts: Sequence[str],
    rounds: int,
    seconds: float,
    connections: Sequence[int] = CONNECTIONS,
) -> tuple[list[Running], dict[str, str]]:
    """Every peer that could be started, measured in turns; and why the others could not."""
    theirs = halves()[1]
    with contextlib.ExitStack() as stack:
        running, absent = _start_all(each, chosen, stack)
        for one in running:
            with _awake(one):
                _check(one, running[0], texts)
        for number in range(rounds):
            # Every other round backwards, so that drift within a round favours nobody.
            for many in connections:
                # Half as long with fewer connections, whose answers come more evenly.
                counted = seconds if many == connections[-1] else seconds / 2
                for one in running[:: -1 if number % 2 else 1]:
                    _measure(one, texts, many, counted, theirs)
    return running, absent


def _measure(
    one: Running, texts: Sequence[str], connections: int, seconds: float, theirs: set[int]
) -> None:
    bodies = [json.dumps(one.peer.body(text)) for text in evenly(texts)]
    with _awake(one):
        seen = generator.run(
            Load(one.server.port, "/classify", bodies, connections, seconds, warm_up_s=SETTLE_S),
            theirs,
        )
    if seen.failed or not seen.requests:
        raise CommandError(
            f"{one.peer.name} answered {seen.requests} requests and refused {seen.failed};"
            f" {one.server.log} says why."
        )
    one.rates[connections].append(seen.rate)
    one.medians[connections].append(seen.percentile(50))
    one.tails[connections].append(seen.percentile(99))
    one.shares.append(seen.generator_share)


def _start_all(
    each: Subject, chosen: Sequence[Peer], stack: contextlib.ExitStack
) -> tuple[list[Running], dict[str, str]]:
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    running, absent = [], {}
    for i, peer in enumerate(chosen):
        port = free_port()
        try:
            command = peer.command(interpreter(peer, FOLDER / "peers"), each, port)
            server = stack.enter_context(
                started(
                    peer.name,
                    command,
                    port,
                    logs / f"{i}.log",
                    path=peer.ready,
                    cpus=halves()[0],
                    environment=peer.environment(each),
                )
            )
        except CommandError as error:
            absent[peer.name] = str(error)
            print(f"{peer.name}: {error}", flush=True)
            continue
        server.pause()
        running.append(Running(peer, server))
    return running, absent


@contextlib.contextmanager
def _awake(one: Running) -> Iterator[None]:
    one.server.go_on()
    try:
        yield
    finally:
        one.server.pause()


def _check(one: Running, reference: Running, texts: Sequence[str]) -> None:
    """How far its answers are from the reference's."""
    if one is not reference:
        reference.server.go_on()
    pairs = [(_ask(one, text), _ask(reference, text)) for text in texts[:CHECKED]]
    if one is not reference:
        reference.server.pause()
    one.agreement = float(np.mean([own[0] == other[0] for own, other in pairs]))
    one.furthest = max(
        abs(own[1] - (other[1] if own[0] == other[0] else 1 - other[1])) for own, other in pairs
    )
    one.labels = len({other[0] for _, other in pairs})
    if one.furthest > (TOLERATED if one.peer.precision == "fp32" else TOLERATED_ROUNDED):
        raise CommandError(
            f"{one.peer.name} answers something else than our fp32: a probability differs by"
            f" {one.furthest:.2f}, {one.agreement:.0%} of the labels agree."
        )


def _ask(one: Running, text: str) -> Answer:
    request = urllib.request.Request(
        f"{one.server.url}/classify",
        json.dumps(one.peer.body(text)).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return one.peer.answer(json.load(response))


def _rates(
    size: str, running: Sequence[Running], absent: dict[str, str], connections: Sequence[int]
) -> Table:
    fewest, most = connections[0], connections[-1]
    rows = [
        [
            one.peer.name,
            one.peer.engine,
            *(f"{np.median(one.rates[c]):,.1f}" for c in connections),
            f"{np.median(one.medians[fewest]):.1f}",
            f"{np.median(one.tails[most]):,.0f}",
            f"{one.agreement:.0%}",
            f"{one.furthest:.0e}",
            f"{max(one.shares):.0%}",
        ]
        for one in running
    ]
    rows += [
        [name, why.split(": ", 1)[-1][:120], *["–"] * (len(connections) + 5)]
        for name, why in absent.items()
    ]
    columns = (
        "server",
        "engine",
        *(f"texts/s, {_told(c)}" for c in connections),
        f"p50 of {_told(fewest)}, ms",
        f"p99 of {_told(most)}, ms",
        "labels as ours in fp32",
        "furthest probability",
        "generator, of a processor",
    )
    note = (
        f"{len(halves()[0])} processor(s) for the server, another one for the generator; one text a"
        " request. "
    )
    note += (
        f"{CHECKED} answers of each are compared; ours in fp32 have {running[0].labels} of the"
        " labels there are."
    )
    return Table(f"{size}: texts a second", columns, rows, note)


def _told(connections: int) -> str:
    return f"{connections} connection{'s' if connections > 1 else ''}"


def _ratios(size: str, running: Sequence[Running], connections: Sequence[int], gate: str) -> Table:
    """Ours by each, best against best and in the same precision, at every number of connections."""
    mine = {
        c: {
            one.peer.precision: np.array(one.rates[c])
            for one in running
            if not one.peer.requirements
        }
        for c in connections
    }
    best = _best_of(mine[connections[-1]])
    rows = []
    for one in running:
        if one.peer.requirements:
            by_best = [spread(mine[c][best] / np.array(one.rates[c])) for c in connections]
            same = [
                (
                    spread(mine[c][one.peer.precision] / np.array(one.rates[c]))
                    if one.peer.precision in mine[c]
                    else "–"
                )
                for c in connections
            ]
            rows.append([one.peer.name, one.peer.precision, *by_best, *same])
    columns = (
        "server",
        "its precision",
        *(f"our best ({best}), {c}" for c in connections),
        *(f"ours in its precision, {c}" for c in connections),
    )
    return Table(f"{size}: ours by theirs, by connections", columns, rows, gate)


def _best_of(rates: dict[str, np.ndarray]) -> str:
    return max(rates, key=lambda precision: float(np.median(rates[precision])))


def _targets(running: Sequence[Running], most: int) -> list[Target]:
    rates = {one.peer.name: np.array(one.rates[most]) for one in running}
    mine = {
        one.peer.precision: rates[one.peer.name] for one in running if not one.peer.requirements
    }
    best = mine[_best_of(mine)]
    found = []
    if (infinity := rates.get("Infinity (torch engine)")) is not None:
        found.append(
            at_least("our best by Infinity's torch engine", float(np.median(best / infinity)), 10)
        )
        found.append(
            at_least(
                "ours in fp32 by Infinity's torch engine",
                float(np.median(mine["fp32"] / infinity)),
                2,
            )
        )
    ort = {
        one.peer.name: rates[one.peer.name] for one in running if one.peer.engine == "onnxruntime"
    }
    if ort:
        fastest = ort[_best_of(ort)]
        found.append(
            at_least(
                f"our best by the fastest over ONNX Runtime ({_best_of(ort)})",
                float(np.median(best / fastest)),
                2,
            )
        )
    for precision, own in mine.items():
        plain = rates.get(f"FastAPI + OpenVINO {precision}, no batching")
        if plain is not None:
            found.append(
                at_least(
                    f"ours in {precision} by OpenVINO without a batcher",
                    float(np.median(own / plain)),
                    1.3,
                )
            )
    return found
