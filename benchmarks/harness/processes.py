"""
Servers to be measured: each a process group of its own on processors of its own, paused while
another one is measured.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from command import Unavailable

READY_WITHIN_S = 300


def halves() -> tuple[set[int], set[int]]:
    """Processors for the server and for the generator: the last one generates, where there
    are two.
    """
    available = sorted(os.sched_getaffinity(0))
    return (
        (set(available[:-1]), {available[-1]})
        if len(available) > 1
        else (set(available), set(available))
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Process:
    """A running server and everything it started."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def pin(self, cpus: set[int]) -> None:
        """Keeps every thread it has on these processors: some engines, as ONNX Runtime, spread
        theirs over all there are, whatever they inherited.
        """
        for pid in self.pids():
            for thread in Path(f"/proc/{pid}/task").glob("*"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread.name), cpus)

    def cpu_seconds(self) -> float:
        """Processor time it has taken so far, in all its processes."""
        return sum(_cpu_seconds(pid) for pid in self.pids())

    def anonymous_bytes(self) -> int:
        """Memory that no file backs, in all its processes."""
        return sum(_anonymous_bytes(pid) for pid in self.pids())

    def pids(self) -> list[int]:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[2]) == self.process.pid:
                    found.append(int(stat.parent.name))
        return found


@contextlib.contextmanager
def started(
    name: str,
    command: Sequence[str],
    port: int,
    log: Path,
    *,
    path: str = "/readyz",
    cpus: set[int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Process]:
    """The server that `command` starts, as soon as it answers GET `path`; it ends with the block.
    Unavailable quotes its last words.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
        )
    server = Process(name, port, process, log)
    try:
        wait_until_ready(server, path)
        if cpus:
            server.pin(cpus)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.go_on()
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_ready(server: Process, path: str, every_s: float = 0.01) -> None:
    give_up = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < give_up:
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(server.url + path, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(every_s)
    raise Unavailable(f"{server.name} did not get ready: {last_line(server.log)}")


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:400] if lines else "it said nothing"


def our_service(*arguments: str, port: int) -> list[str]:
    return [sys.executable, "-m", "service", *arguments, "--port", str(port)]


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:")), 0)
