"""
The servers that are measured, each a process group of its own on CPUs of its own.

A server is paused while another one is measured.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from command import BadUsage
from proof.measuring import launch
from proof.measuring.launch import ServerCommand, ServerProcess

READY_WITHIN_S = 300.0
"""Longest wait for a server; some compile their model first."""
STOP_WITHIN_S = 20.0


def split_cpus() -> tuple[set[int], set[int]]:
    """Return the CPUs for the server and those for the load generator.

    The generator gets the last CPU. Where there is only one, both share it.
    """
    available = sorted(os.sched_getaffinity(0))
    if len(available) == 1:
        return set(available), set(available)
    return set(available[:-1]), {available[-1]}


@dataclass(frozen=True)
class Server:
    """A running server and all processes it started."""

    launched: ServerProcess
    port: int

    @property
    def name(self) -> str:
        """Name of the server in tables and error messages."""
        return self.launched.spec.name

    @property
    def log(self) -> Path:
        """File with its output."""
        return self.launched.spec.log

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started, which leads the group."""
        return self.launched.process

    @property
    def url(self) -> str:
        """Address of the server, without a path."""
        return self.launched.url

    def pause(self) -> None:
        """Stop all its processes until `resume` (SIGSTOP)."""
        self.launched.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue all its processes (SIGCONT)."""
        self.launched.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def unpaused(self) -> Iterator[None]:
        """Resume a paused server for the block, then pause it again."""
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def pin(self, cpus: set[int]) -> None:
        """Pin every thread it has to `cpus`.

        Some engines, such as ONNX Runtime, spread their threads over all CPUs, whatever mask they
        inherited.
        """
        for pid in self.pids():
            with contextlib.suppress(psutil.Error):
                for thread in psutil.Process(pid).threads():
                    with contextlib.suppress(OSError):
                        os.sched_setaffinity(thread.id, cpus)

    def cpu_seconds(self) -> float:
        """Return the processor seconds that all its processes have used."""
        return sum(_cpu_seconds(pid) for pid in self.pids())

    def anonymous_bytes(self) -> int:
        """Return the bytes of memory that no file backs, over all its processes."""
        return sum(anonymous_bytes(pid) for pid in self.pids())

    def pids(self) -> list[int]:
        """Return the process ids of its process group."""
        members = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError):
                if os.getpgid(pid) == self.process.pid:
                    members.append(pid)
        return members


@contextlib.contextmanager
def running_server(
    name: str,
    command: Sequence[str],
    port: int,
    log: Path,
    *,
    path: str = "/readyz",
    cpus: set[int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Start a server with `command`, wait until it answers GET `path`, and stop it with the block.

    `cpus` are the CPUs that it is pinned to, `environment` variables added to this process's.
    Raises ServerNotStarted, with the last line of its log, if it does not become ready, and
    BadUsage if our service would answer from a cache.
    """
    if "DRBERT_CACHE_MIB" in {**os.environ, **(environment or {})}:
        raise BadUsage("DRBERT_CACHE_MIB is set; a benchmark measures models and no cache.")
    spec = ServerCommand(
        command,
        f"http://127.0.0.1:{port}",
        log,
        name=name,
        environment=environment or {},
        cpus=cpus or (),
        ready_path=path,
        ready_within_s=READY_WITHIN_S,
        stop_within_s=STOP_WITHIN_S,
    )
    with launch.running(spec) as launched:
        server = Server(launched, port)
        if cpus:
            server.pin(cpus)
        yield server


def service_command(*arguments: str, port: int) -> list[str]:
    """Return the command that starts this checkout's service on `port`."""
    return [sys.executable, "-m", "service", *arguments, "--port", str(port)]


def uvicorn_command(
    app: str, folder: Path, port: int, python: str | Path = sys.executable
) -> list[str]:
    """Return the command that serves the ASGI app `module:name` of a folder with uvicorn."""
    return [
        str(python),
        "-m",
        "uvicorn",
        "--app-dir",
        str(folder),
        app,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-access-log",
        "--log-level",
        "warning",
    ]


def anonymous_bytes(pid: int) -> int:
    """Return the bytes of memory of a process that no file backs; 0 if it has ended.

    psutil has no such figure: its `uss` also counts private pages that a file backs.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:")), 0)


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
