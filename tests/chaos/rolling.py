"""
A rolling restart of two services behind a balancer, while clients keep their connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
from pathlib import Path

from benchmarks.harness.models_under_test import model_under_test
from benchmarks.harness.processes import Server, running_server, service_command
from proof.measuring.launch import free_port
from tests.balancer import Balancer
from tests.chaos.caller import Outcomes, closed_loop, for_seconds
from tests.chaos.scenarios import SENTENCES, Row, make_row

CLIENTS = 16


async def rolling_restart(rounds: int) -> Row:
    """Restart both services `rounds` times under load.

    No request on a kept connection may be lost, refused or reset.
    """
    quiet, outcomes, codes, ports = (
        Outcomes(),
        Outcomes(),
        list[int | None](),
        [free_port(), free_port()],
    )
    artifact = str(model_under_test("mini").artifact.directory)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def begin(port: int) -> Server:
            return stack.enter_context(
                running_server(
                    "chaos",
                    service_command(f"bert={artifact}", port=port),
                    port,
                    Path(folder) / f"log-{port}",
                )
            )

        services = {port: begin(port) for port in ports}
        async with Balancer(ports).running() as balancer:
            await closed_loop(balancer.port, SENTENCES, CLIENTS, for_seconds(5), quiet)
            done = False
            load = asyncio.create_task(
                closed_loop(balancer.port, SENTENCES, CLIENTS, lambda: done, outcomes)
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
    lost = quiet.failed + outcomes.failed
    figures = (
        f"{outcomes}; {outcomes.unanswered} without an answer; exit codes"
        f" {sorted(set(codes), key=str)}; {tracebacks} tracebacks; p50"
        f" {1000 * quiet.percentile(50):.1f} → {1000 * outcomes.percentile(50):.1f} ms, p99"
        f" {1000 * quiet.percentile(99):.1f} → {1000 * outcomes.percentile(99):.1f} ms"
    )
    return make_row(
        "rolling restart with kept connections",
        f"two services behind a balancer, each restarted {rounds} times, {CLIENTS} clients; default"
        " settings",
        outcomes,
        lost,
        figures,
        lost == 0 and set(codes) == {0} and not tracebacks,
    )
