"""
The server process: bind → answer health checks → load → ready → lame duck → drain → exit code 0.

It has a public port, which classifies, and if it is configured a private port, which loads and
unloads models.
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
from typing import Any, NoReturn

import uvicorn
from starlette.types import ASGIApp

from command import BUG, Unavailable
from service.host import cpu_time
from service.http.admin import build_admin
from service.http.certificate import Certificate
from service.http.context import HttpContext, RequestHooks, request_limits
from service.http.keys import Keys
from service.http.routes import build_app
from service.http.transport.exchange import ConnectionPolicy
from service.http.transport.protocol import BoundedReads, LimitedHttpProtocol
from service.shadow import Pairing, Shadow
from service.state import ServiceState
from service.telemetry import logs
from service.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Longer than the minute for which proxies and clients keep an idle connection open.

The side that closes last meets no reset.
"""

# A loop that is blocked for 20 ms is always noticed, and one blocked for 5 ms one time in four.
LAG_EVERY_S = 0.02
LAG_OVER_S = 30.0
SWITCH_S = 0.001
# Connections that wait to be accepted. The system may allow fewer (net.core.somaxconn).
BACKLOG = 2048


# The system's receive buffer of a connection: 2.5 MB/s at a round trip of 50 ms.
RECEIVE_BYTES = 131_072
# Below so many open files a warning is logged at start.
FEW_FILES = 1024
# Files for health checks, scrapers, and what the process opens itself.
RESERVED_FILES = 16
FILES_EVERY_S = 0.5
FILES_WARNING_EVERY_S = 10.0
DRAINING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
IGNORED = (signal.SIGUSR1, signal.SIGUSR2)
# The lame-duck phase ends when no client has been connected for so long: by then, load balancers
# have noticed that the server is not ready.
UNUSED_AFTER_S = 1.0
# Reading a body may take so much longer than a request's own time, where only the connection limits
# it.
BODY_GRACE_S = 5.0
# The process ends within so many seconds of its drain, whatever it may still wait for.
EXIT_WITHIN_S = 5.0


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which ends a well-drained process with 143."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """Return a listening socket; raises Unavailable if the port is taken.

    `option` is the name of the option that sets the port. The socket listens at once: with
    SO_REUSEADDR two servers can bind the same port, and only listen() refuses the second one.
    Clients that connect before the event loop accepts wait in the backlog. `::` means every address
    of both families, or of IPv4 where the system has no IPv6.
    """
    if host == "::" and not _has_ipv6():
        host = "0.0.0.0"
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
        if host == "::":
            # Some systems have another default.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Accepted connections inherit it; event loops set it only on sockets that they made.
        # Without it an answer, sent as head and body, waits 40 ms for a delayed acknowledgement.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Otherwise the system buffers up to 6 MiB of an unread body, which count as the container's
        # memory.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except (socket.gaierror, UnicodeError, TypeError) as error:
        # The last two: the text cannot be a host name.
        sock.close()
        raise Unavailable(
            f"The address {host} is not known ({getattr(error, 'strerror', error)}); choose another"
            " with --host."
        ) from None
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            reason = "is in use: another server listens there. Stop it, or"
        else:
            reason = f"cannot be opened ({error.strerror});"
        raise Unavailable(f"Port {port} of {host} {reason} choose another with {option}.") from None
    return sock


def _has_ipv6() -> bool:
    """Return whether the system has IPv6: a kernel may know it and have it switched off."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def run(
    service: ServiceState,
    sock: socket.socket,
    admin: socket.socket | None = None,
    pairing: Pairing | None = None,
) -> None:
    """Serve until a signal of DRAINING, then finish the accepted requests.

    `sock` is the public port, `admin` the private one. `pairing` lets one model shadow another.
    uvloop is used if it is installed.
    """
    settings = service.settings
    # The batcher's thread and the event loop wait no longer than this for each other's GIL.
    sys.setswitchinterval(SWITCH_S)
    allow_many_connections()
    certificate = (
        Certificate(settings.tls_certificate, settings.tls_key)
        if settings.tls_certificate and settings.tls_key
        else None
    )
    hooks = RequestHooks(
        keys=watched_keys(settings.api_keys_file),
        shadow=None if pairing is None else Shadow(service, pairing, request_limits(settings)),
        tracing=Tracing(service.version) if settings.tracing else None,
    )
    context = HttpContext(service, hooks)
    tls = {"ssl_certfile": settings.tls_certificate, "ssl_keyfile": settings.tls_key}
    policy = connection_policy(service)
    config = uvicorn_config(build_app(context), policy, **tls)
    servers = [(_Server(config), sock)]
    if admin is not None:
        admin_keys = watched_keys(settings.admin_keys_file)
        admin_config = uvicorn_config(build_admin(context, admin_keys), policy, **tls)
        servers.append((_Server(admin_config), admin))
    runner = asyncio.Runner(loop_factory=config.get_loop_factory())
    with runner, cpu_time.excluded_thread():
        runner.run(serve(service, servers, policy, certificate))
    if hooks.shadow is not None:
        log.info("shadowed", extra=hooks.shadow.summary())
    if hooks.tracing is not None:
        hooks.tracing.close()
    exit_if_busy(service)


def exit_within(seconds: float) -> None:
    """End the process with exit code 0 after `seconds`, if it is still there.

    Its normal end waits for threads, and one of them may hang.
    """
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()


def exit_if_busy(service: ServiceState) -> None:
    """End the process here if a thread still works.

    Otherwise the interpreter's own end would interrupt it in the middle of a library's code.
    """
    work = service.executors.running + (["running a batch"] if service.batcher.is_alive else [])
    if work:
        log.warning("exiting while abandoned work is still running", extra={"work": work})
        logging.shutdown()
        os._exit(0)


def watched_keys(file: Path | None) -> Keys | None:
    """Return the keys of a file, which is read again whenever it changes."""
    if file is None:
        return None
    keys = Keys(file)
    keys.watch()
    return keys


def connection_policy(service: ServiceState) -> ConnectionPolicy:
    """Return what all connections share, on both ports."""
    settings = service.settings
    return ConnectionPolicy(
        write_timeout_s=settings.write_timeout_s,
        body_timeout_s=settings.request_timeout_s + BODY_GRACE_S,
        linger_bytes=16 * settings.max_body_bytes,
        max_age_s=settings.max_connection_age_s or None,
        max_requests=settings.max_connection_requests or None,
        count=lambda reason: service.metrics.rejected.labels(reason).inc(),
    )


def uvicorn_config(
    app: ASGIApp, policy: ConnectionPolicy | None = None, **more: Any
) -> uvicorn.Config:
    """Return uvicorn's configuration with LimitedHttpProtocol; `more` are further options of it."""
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
    """Raise the limit of open files as far as the system allows.

    The usual 1,024 are soon used up by clients that keep their connections.
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
    service: ServiceState,
    servers: Sequence[tuple[uvicorn.Server, socket.socket]],
    policy: ConnectionPolicy,
    certificate: Certificate | None = None,
) -> None:
    """Run the servers until a signal; the first one is the public port."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    handle_signals(loop, stop)

    urls = [
        f"http{'s' if server.config.is_ssl else ''}://{f'[{host}]' if ':' in host else host}:{port}"
        for server, sock in servers
        for host, port in [sock.getsockname()[:2]]
    ]
    listening = [asyncio.create_task(server.serve([sock])) for server, sock in servers]
    watching = [asyncio.create_task(_watch_open_files([server for server, _ in servers]))]
    try:
        loading = asyncio.create_task(service.executors.loading.run(service.lifecycle.load))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            settle_garbage_collection()
            # Not earlier: no request waits for the event loop while models are loaded.
            watching += [
                asyncio.create_task(_watch_event_loop(service)),
                asyncio.create_task(_watch_engine(service)),
            ]
            if certificate is not None:
                contexts = [server.config.ssl for server, _ in servers if server.config.ssl]
                certificate.watch(contexts, loop)
            ready: dict[str, Any] = {
                "url": urls[0],
                "docs": f"{urls[0]}/docs",
                "instance": service.instance_id,
                "models": list(service.registry.loaded),
            }
            if len(urls) > 1:
                ready["admin_url"] = urls[1]
            log.info("ready", extra=ready)
        await asyncio.wait([stopping, *listening], return_when=asyncio.FIRST_COMPLETED)
        log.info("draining", extra={"waiting": service.batcher.waiting})
        deadline = loop.time() + service.settings.drain_timeout_s
        policy.is_draining = True
        service.lifecycle.start_draining()
        if loading.done():
            settings = service.settings
            await lame_duck(servers[0][0], min(settings.lame_duck_s, settings.drain_timeout_s / 2))
        stop_listening([server for server, _ in servers])
        finished = await service.lifecycle.drain(deadline - loop.time())
        log.info("drained" if finished else "drain timed out; the rest was answered with 503")
        # Answers that are ready are sent before the connections are closed, however slowly clients
        # read them.
        await service.lifecycle.wait_until_idle(timeout_s=1)
        await wait_until_sent([server for server, _ in servers], deadline)
        end_connections([server for server, _ in servers])
        exit_within(EXIT_WITHIN_S)
    finally:
        for task in watching:
            task.cancel()
        for server, _ in servers:
            server.should_exit = True
        await asyncio.gather(*listening)


def ignore_signals() -> None:
    """Ignore the signals of IGNORED until the loop handles them; by default they end a process."""
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
    """Answer requests, each with Connection: close, until no client was connected for a while.

    Return at once if no client is connected, and after `seconds` at the latest.
    """
    loop = asyncio.get_running_loop()
    now = loop.time()
    end, last_used = now + seconds, now - UNUSED_AFTER_S
    while now < end:
        if server.server_state.connections:
            last_used = now
        elif now - last_used >= UNUSED_AFTER_S:
            return
        await asyncio.sleep(0.01)
        now = loop.time()


def stop_listening(servers: Sequence[uvicorn.Server]) -> None:
    """Accept no new connections; existing ones stay open."""
    for server in servers:
        if server.started:
            for listener in server.servers:
                listener.close()


def end_connections(servers: Sequence[uvicorn.Server]) -> None:
    """Close every connection. uvicorn would cancel their requests, with a traceback."""
    for server in servers:
        for connection in list(server.server_state.connections):
            if isinstance(connection, LimitedHttpProtocol):
                connection.end()


async def wait_until_sent(servers: Sequence[uvicorn.Server], deadline: float) -> None:
    """Wait until every answer that was begun is handed to the system.

    `deadline` is by the event loop's clock.
    """
    loop = asyncio.get_running_loop()
    while loop.time() < deadline and any(map(_is_writing, servers)):
        await asyncio.sleep(0.01)


def _is_writing(server: uvicorn.Server) -> bool:
    return any(
        connection.is_writing
        for connection in server.server_state.connections
        if isinstance(connection, LimitedHttpProtocol)
    )


def settle_garbage_collection() -> None:
    """Exclude what is loaded from garbage collection, and collect seldom.

    By default the collector scans everything once for every few hundred lists of a request's JSON:
    a second for four megabytes of them, during which no other request is answered.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def free_files() -> int:
    """Return how many more files this process may open, at least."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        lowest = os.open(os.devnull, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        return 0
    os.close(lowest)
    # The system assigns the lowest free number, so all numbers from there on may be free.
    return FEW_FILES if limit == resource.RLIM_INFINITY else limit - lowest


async def _watch_open_files(servers: Sequence[uvicorn.Server]) -> None:
    """Close idle connections when the limit of open files is near, and others after their answer.

    At the limit the event loop accepts and drops each new connection silently, health checks too.
    """
    last_warning = -math.inf
    while True:
        await asyncio.sleep(FILES_EVERY_S)
        free = free_files()
        if free >= RESERVED_FILES:
            continue
        connections = [
            connection for server in servers for connection in server.server_state.connections
        ]
        # Idle ones first: uvicorn closes these at once, and the others after their answer.
        connections.sort(key=_is_answering)
        closed = connections[: 2 * (RESERVED_FILES - free)]
        for connection in closed:
            connection.shutdown()
        if time.monotonic() - last_warning >= FILES_WARNING_EVERY_S:
            last_warning = time.monotonic()
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


async def _watch_event_loop(service: ServiceState) -> None:
    """Update the metric of the event loop's lag: the worst of this half minute and the last one."""
    previous, worst, period_end = 0.0, 0.0, time.monotonic() + LAG_OVER_S
    while True:
        expected = time.monotonic() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        now = time.monotonic()
        worst = max(worst, now - expected)
        service.metrics.event_loop_lag.set(max(previous, worst))
        if now > period_end:
            previous, worst, period_end = worst, 0.0, now + LAG_OVER_S


class Pauses:
    """Times in which this process did not run, under SIGSTOP or in a paused machine.

    A tick that comes late shows them.
    """

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        self._last = time.monotonic()
        self._pauses: list[tuple[float, float]] = []

    def tick(self) -> None:
        """Note the time since the last tick; what exceeds `tick_s` was a pause."""
        now = time.monotonic()
        if now - self._last > 2 * self._tick_s:
            self._pauses.append((self._last + self._tick_s, now))
        self._last = now

    def seconds_since(self, begin: float) -> float:
        """Return the seconds of pauses since `begin`, and forget those that ended before it."""
        self._pauses = [(start, end) for start, end in self._pauses if end > begin]
        return sum(end - max(start, begin) for start, end in self._pauses)


async def _watch_engine(service: ServiceState) -> None:
    """End a process whose engine hangs or whose batcher has crashed.

    Nothing in the process can repair that; a supervisor starts another one.
    """
    batcher, lifecycle = service.batcher, service.lifecycle
    limit_s = service.settings.engine_stall_timeout_s
    tick_s = min(1.0, limit_s / 10)
    pauses = Pauses(tick_s)
    while True:
        await asyncio.sleep(tick_s)
        pauses.tick()
        if batcher.crashed or batcher.is_broken:
            log.critical(
                "the thread that runs the models has ended; ending"
                if batcher.crashed
                else "the engine is broken; ending"
            )
            await _exit_with_bug(service)
        elapsed_s = batcher.stalled_for_s
        # The engine was paused as well, so that time does not count.
        stalled_s = elapsed_s - pauses.seconds_since(time.monotonic() - elapsed_s)
        is_stalled = stalled_s > limit_s
        if is_stalled != lifecycle.is_stalled:
            lifecycle.set_stalled(is_stalled)
            log.error(
                "the engine is stuck" if is_stalled else "the engine came back",
                extra={"seconds": round(stalled_s, 1), "limit_s": limit_s},
            )
        if stalled_s > 2 * limit_s:
            log.critical(
                "the engine did not come back; ending",
                extra={"seconds": round(stalled_s, 1), "waiting": batcher.waiting},
            )
            await _exit_with_bug(service)


async def _exit_with_bug(service: ServiceState) -> NoReturn:
    """Fail the requests that wait, and end the process."""
    await service.batcher.close(timeout_s=0.1)
    await service.lifecycle.wait_until_idle(timeout_s=1)
    logs.flush()
    # Not by sys.exit, which would wait for the thread in the engine.
    os._exit(BUG)
