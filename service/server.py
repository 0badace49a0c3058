"""
The life of a server: bind → answer health checks → load → ready → drain → gone, with exit code 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator

import uvicorn

from command import Unavailable
from service.models import Models
from service.routes import build_app

log = logging.getLogger(__name__)

# Often enough that a loop held up for 20 ms is always seen, and one held up for 5 ms one time in four.
LAG_EVERY_S = 0.02
LAG_OVER_S = 30.0
SWITCH_S = 0.001


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


def run(models: Models, sock: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what was accepted; on uvloop where that is installed."""
    # The batcher's thread waits no longer than this for the interpreter when the event loop is busy, and the loop for it.
    sys.setswitchinterval(SWITCH_S)
    config = uvicorn.Config(
        build_app(models), log_config=None, access_log=False, server_header=False, proxy_headers=False, lifespan="off",
        timeout_graceful_shutdown=1,
        # Longer than the minute for which proxies and clients keep an idle connection: who closes last meets no reset.
        timeout_keep_alive=75,
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(serve(models, sock, config))


async def serve(models: Models, sock: socket.socket, config: uvicorn.Config) -> None:
    server = _Server(config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    host, port = sock.getsockname()[:2]
    listening = asyncio.create_task(server.serve([sock]))
    watching: asyncio.Task[None] | None = None
    try:
        loading = asyncio.create_task(asyncio.to_thread(models.load))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            settle_garbage_collection()
            # Not before: nobody waits for the event loop while models are loaded.
            watching = asyncio.create_task(_watch_event_loop(models))
            log.info("ready", extra={"url": f"http://{host}:{port}", "instance": models.instance_id, "models": list(models.loaded)})
        await asyncio.wait([stopping, listening], return_when=asyncio.FIRST_COMPLETED)
        log.info("draining", extra={"waiting": models.batcher.waiting})
        finished = await models.drain()
        log.info("drained" if finished else "drain timed out; the rest was answered with 503")
        # Answers that were just settled leave before the connections are closed.
        await models.idle(timeout_s=1)
    finally:
        if watching is not None:
            watching.cancel()
        server.should_exit = True
        await listening


def settle_garbage_collection() -> None:
    """Takes what is loaded out of the garbage collector's rounds, and lets it come round seldom.

    At its own pace it looks at everything once for every few hundred lists that a request's JSON holds: a second for
    four megabytes of them, during which nobody else is answered.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


async def _watch_event_loop(models: Models) -> None:
    """Keeps the metric of the event loop's lag: the worst over this half minute and the one before."""
    before, worst, until = 0.0, 0.0, time.monotonic() + LAG_OVER_S
    while True:
        due = time.monotonic() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        now = time.monotonic()
        worst = max(worst, now - due)
        models.metrics.event_loop_lag.set(max(before, worst))
        if now > until:
            before, worst, until = worst, 0.0, now + LAG_OVER_S
