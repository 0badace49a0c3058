"""
The life of a server: bind → answer health checks → load → ready → lame duck → drain → gone, with
exit code 0.

Two ports at most: one classifies, the other one, if it is asked for, changes what classifies.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import logging
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from command import BUG, Unavailable
from service.http.admin import build_admin
from service.http.certificate import Certificate
from service.http.endpoint import Around, limits_of
from service.http.keys import Keys
from service.http.routes import build_app
from service.http.transport.exchange import ConnectionPolicy
from service.http.transport.protocol import BoundedReads, Impatient
from service.registry import Models
from service.shadow import Pairing, Shadow
from service.telemetry import logs
from service.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Longer than the minute for which proxies and clients keep an idle connection: who closes last
meets no reset.
"""

# Often enough that a loop held up for 20 ms is always seen, and one held up for 5 ms one time in
# four.
LAG_EVERY_S = 0.02
LAG_OVER_S = 30.0
SWITCH_S = 0.001
# Connections that wait to be accepted; the system may allow fewer (net.core.somaxconn).
BACKLOG = 2048


# What the system receives of a connection before it is read: 2.5 MB/s at a round trip of 50 ms.
RECEIVE_BYTES = 131_072
# Below so many open files a warning is logged at start.
FEW_FILES = 1024
# For health checks, scrapers, and what the process opens itself.
FILES_KEPT_FREE = 16
FILES_EVERY_S = 0.5
WARN_OF_FILES_EVERY_S = 10.0
DRAINING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
IGNORED = (signal.SIGUSR1, signal.SIGUSR2)
# A lame duck has done its work when nobody has been connected for so long: who still sends new
# clients here has seen that it is not ready.
DESERTED_AFTER_S = 1.0
# What reading a body may take beyond a request's own time, where nothing but the connection limits
# it.
BODY_GRACE_S = 5.0
# Within which the process is gone after its drain, whatever it may still be waiting for.
EXIT_WITHIN_S = 5.0


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which ends a well-drained process with 143."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """Return a listening socket, before anything slow is done; Unavailable if the port is taken.
    `option` is what sets the port.

    It listens at once: with SO_REUSEADDR two servers can bind the same port, and only listen()
    refuses the second of them. Callers that connect before the event loop accepts wait in the
    backlog.
    """
    try:
        sock = socket.socket(
            socket.AF_INET6 if ":" in host else socket.AF_INET,
            socket.SOCK_STREAM,
            socket.IPPROTO_TCP,
        )
    except OSError as error:
        raise Unavailable(
            f"This host cannot listen on {host} ({error.strerror}); choose another address."
        ) from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit it. Event loops set it themselves only on sockets they made;
        # without it an answer, sent as head and body, waits 40 ms for the client's delayed
        # acknowledgement.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Else the system holds up to 6 MiB of a body that is not read yet, and counts them as the
        # container's memory.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except (
        socket.gaierror,
        UnicodeError,
        TypeError,
    ) as error:  # the last two: no text that a name could be
        sock.close()
        raise Unavailable(
            f"The address {host} is not known ({getattr(error, 'strerror', error)}); choose another"
            " with --host."
        ) from None
    except OSError as error:
        sock.close()
        taken = (
            "; another server listens there: stop it, or"
            if error.errno == errno.EADDRINUSE
            else ";"
        )
        raise Unavailable(
            f"Port {port} of {host} cannot be had ({error.strerror}){taken} choose another with"
            f" {option}."
        ) from None
    return sock


def run(
    models: Models,
    sock: socket.socket,
    admin: socket.socket | None = None,
    pairing: Pairing | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what was accepted; on uvloop where that is
    installed.

    On `admin`, where there is one, models are loaded and unloaded; `pairing` lets one model shadow
    another.
    """
    settings = models.settings
    # The batcher's thread waits no longer than this for the interpreter when the event loop is
    # busy, and the loop for it.
    sys.setswitchinterval(SWITCH_S)
    allow_many_connections()
    certificate = (
        Certificate(settings.tls_certificate, settings.tls_key)
        if settings.tls_certificate and settings.tls_key
        else None
    )
    around = Around(
        keys=watched_keys(settings.api_keys_file),
        shadow=None if pairing is None else Shadow(models, pairing, limits_of(settings)),
        tracing=Tracing(models.version) if settings.tracing else None,
    )
    tls = {"ssl_certfile": settings.tls_certificate, "ssl_keyfile": settings.tls_key}
    policy = policy_of(models)
    config = configured(build_app(models, around), policy, **tls)
    servers = [(_Server(config), sock)]
    if admin is not None:
        admin_keys = watched_keys(settings.admin_keys_file)
        servers.append((_Server(configured(build_admin(models, admin_keys), policy, **tls)), admin))
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(serve(models, servers, policy, certificate))
    if around.shadow is not None:
        log.info("shadowed", extra=around.shadow.told())
    if around.tracing is not None:
        around.tracing.close()
    leave(models)


def exit_within(seconds: float) -> None:
    """End the process with 0 if it is still there then. Its normal end waits for threads, and one
    of them may hang.
    """
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()


def leave(models: Models) -> None:
    """End the process here if work is under way that does not end, which the interpreter's own end
    would meet in a library's code.
    """
    work = models.executors.running + (["running a batch"] if models.batcher.alive else [])
    if work:
        log.warning("ending in the middle of work that nobody waits for", extra={"work": work})
        logging.shutdown()
        os._exit(0)


def watched_keys(file: Path | None) -> Keys | None:
    """The keys in a file, read again whenever it changes."""
    if file is None:
        return None
    keys = Keys(file)
    keys.watch()
    return keys


def policy_of(models: Models) -> ConnectionPolicy:
    """What all connections share, on both ports."""
    settings = models.settings
    return ConnectionPolicy(
        write_timeout_s=settings.write_timeout_s,
        body_timeout_s=settings.request_timeout_s + BODY_GRACE_S,
        linger_bytes=16 * settings.max_body_bytes,
        count=lambda reason: models.metrics.rejected.labels(reason).inc(),
    )


def configured(app: ASGIApp, policy: ConnectionPolicy | None = None, **more: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
        timeout_keep_alive=KEEP_ALIVE_S,
        ws="none",
        http=functools.partial(BoundedReads, policy=policy or ConnectionPolicy()),  # type: ignore[arg-type]
        **more,
    )


def allow_many_connections() -> None:
    """As many open files as the system allows: the usual 1,024 are soon taken by clients that keep
    their connections.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < FEW_FILES:
        log.warning(
            "this process may open few files, and each connection is one; raise ulimit -n",
            extra={"limit": limit, "recommended": FEW_FILES},
        )


async def serve(
    models: Models,
    servers: Sequence[tuple[uvicorn.Server, socket.socket]],
    policy: ConnectionPolicy,
    certificate: Certificate | None = None,
) -> None:
    """Runs the servers, the first of which classifies, until a signal."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    handle_signals(loop, stop)

    urls = [
        f"http{'s' if server.config.is_ssl else ''}://{host}:{port}"
        for server, sock in servers
        for host, port in [sock.getsockname()[:2]]
    ]
    listening = [asyncio.create_task(server.serve([sock])) for server, sock in servers]
    watching = [asyncio.create_task(_watch_open_files([server for server, _ in servers]))]
    try:
        loading = asyncio.create_task(models.executors.loading.run(models.load))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            settle_garbage_collection()
            # Not before: nobody waits for the event loop while models are loaded.
            watching += [
                asyncio.create_task(_watch_event_loop(models)),
                asyncio.create_task(_watch_engine(models)),
            ]
            if certificate is not None:
                shown = [
                    server.config.ssl for server, _ in servers if server.config.ssl is not None
                ]
                certificate.watch(shown, loop)
            told = {"url": urls[0], "instance": models.instance_id, "models": list(models.loaded)}
            log.info("ready", extra=told | ({"admin_url": urls[1]} if len(urls) > 1 else {}))
        await asyncio.wait([stopping, *listening], return_when=asyncio.FIRST_COMPLETED)
        log.info("draining", extra={"waiting": models.batcher.waiting})
        give_up = loop.time() + models.settings.drain_timeout_s
        policy.is_draining = True
        models.start_draining()
        if loading.done():
            await lame_duck(
                servers[0][0], min(models.settings.lame_duck_s, models.settings.drain_timeout_s / 2)
            )
        stop_listening([server for server, _ in servers])
        finished = await models.drain(give_up - loop.time())
        log.info("drained" if finished else "drain timed out; the rest was answered with 503")
        # Answers that were just settled leave before the connections are closed, however slowly
        # they are read.
        await models.idle(timeout_s=1)
        await written([server for server, _ in servers], give_up)
        end_connections([server for server, _ in servers])
        exit_within(EXIT_WITHIN_S)
    finally:
        for task in watching:
            task.cancel()
        for server, _ in servers:
            server.should_exit = True
        await asyncio.gather(*listening)


def ignore_signals() -> None:
    """Let no signal of IGNORED end the process, which is what they do by default; for the time
    until the loop handles them.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)


def handle_signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Stop at the signals that drain; log those that do nothing."""
    for number in DRAINING:
        # nohup starts a process that ignores SIGHUP, so that it outlives its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, stop.set)
    for number in IGNORED:
        loop.add_signal_handler(number, _log_ignored, number.name)


def _log_ignored(name: str) -> None:
    log.warning("signal ignored", extra={"signal": name})


async def lame_duck(server: uvicorn.Server, seconds: float) -> None:
    """Lets requests be answered, each with Connection: close, until nobody has been connected for a
    while; at once if nobody is.
    """
    loop = asyncio.get_running_loop()
    now = loop.time()
    until, deserted_at = now + seconds, now - DESERTED_AFTER_S
    while now < until:
        if server.server_state.connections:
            deserted_at = now
        elif now - deserted_at >= DESERTED_AFTER_S:
            return
        await asyncio.sleep(0.01)
        now = loop.time()


def stop_listening(servers: Sequence[uvicorn.Server]) -> None:
    """Takes no new connections; those there are stay."""
    for server in servers:
        if server.started:
            for listener in server.servers:
                listener.close()


def end_connections(servers: Sequence[uvicorn.Server]) -> None:
    """Closes every connection; uvicorn would cancel what is under way on them, with a traceback."""
    for server in servers:
        for connection in list(server.server_state.connections):
            if isinstance(connection, Impatient):
                connection.end()


async def written(servers: Sequence[uvicorn.Server], give_up: float) -> None:
    """Waits until every answer that was begun has been handed to the system, until `give_up` by the
    loop's clock.
    """
    loop = asyncio.get_running_loop()
    while loop.time() < give_up and any(
        one.writes
        for server in servers
        for one in server.server_state.connections
        if isinstance(one, Impatient)
    ):
        await asyncio.sleep(0.01)


def settle_garbage_collection() -> None:
    """Takes what is loaded out of the garbage collector's rounds, and lets it come round seldom.

    At its own pace it looks at everything once for every few hundred lists that a request's JSON
    holds: a second for four megabytes of them, during which nobody else is answered.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def free_files() -> int:
    """How many more files this process may open, at least; 0 if the limit is reached."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        lowest = os.open(os.devnull, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        return 0
    os.close(lowest)
    # The lowest number that is free is given, so all numbers from there on may be.
    return FEW_FILES if limit == resource.RLIM_INFINITY else limit - lowest


async def _watch_open_files(servers: Sequence[uvicorn.Server]) -> None:
    """Makes room when the limit of open files is near: closes connections that wait for nothing,
    and others after their answer.

    At the limit the event loop accepts and drops each new connection without a word, health checks
    too.
    """
    warned = -math.inf
    while True:
        await asyncio.sleep(FILES_EVERY_S)
        free = free_files()
        if free >= FILES_KEPT_FREE:
            continue
        connections = [
            connection for server in servers for connection in server.server_state.connections
        ]
        # Those without a request first: uvicorn closes these at once, and the others once they are
        # answered.
        connections.sort(key=_is_answering)
        closed = connections[: 2 * (FILES_KEPT_FREE - free)]
        for connection in closed:
            connection.shutdown()
        if time.monotonic() - warned >= WARN_OF_FILES_EVERY_S:
            warned = time.monotonic()
            log.error(
                "the limit of open files is near or reached: new connections may be dropped, and"
                " idle ones are closed; raise ulimit -n",
                extra={
                    "limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                    "free": free,
                    "connections": len(connections),
                    "closed": len(closed),
                },
            )


def _is_answering(connection: Any) -> bool:
    return connection.cycle is not None and not connection.cycle.response_complete


async def _watch_event_loop(models: Models) -> None:
    """Keeps the metric of the event loop's lag: the worst over this half minute and the one
    before.
    """
    before, worst, until = 0.0, 0.0, time.monotonic() + LAG_OVER_S
    while True:
        due = time.monotonic() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        now = time.monotonic()
        worst = max(worst, now - due)
        models.metrics.event_loop_lag.set(max(before, worst))
        if now > until:
            before, worst, until = worst, 0.0, now + LAG_OVER_S


class Pauses:
    """When this process did not run, as under SIGSTOP or in a machine that was paused: seen by a
    tick that comes late.
    """

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        self._last = time.monotonic()
        self._pauses: list[tuple[float, float]] = []

    def tick(self) -> None:
        """Note the time since the last tick, which was due `tick_s` ago; what it is late by was a
        pause.
        """
        now = time.monotonic()
        if now - self._last > 2 * self._tick_s:
            self._pauses.append((self._last + self._tick_s, now))
        self._last = now

    def seconds_since(self, begin: float) -> float:
        """How much of the time since `begin` was pauses. Those that ended before it are
        forgotten.
        """
        self._pauses = [(start, end) for start, end in self._pauses if end > begin]
        return sum(end - max(start, begin) for start, end in self._pauses)


async def _watch_engine(models: Models) -> None:
    """Ends a process whose engine does not come back, or whose batcher has ended: nothing else in
    it could help, and a supervisor starts another one.
    """
    limit_s = models.settings.engine_stall_timeout_s
    tick_s = min(1.0, limit_s / 10)
    pauses = Pauses(tick_s)
    while True:
        await asyncio.sleep(tick_s)
        pauses.tick()
        if models.batcher.died or models.batcher.broken:
            log.critical(
                "the thread that runs the models has ended; ending"
                if models.batcher.died
                else "the engine is broken; ending"
            )
            await models.batcher.close(timeout_s=0.1)  # whoever waits is told
            await models.idle(timeout_s=1)
            logs.flush()
            os._exit(BUG)
        elapsed_s = models.batcher.stuck_s
        # The engine was paused as well, so that time says nothing of it.
        stuck_s = elapsed_s - pauses.seconds_since(time.monotonic() - elapsed_s)
        if (stuck_s > limit_s) != models.stalled:
            models.note_stall(stuck_s > limit_s)
            log.error(
                "the engine is stuck" if models.stalled else "the engine came back",
                extra={"seconds": round(stuck_s, 1), "limit_s": limit_s},
            )
        if stuck_s > 2 * limit_s:
            log.critical(
                "the engine did not come back; ending",
                extra={"seconds": round(stuck_s, 1), "waiting": models.batcher.waiting},
            )
            await models.batcher.close(timeout_s=0.1)  # whoever waits is told
            await models.idle(timeout_s=1)
            # Not by sys.exit: the thread in the engine would be waited for.
            logs.flush()
            os._exit(BUG)
