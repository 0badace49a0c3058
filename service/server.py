"""
The life of a server: bind → answer health checks → load → ready → drain → gone, with exit code 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from command import Unavailable
from service.models import Models
from service.routes import build_app

log = logging.getLogger(__name__)

LAG_EVERY_S = 0.5


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which ends a well-drained process with 143."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, before anything slow is done; Unavailable if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted connections inherit it. Event loops set it themselves only on sockets they made; without it an answer,
    # sent as head and body, waits 40 ms for the client's delayed acknowledgement.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        sock.bind((host, port))
    except socket.gaierror as error:
        sock.close()
        raise Unavailable(f"The address {host} is not known ({error.strerror}); choose another with --host.") from None
    except OSError as error:
        sock.close()
        raise Unavailable(f"Port {port} of {host} cannot be had ({error.strerror}); choose another with --port.") from None
    return sock


async def serve(models: Models, sock: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what was accepted."""
    config = uvicorn.Config(
        build_app(models), log_config=None, access_log=False, server_header=False, lifespan="off",
        timeout_graceful_shutdown=1,
        # Longer than the minute for which proxies and clients keep an idle connection: who closes last meets no reset.
        timeout_keep_alive=75,
    )
    server = _Server(config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    host, port = sock.getsockname()[:2]
    listening = asyncio.create_task(server.serve([sock]))
    watching = asyncio.create_task(_watch_event_loop(models))
    try:
        loading = asyncio.create_task(asyncio.to_thread(models.load))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            log.info("ready", extra={"url": f"http://{host}:{port}", "instance": models.instance_id, "models": list(models.loaded)})
        await asyncio.wait([stopping, listening], return_when=asyncio.FIRST_COMPLETED)
        log.info("draining", extra={"waiting": models.batcher.waiting})
        finished = await models.drain()
        log.info("drained" if finished else "drain timed out; the rest was answered with 503")
        # Answers that were just settled leave before the connections are closed.
        await models.idle(timeout_s=1)
    finally:
        watching.cancel()
        server.should_exit = True
        await listening


async def _watch_event_loop(models: Models) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        models.metrics.event_loop_lag.set(max(0.0, loop.time() - due))
