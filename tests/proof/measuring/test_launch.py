"""The one launcher of server processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from proof.measuring.launch import (
    ServerCommand,
    ServerNotStarted,
    free_port,
    last_line,
    running,
    start,
)

SERVER = """
import http.server, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path in ("/readyz", "/cpus", "/variable") else 503)
        self.end_headers()
        facts = {"/cpus": str(sorted(os.sched_getaffinity(0))), "/variable": os.getenv("FACT", "")}
        self.wfile.write(facts.get(self.path, "").encode())

print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def of_python(
    code: str, folder: Path, arguments: Sequence[str] = (), **fields: Any
) -> ServerCommand:
    """A server that is a piece of Python, called with its port and further arguments."""
    port = free_port()
    command = [sys.executable, "-c", code, str(port), *arguments]
    return ServerCommand(command, f"http://127.0.0.1:{port}", folder / "log", **fields)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        content: bytes = answer.read()
    return content.decode()


@pytest.mark.parametrize("own_group", [True, False])
def test_a_server_answers_when_the_block_begins_and_is_gone_when_it_ends(
    tmp_path: Path, own_group: bool
) -> None:
    cpu = min(os.sched_getaffinity(0))
    spec = of_python(
        SERVER, tmp_path, cpus={cpu}, environment={"FACT": "given"}, own_group=own_group
    )
    with running(spec) as server:
        assert get(f"{server.url}/cpus") == str([cpu])
        assert get(f"{server.url}/variable") == "given"
        assert (os.getpgid(server.process.pid) == server.process.pid) is own_group
        assert server.read_log().startswith("listening")
    assert server.process.returncode == -signal.SIGTERM


def test_a_server_that_ends_early_is_reported_with_its_code_and_its_last_log_line(
    tmp_path: Path,
) -> None:
    spec = of_python("print('bad weights'); raise SystemExit(3)", tmp_path, name="Arm a")
    message = r"Arm a ended with 3 .* ready: bad weights"
    with pytest.raises(ServerNotStarted, match=message), running(spec):
        pass


def test_a_log_line_of_an_earlier_start_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("from before\n")
    spec = of_python("raise SystemExit(3)", tmp_path)
    with pytest.raises(ServerNotStarted, match="the log is empty"), running(spec):
        pass


def test_a_server_that_never_gets_ready_is_reported_with_the_limit_and_stopped(
    tmp_path: Path,
) -> None:
    spec = of_python(SERVER, tmp_path, ready_path="/never", ready_within_s=0)
    server = start(spec)
    try:
        message = r"not ready within 0 s; the last line of .*log: "
        with pytest.raises(ServerNotStarted, match=message):
            server.wait_until_ready()
    finally:
        server.stop()
    assert server.process.returncode is not None


DEAF = (
    """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
"""
    + SERVER
)


@pytest.mark.parametrize("paused", [True, False])
def test_a_server_that_ignores_sigterm_is_killed_with_its_children(
    tmp_path: Path, paused: bool
) -> None:
    server = start(of_python(DEAF, tmp_path, stop_within_s=0.1))
    server.wait_until_ready()
    child = os.pidfd_open(int(server.read_log().split()[0]))
    try:
        if paused:
            server.send_signal(signal.SIGSTOP)
        assert server.stop() == -signal.SIGKILL
        assert server.stop() == -signal.SIGKILL  # stopping twice is no error
        ended, _, _ = select.select([child], [], [], 60)
        assert ended == [child]
    finally:
        os.close(child)


def test_a_long_log_line_is_shortened(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\n" + "x" * 1000 + "\n\n")
    assert last_line(log) == "x" * 400


CALLER = """
import sys, time
from pathlib import Path
from proof.measuring.launch import ServerCommand, start

log, command = Path(sys.argv[1]), sys.argv[2:]
server = start(ServerCommand(command, "http://127.0.0.1:9", log, own_group=False))
print(server.process.pid, flush=True)
time.sleep(60)
"""


def test_a_server_ends_when_its_caller_is_killed(tmp_path: Path) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    command = [sys.executable, "-c", CALLER, str(tmp_path / "log"), *sleeper]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        server = psutil.Process(int(caller.stdout.readline()))
        caller.kill()
    server.wait(timeout=30)
