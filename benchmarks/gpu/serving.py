"""
The service over loopback: what it adds to the engine, and how it stands beside FastAPI over PyTorch
on the same GPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.gpu.engine import inputs, seconds
from benchmarks.gpu.rig import POSITIONS, VARIANT, Rig
from benchmarks.harness import generator
from benchmarks.harness.checkpoints import write_checkpoint
from benchmarks.harness.findings import Findings, Table, Target, at_least, at_most
from benchmarks.harness.generator import Load
from benchmarks.harness.processes import free_port, our_service, started
from command import CommandError

APPS = Path(__file__).parent.parent / "peers"
CONNECTIONS = (1, 8, 64, 256)


def measure(rig: Rig) -> Findings:
    """Requests a second and latency by connections, then in an open loop at half of the most;
    torch's at the same connections.
    """
    duration = 1.0 if rig.rehearsal else 5.0
    connections = (1, 2) if rig.rehearsal else CONNECTIONS
    bodies = [json.dumps({"input": text}) for text in rig.texts[:512]]
    port = free_port()
    variant = "auto" if rig.rehearsal else VARIANT
    ours = _loads(
        our_service(f"bert={rig.artifacts['bert'].directory}", "--variant", variant, port=port),
        port,
        rig,
        bodies,
        connections,
        duration,
        {},
    )
    checkpoint = write_checkpoint(
        Path(tempfile.mkdtemp(dir=rig.folder)) / "checkpoint",
        rig.size,
        seed=0,
        positions=POSITIONS[rig.size],
    )
    peer_port = free_port()
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "--app-dir",
        str(APPS),
        "app_pipeline:app",
        "--host",
        "127.0.0.1",
        "--port",
        str(peer_port),
        "--no-access-log",
        "--log-level",
        "warning",
    ]
    device = {"CHECKPOINT": str(checkpoint)} | (
        {} if rig.rehearsal else {"DEVICE": "cuda:0", "DTYPE": "float16"}
    )
    theirs: dict[int, generator.Measured] = {}
    missing = ""
    try:
        theirs = _loads(command, peer_port, rig, bodies, connections, duration, device)
    except CommandError as error:  # ours is measured all the same
        missing = f" FastAPI over torch was not measured: {error}"
    one_text = inputs(rig, 1, 32)
    engine_ms = float(np.median(seconds(lambda: rig.engine().start(one_text)())) * 1e3)
    rows = [
        [
            name,
            str(count),
            f"{one.rate:,.0f}",
            f"{one.percentile(50):.2f}",
            f"{one.percentile(99):.2f}",
            str(one.failed),
            f"{one.generator_share:.0%}",
        ]
        for name, loads in (("DrBERT Serve", ours), ("FastAPI over torch", theirs))
        for count, one in loads.items()
    ]
    most = connections[-2]
    values = {
        name: {
            str(count): {
                "rate": one.rate,
                "p50_ms": one.percentile(50),
                "p99_ms": one.percentile(99),
                "failed": one.failed,
                "generator_share": one.generator_share,
            }
            for count, one in loads.items()
        }
        for name, loads in (("ours", ours), ("torch", theirs))
    } | {"engine_ms": engine_ms}
    targets = (
        []
        if rig.rehearsal
        else [
            at_most(
                "p50 at one connection beyond the engine",
                ours[1].percentile(50) - engine_ms,
                1.5,
                " ms",
            ),
            *(
                [
                    at_least(
                        f"requests/s at {most} connections by FastAPI over torch",
                        ours[most].rate / theirs[most].rate,
                        2.0,
                    )
                ]
                if theirs
                else []
            ),
            Target(
                "requests of ours that failed",
                "0",
                str(failed := sum(one.failed for one in ours.values())),
                failed == 0,
            ),
        ]
    )
    return Findings(
        "serving",
        f"What does the service make of the engine ({rig.size})?",
        [
            Table(
                "",
                (
                    "server",
                    "connections",
                    "requests/s",
                    "p50, ms",
                    "p99, ms",
                    "failed",
                    "generator, of a processor",
                ),
                rows,
                "Over loopback, server and generator on this machine; the engine alone takes"
                f" {engine_ms:.2f} ms for one text of 32 tokens. 0 connections: an open loop at"
                f" half the rate of the most. A generator near 100 % is the limit itself.{missing}",
            ),
        ],
        targets,
        values,
    )


def _loads(
    command: Sequence[str],
    port: int,
    rig: Rig,
    bodies: Sequence[str],
    connections: Sequence[int],
    duration: float,
    environment: Mapping[str, str],
) -> dict[int, generator.Measured]:
    with started("server", command, port, rig.folder / "server.log", environment=environment):

        def send(count: int, rate: float) -> generator.Measured:
            load = Load(port, "/classify", bodies, max(1, count), duration, rate=rate)
            return generator.run(load)

        found = {count: send(count, 0.0) for count in connections}
        found[0] = send(connections[-1], found[connections[-1]].rate / 2)
    return found
