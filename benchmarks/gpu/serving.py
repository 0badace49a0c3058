"""
The service over loopback: what it adds to the engine, compared with FastAPI over PyTorch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.gpu.engine import inputs, seconds
from benchmarks.gpu.gpu_setup import POSITIONS, VARIANT, GpuSetup
from benchmarks.harness import generator
from benchmarks.harness.checkpoints import write_checkpoint
from benchmarks.harness.findings import Findings, Table, Target, at_least, at_most
from benchmarks.harness.generator import Load, LoadResult
from benchmarks.harness.processes import running_server, service_command, uvicorn_command
from command import CommandError
from proof.measuring.launch import free_port

APPS = Path(__file__).parent.parent / "peers"
CONNECTIONS = (1, 8, 64, 256)

Loads = dict[int, LoadResult]
"""Results by the number of connections; 0 is the open loop."""


def measure(setup: GpuSetup) -> Findings:
    """Return rates and latencies of the service and of FastAPI over torch, by connections.

    The open loop runs at half the rate of the most connections. If the peer cannot be measured, the
    service is measured all the same.
    """
    connections = (1, 2) if setup.dry_run else CONNECTIONS
    bodies = [json.dumps({"input": text}) for text in setup.texts[:512]]
    ours = _our_loads(setup, bodies, connections)
    peer: Loads = {}
    missing = ""
    try:
        peer = _peer_loads(setup, bodies, connections)
    except CommandError as error:
        missing = f" FastAPI over torch was not measured: {error}"
    one_text = inputs(setup, 1, 32)
    engine_ms = float(np.median(seconds(lambda: setup.engine().start(one_text)())) * 1e3)
    most = connections[-2]
    return Findings(
        "serving",
        f"What does the service make of the engine ({setup.size})?",
        [_table({"DrBERT Serve": ours, "FastAPI over torch": peer}, engine_ms, missing)],
        [] if setup.dry_run else _targets(ours, peer, engine_ms, most),
        {"ours": _values(ours), "torch": _values(peer), "engine_ms": engine_ms},
    )


def _our_loads(setup: GpuSetup, bodies: Sequence[str], connections: Sequence[int]) -> Loads:
    port = free_port()
    variant = "auto" if setup.dry_run else VARIANT
    artifact = setup.artifacts["bert"].directory
    command = service_command(f"bert={artifact}", "--variant", variant, port=port)
    return _loads(command, port, setup, bodies, connections, {})


def _peer_loads(setup: GpuSetup, bodies: Sequence[str], connections: Sequence[int]) -> Loads:
    checkpoint = write_checkpoint(
        Path(tempfile.mkdtemp(dir=setup.folder)) / "checkpoint",
        setup.size,
        seed=0,
        positions=POSITIONS[setup.size],
    )
    environment = {"CHECKPOINT": str(checkpoint)}
    if not setup.dry_run:
        environment |= {"DEVICE": "cuda:0", "DTYPE": "float16"}
    port = free_port()
    command = uvicorn_command("app_pipeline:app", APPS, port)
    return _loads(command, port, setup, bodies, connections, environment)


def _loads(
    command: Sequence[str],
    port: int,
    setup: GpuSetup,
    bodies: Sequence[str],
    connections: Sequence[int],
    environment: Mapping[str, str],
) -> Loads:
    """Run a server and return its results for each number of connections, and the open loop's."""
    log = setup.folder / "server.log"
    duration = 1.0 if setup.dry_run else 5.0

    def send(count: int, rate: float) -> LoadResult:
        return generator.run(Load(port, "/classify", bodies, count, duration, rate=rate))

    with running_server("server", command, port, log, environment=environment):
        results = {count: send(count, 0.0) for count in connections}
        results[0] = send(connections[-1], results[connections[-1]].rate / 2)
    return results


def _table(servers: Mapping[str, Loads], engine_ms: float, missing: str) -> Table:
    rows = []
    for name, loads in servers.items():
        for count, result in loads.items():
            rows.append(
                [
                    name,
                    str(count),
                    f"{result.rate:,.0f}",
                    f"{result.percentile(50):.2f}",
                    f"{result.percentile(99):.2f}",
                    str(result.failed),
                    f"{result.generator_share:.0%}",
                ]
            )
    columns = (
        "server",
        "connections",
        "requests/s",
        "p50, ms",
        "p99, ms",
        "failed",
        "generator, of a processor",
    )
    note = (
        "Over loopback, server and generator on this machine. The engine alone takes"
        f" {engine_ms:.2f} ms for one text of 32 tokens. 0 connections: an open loop at half the"
        f" rate of the most. A generator near 100 % is itself the limit.{missing}"
    )
    return Table("", columns, rows, note)


def _values(loads: Loads) -> dict[str, dict[str, float]]:
    return {
        str(count): {
            "rate": result.rate,
            "p50_ms": result.percentile(50),
            "p99_ms": result.percentile(99),
            "failed": result.failed,
            "generator_share": result.generator_share,
        }
        for count, result in loads.items()
    }


def _targets(ours: Loads, peer: Loads, engine_ms: float, most: int) -> list[Target]:
    """Return the targets; `most` is the number of connections at which rates are compared."""
    added_ms = ours[1].percentile(50) - engine_ms
    targets = [at_most("p50 at one connection beyond the engine", added_ms, 1.5, " ms")]
    if peer:
        name = f"requests/s at {most} connections by FastAPI over torch"
        targets.append(at_least(name, ours[most].rate / peer[most].rate, 2.0))
    failed = sum(result.failed for result in ours.values())
    targets.append(Target("requests of ours that failed", "0", str(failed), failed == 0))
    return targets
