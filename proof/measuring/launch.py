"""
Start a server process, wait until it answers, and stop it.

    with running(ServerCommand(command, url, log)) as server:
        ...

The one launcher of the project: runs of the proof, benchmarks and tests use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from command import Unavailable

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent ends."""
THIS_HOST = ("127.0.0.1", "localhost")
POLL_S = 0.02
"""Seconds between two looks at a server that is not ready yet."""
LAST_LINE_CHARS = 400
"""Most characters of a log line that an error message quotes."""


class ServerNotStarted(Unavailable):
    """The server did not become ready; the message quotes the last line of its log."""


@dataclass(frozen=True)
class ServerCommand:
    """How to start one server, and how to tell that it is ready."""

    command: Sequence[str]
    """Program and arguments; no shell sees them."""
    url: str
    """Scheme, host and port that it will listen at, without a path."""
    log: Path
    """File that its standard output and standard error are appended to."""
    name: str = "The server"
    """How error messages call it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables added to the caller's environment."""
    cpus: Collection[int] = ()
    """Processors that it is pinned to; all that the caller may use if empty."""
    nice: int = 0
    """Its nice value, where the caller may set it: below 0, before other processes."""
    ready_path: str = "/readyz"
    """Path that answers GET with a 2xx status as soon as the server is ready."""
    ready_within_s: float = 120.0
    """Longest wait until it is ready, in seconds."""
    stop_within_s: float = 30.0
    """Longest wait between SIGTERM and SIGKILL, in seconds."""
    own_group: bool = True
    """Whether it leads a session and process group of its own.

    Signals then reach everything that it starts, and Ctrl-C in the caller's terminal does not.
    Without, it ends with its caller, however that ends.
    """


@dataclass(frozen=True)
class ServerProcess:
    """A server that was started; it may have ended since."""

    spec: ServerCommand
    """The command that started it."""
    process: subprocess.Popen[bytes]
    """The process itself; its pid is the group's where it has a group of its own."""
    log_offset: int
    """Size of the log before the start, in bytes."""

    @property
    def url(self) -> str:
        """Return the scheme, host and port that it listens at."""
        return self.spec.url

    def read_log(self) -> str:
        """Return what this start has written to the log so far."""
        return _read_from(self.spec.log, self.log_offset)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the server, and to its whole group if it has one of its own."""
        with contextlib.suppress(ProcessLookupError):
            if self.spec.own_group:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    def wait_until_ready(self) -> None:
        """Return as soon as the server answers its ready path.

        Raise ServerNotStarted if it ends first, or is not ready in time.
        """
        spec = self.spec
        deadline = time.monotonic() + spec.ready_within_s
        while not answers(spec.url + spec.ready_path):
            if self.process.poll() is not None:
                raise ServerNotStarted(
                    f"{spec.name} ended with {self.process.returncode} before it was ready:"
                    f" {last_line(spec.log, self.log_offset)}"
                )
            if time.monotonic() > deadline:
                raise ServerNotStarted(
                    f"{spec.name} was not ready within {spec.ready_within_s:g} s; the last line of"
                    f" {spec.log}: {last_line(spec.log, self.log_offset)}"
                )
            time.sleep(POLL_S)

    def stop(self) -> int:
        """Stop the server: SIGTERM, then SIGKILL after `stop_within_s` seconds.

        Return its exit code, negative for the signal that ended it. A server that is stopped
        already is no error.
        """
        # A paused process keeps SIGTERM pending until it continues.
        self.send_signal(signal.SIGCONT)
        self.send_signal(signal.SIGTERM)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.spec.stop_within_s)
        finally:
            # Also for children that outlive a server that ended in time.
            self.send_signal(signal.SIGKILL)
        return self.process.wait()


def start(spec: ServerCommand) -> ServerProcess:
    """Start a server and return at once; the caller stops it."""
    with spec.log.open("ab") as output:
        offset = output.tell()
        process = subprocess.Popen(
            list(spec.command),
            stdout=output,
            stderr=output,
            env={**os.environ, **spec.environment},
            start_new_session=spec.own_group,
            preexec_fn=pin(spec.cpus) if spec.own_group else tied_to_caller(pin(spec.cpus)),
        )
    if spec.nice:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, spec.nice)
    return ServerProcess(spec, process, offset)


@contextlib.contextmanager
def running(spec: ServerCommand) -> Iterator[ServerProcess]:
    """Start a server, yield it when it is ready, and stop it at the end of the block.

    Raise ServerNotStarted if it does not become ready.
    """
    server = start(spec)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def pin(cpus: Collection[int]) -> Callable[[], None] | None:
    """Return a `preexec_fn` that pins a child process to these processors; None for no pinning."""
    if not cpus:
        return None
    return lambda: os.sched_setaffinity(0, cpus)


def tied_to_caller(
    prepare: Callable[[], None] | None = None, number: signal.Signals = signal.SIGTERM
) -> Callable[[], None]:
    """Return a `preexec_fn` after which the child gets a signal when its caller ends.

    Also when the caller is killed, which it cannot handle. Where the system has no prctl(2), the
    child stays. `prepare` is called first.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def tie() -> None:
        if prepare is not None:
            prepare()
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, int(number))

    return tie


def reach_this_host_directly() -> None:
    """Let this process and those that it starts reach 127.0.0.1 without a proxy.

    A proxy of the environment answers for another host, or not at all.
    """
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join([*hosts, *(host for host in THIS_HOST if host not in hosts)])


def answers(url: str) -> bool:
    """Return whether GET `url` gets a 2xx answer within 5 s; certificates are not checked."""
    context = ssl._create_unverified_context() if url.startswith("https:") else None
    try:
        with urllib.request.urlopen(url, timeout=5, context=context):
            return True
    except OSError:
        return False


def last_line(log: Path, offset: int = 0) -> str:
    """Return a log's last line that is not blank, shortened to LAST_LINE_CHARS characters.

    Only what lies behind `offset` bytes counts.
    """
    lines = [line for line in _read_from(log, offset).splitlines() if line.strip()]
    return lines[-1].strip()[:LAST_LINE_CHARS] if lines else "the log is empty"


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _read_from(log: Path, offset: int) -> str:
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")
