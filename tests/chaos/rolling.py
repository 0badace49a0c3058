"""
A rolling restart: two services behind a balancer are replaced one after the other while clients
keep their connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
from pathlib import Path

from benchmarks.harness.models_under_test import subject
from benchmarks.harness.processes import Process, free_port, our_service, started
from tests.balancer import Balancer
from tests.chaos.caller import Seen, closed, for_seconds
from tests.chaos.scenarios import SENTENCES, Row, row, told

CLIENTS = 16


async def rolling_restart(rounds: int) -> Row:
    """Both services are restarted `rounds` times; no request of a kept connection may be lost,
    refused or reset.
    """
    quiet, seen, codes, ports = Seen(), Seen(), list[int | None](), [free_port(), free_port()]
    artifact = str(subject("mini").artifact.directory)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def begin(port: int) -> Process:
            return stack.enter_context(
                started(
                    "chaos",
                    our_service(f"bert={artifact}", port=port),
                    port,
                    Path(folder) / f"log-{port}",
                )
            )

        services = {port: begin(port) for port in ports}
        async with Balancer(ports).running() as balancer:
            await closed(balancer.port, SENTENCES, CLIENTS, for_seconds(5), quiet)
            done = False
            load = asyncio.create_task(
                closed(balancer.port, SENTENCES, CLIENTS, lambda: done, seen)
            )
            for port in ports * rounds:
                await asyncio.sleep(1.0)
                services[port].process.send_signal(signal.SIGTERM)
                codes.append(await asyncio.to_thread(services[port].process.wait, 60))
                services[port] = await asyncio.to_thread(begin, port)
                await balancer.wait_until_ready(port, True)
            done = True
            await load
        tracebacks = sum(
            service.log.read_text().count("Traceback") for service in services.values()
        )
    lost = quiet.requests - quiet.statuses[200] + seen.requests - seen.statuses[200]
    figures = (
        f"{told(seen)}; {seen.unanswered} without an answer; exit codes"
        f" {sorted(set(codes), key=str)}; {tracebacks} tracebacks; p50"
        f" {1000 * quiet.percentile(50):.1f} → {1000 * seen.percentile(50):.1f} ms, p99"
        f" {1000 * quiet.percentile(99):.1f} → {1000 * seen.percentile(99):.1f} ms"
    )
    return row(
        "rolling restart with kept connections",
        f"two services behind a balancer, each restarted {rounds} times, {CLIENTS} clients; default"
        " settings",
        seen,
        lost,
        figures,
        lost == 0 and set(codes) == {0} and not tracebacks,
    )
